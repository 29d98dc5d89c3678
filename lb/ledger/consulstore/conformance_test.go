package consulstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/lb/ledger"
)

// kind is a sort of Store. open opens the same store each time it is called in
// one test; another is a second writer of an open one.
type kind struct {
	open    func(t *testing.T) ledger.Store
	another func(t *testing.T, s ledger.Store) ledger.Store
}

func kinds() map[string]func(t *testing.T) kind {
	return map[string]func(t *testing.T) kind{
		"bolt": func(t *testing.T) kind {
			path := filepath.Join(t.TempDir(), "ledger.db")
			return kind{
				open: func(t *testing.T) ledger.Store {
					b, err := ledger.OpenBolt(path)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = b.Close() })
					return b
				},
				another: func(_ *testing.T, s ledger.Store) ledger.Store { return s },
			}
		},
		"consul": func(t *testing.T) kind {
			a, prefix := consul(t), newPrefix()
			return kind{
				open:    func(t *testing.T) ledger.Store { return a.store(t, prefix, "one") },
				another: func(t *testing.T, _ ledger.Store) ledger.Store { return a.store(t, prefix, "two") },
			}
		},
	}
}

// TestStores is what every Store does alike.
func TestStores(t *testing.T) {
	for name, of := range kinds() {
		t.Run(name, func(t *testing.T) {
			for what, check := range map[string]func(*testing.T, kind){
				"what is applied is there": appliedIsThere, "generations are in order": generationsInOrder,
				"two writers": twoWriters, "a failed batch leaves nothing": failedLeavesNothing, "a large batch": largeBatch,
			} {
				t.Run(what, func(t *testing.T) { check(t, of(t)) })
			}
		})
	}
}

func load(t *testing.T, s ledger.Store) ledger.State {
	t.Helper()
	state, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(state.Records, func(a, b ledger.Record) int { return a.Address.Compare(b.Address) })
	slices.SortFunc(state.Objects, func(a, b ledger.Object) int { return strings.Compare(a.Owner.String(), b.Owner.String()) })
	slices.SortFunc(state.Marks, func(a, b ledger.Mark) int { return strings.Compare(a.Kind+a.Name, b.Kind+b.Name) })
	return state
}

func reopen(t *testing.T, k kind, s ledger.Store) ledger.Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return k.open(t)
}

func same(t *testing.T, what string, want, got ledger.State) {
	t.Helper()
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("%s: %s", what, d)
	}
}

var since = time.Unix(1700000000, 123).UTC()

func record(o ledger.Owner, kind, at string, generation uint64) ledger.Record {
	return ledger.Record{Address: netip.MustParseAddr(at), Kind: kind, Pool: "p", Owner: o, Generation: generation, State: ledger.Bound, Since: since, Reason: "täst"}
}

// odd are names that a key, a path or a URL could stumble over.
var odd = []string{"a", "a b", "käse", "日本", "a%2Fb", "..", ".", "a?b#c", "a\\b", "a+b", `a"b`, "%", "6", "internal", "é\u0301", "\u202e"}

func everything() (b ledger.Batch, s ledger.State) {
	s.Generation = 1
	for n, name := range odd {
		o := ledger.Owner{Tenant: name, Service: odd[(n+1)%len(odd)]}
		s.Records = append(s.Records,
			record(o, ledger.Internal, fmt.Sprintf("127.130.0.%d", 10+n), 1),
			record(o, ledger.Internal, fmt.Sprintf("fd00::%d", 10+n), 1))
		if n < 5 { // one transaction of Consul holds no more
			s.Records = append(s.Records, record(o, ledger.Dedicated, fmt.Sprintf("192.0.2.%d", 10+n), 1))
		}
		s.Objects = append(s.Objects, ledger.Object{Owner: o, Origin: "api", Spec: []byte{0, 255, byte(n)}, Generation: 1})
		s.Marks = append(s.Marks, ledger.Mark{Kind: ledger.MarkDrain, Name: "t/" + name + "/1@h", Since: since, Generation: 1, Data: json.RawMessage(`{"by":"ädä"}`)})
	}
	s.Marks = append(s.Marks, ledger.Mark{Kind: ledger.MarkRelease, Name: "consul", Since: since, Generation: 1})
	return ledger.Batch{Generation: 1, Put: slices.Clone(s.Records), PutObjects: slices.Clone(s.Objects), PutMarks: slices.Clone(s.Marks)}, s
}

func sorted(t *testing.T, s ledger.State) ledger.State {
	t.Helper()
	return load(t, fixed{s: s})
}

type fixed struct {
	ledger.Memory
	s ledger.State
}

func (f fixed) Load(context.Context) (ledger.State, error) { return f.s, nil }

func appliedIsThere(t *testing.T, k kind) {
	s := k.open(t)
	same(t, "new", ledger.State{}, load(t, s))
	batch, want := everything()
	want = sorted(t, want)
	apply := func(b ledger.Batch) {
		t.Helper()
		if err := s.Apply(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	apply(batch)
	same(t, "after a batch", want, load(t, s))
	s = reopen(t, k, s)
	same(t, "after reopening", want, load(t, s))

	// Change one of each, delete one of each.
	r, o, m := want.Records[0], want.Objects[0], want.Marks[0]
	r.State, r.Generation, o.Spec, o.Generation, m.Data, m.Generation = ledger.Quarantined, 2, []byte("new"), 2, json.RawMessage(`{}`), 2
	apply(ledger.Batch{After: 1, Generation: 2, Put: []ledger.Record{r}, PutObjects: []ledger.Object{o}, PutMarks: []ledger.Mark{m},
		Delete: []netip.Addr{want.Records[1].Address}, DelObjects: []ledger.Owner{want.Objects[1].Owner}, DelMarks: []ledger.MarkKey{want.Marks[1].Key()}})
	want = ledger.State{Generation: 2, Records: slices.Delete(want.Records, 1, 2), Objects: slices.Delete(want.Objects, 1, 2), Marks: slices.Delete(want.Marks, 1, 2)}
	want.Records[0], want.Objects[0], want.Marks[0] = r, o, m
	same(t, "after changes", want, load(t, s))
	// What is not there may be deleted.
	apply(ledger.Batch{After: 2, Generation: 3, Delete: []netip.Addr{netip.MustParseAddr("10.9.9.9")}, DelObjects: []ledger.Owner{{Tenant: "no", Service: "no"}}, DelMarks: []ledger.MarkKey{{Kind: "no", Name: "no"}}})
	want.Generation = 3
	s = reopen(t, k, s)
	same(t, "reopened after changes", want, load(t, s))
}

func generationsInOrder(t *testing.T, k kind) {
	s := k.open(t)
	load(t, s)
	mark := func(after, generation uint64) error {
		return s.Apply(t.Context(), ledger.Batch{After: after, Generation: generation, PutMarks: []ledger.Mark{{Kind: "drain", Name: fmt.Sprint(after, generation), Since: since}}})
	}
	for _, c := range []struct {
		after, generation uint64
		ok                bool
	}{{1, 2, false}, {0, 0, false}, {0, 1, true}, {0, 1, false}, {1, 1, false}, {1, 2, true}, {2, 50, true}, {3, 4, false}, {50, 49, false}, {50, 51, true}} {
		if err := mark(c.after, c.generation); (err == nil) != c.ok || !c.ok && !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("%d after %d: %v", c.generation, c.after, err)
		}
	}
	if got := load(t, s); got.Generation != 51 || len(got.Marks) != 4 {
		t.Errorf("%+v", got)
	}
}

// twoWriters know the same generation: one of them succeeds, and a Ledger makes
// what it wanted fit.
func twoWriters(t *testing.T, k kind) {
	s := k.open(t)
	other := k.another(t, s)
	a, err := ledger.Open(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := ledger.Open(t.Context(), other, nil)
	if err != nil {
		t.Fatal(err)
	}
	one := wish(ledger.Owner{Tenant: "acme", Service: "shop"}, "127.130.0.0/31")
	two := wish(ledger.Owner{Tenant: "globex", Service: "shop"}, "127.130.0.0/31")
	if _, _, err := a.Bind(t.Context(), []ledger.Wish{one}, "test"); err != nil {
		t.Fatal(err)
	}
	batch, _ := everything()
	if err := other.Apply(t.Context(), batch); !errors.Is(err, ledger.ErrConflict) {
		t.Errorf("a batch on what is old: %v", err)
	}
	if _, _, err := b.Bind(t.Context(), []ledger.Wish{two}, "test"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Bind(t.Context(), []ledger.Wish{two}, "test"); err != nil {
		t.Fatal(err)
	}
	if state, err := s.Load(t.Context()); err != nil {
		t.Fatal(err)
	} else if _, err := a.Adopt(state); err != nil {
		t.Fatal(err)
	}
	same(t, "both", a.State(), b.State())
	if len(a.Records()) != 2 || a.Records()[0].Owner == a.Records()[1].Owner {
		t.Errorf("%+v", a.Records())
	}
}

// failedLeavesNothing: neither a batch that is refused nor one whose time is up
// leaves a trace.
func failedLeavesNothing(t *testing.T, k kind) {
	s := k.open(t)
	load(t, s)
	batch, want := everything()
	if err := s.Apply(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	change := ledger.Batch{After: 7, Generation: 8, PutMarks: []ledger.Mark{{Kind: "drain", Name: "new"}}, Delete: []netip.Addr{want.Records[0].Address},
		Put: []ledger.Record{record(ledger.Owner{Tenant: "x", Service: "y"}, ledger.Internal, "127.130.9.9", 8)}, DelObjects: []ledger.Owner{want.Objects[0].Owner}}
	if err := s.Apply(t.Context(), change); !errors.Is(err, ledger.ErrConflict) {
		t.Errorf("a batch on nothing: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	change.After, change.Generation = 1, 2
	if err := s.Apply(ctx, change); !errors.Is(err, context.Canceled) {
		t.Errorf("without time: %v", err)
	}
	same(t, "after two failures", sorted(t, want), load(t, s))
	same(t, "reopened", sorted(t, want), load(t, reopen(t, k, s)))
}

func largeBatch(t *testing.T, k kind) {
	s := k.open(t)
	l, err := ledger.Open(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	var wishes []ledger.Wish
	for n := range 10000 {
		wishes = append(wishes, wish(owner(n), "127.128.0.0/16"))
	}
	start := time.Now()
	bound, refused, err := l.Bind(t.Context(), wishes, "test")
	if err != nil || len(refused) > 0 || len(bound) != 10000 {
		t.Fatal(len(bound), refused, err)
	}
	t.Logf("10,000 records in %v, %d generations", time.Since(start), l.Generation())
	start = time.Now()
	got := load(t, reopen(t, k, s))
	t.Logf("loaded in %v", time.Since(start))
	if len(got.Records) != 10000 || got.Generation != l.Generation() {
		t.Errorf("%d records of generation %d", len(got.Records), got.Generation)
	}
}
