package daemon

import (
	"testing"
	"time"

	"github.com/roostmesh/roost/lb/ledger"
)

// TestPatience: a ledger that cannot be written is tried again soon, then ever
// less often; a client that asks is never put off, and what is well again is
// noticed.
func TestPatience(t *testing.T) {
	w := quietWorld(t)
	w.disk.mode = writeFull
	again := func() { // what a source shows is staged anew by each build
		w.r.stage(func(tx *ledger.Tx) {
			tx.PutMark(ledger.Mark{Kind: ledger.MarkDrain, Name: "acme/none/x", Since: w.now})
		})
	}
	tries := func(within time.Duration) int {
		before := w.disk.tries
		for end := w.now.Add(within); w.now.Before(end); {
			again()
			w.pass(tickEvery)
		}
		return w.disk.tries - before
	}
	if n := tries(8 * time.Second); n < 3 || n > 5 {
		t.Errorf("tried %d times in the first 8 s", n)
	}
	if n := tries(2 * time.Minute); n < 3 || n > 7 {
		t.Errorf("tried %d times in the next two minutes", n)
	}
	before := w.disk.tries
	w.put(oracleKeys[0], oracleBodies[0])
	if w.disk.tries == before {
		t.Error("a client's change was not tried")
	}
	w.disk.mode = writeWell
	w.put(oracleKeys[0], oracleBodies[0])
	if n := tries(4 * time.Second); n < 3 {
		t.Errorf("tried %d times in 4 s when it was well again", n)
	}
}
