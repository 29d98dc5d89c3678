package discovery

import (
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestTable: a Table is what a map would be, former ones stay as they were, and
// what differs between two is just that.
func TestTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tables []Table[int, int]
		var models []map[int]int
		now, model := Table[int, int]{}, map[int]int{}
		for range rapid.IntRange(1, 12).Draw(t, "edits") {
			e := now.Edit()
			model = maps.Clone(model)
			for range rapid.IntRange(0, 30).Draw(t, "steps") {
				k := rapid.IntRange(0, 600).Draw(t, "key")
				if rapid.Bool().Draw(t, "set") {
					v := rapid.IntRange(0, 2).Draw(t, "value")
					e.Set(k, v)
					model[k] = v
				} else {
					e.Delete(k)
					delete(model, k)
				}
			}
			now = e.Table()
			tables, models = append(tables, now), append(models, model)
		}
		for i, table := range tables {
			if diff := cmp.Diff(models[i], maps.Collect(table.All())); diff != "" || table.Len() != len(models[i]) {
				t.Fatalf("table %d of %d, %d keys: %s", i, len(tables), table.Len(), diff)
			}
			for j, other := range tables {
				var want []int
				for k := range 601 {
					a, aok := models[i][k]
					b, bok := models[j][k]
					if aok != bok || a != b {
						want = append(want, k)
					}
				}
				if diff := cmp.Diff(want, slices.Sorted(table.Differs(other))); diff != "" {
					t.Fatalf("%d differs from %d: %s", i, j, diff)
				}
			}
		}
	})
}
