package daemon

import (
	"testing"
	"time"
)

// TestLowerTTLOverRestart: an answer that was given with a long TTL is waited
// for, also by a Roost that was started with a shorter one.
func TestLowerTTLOverRestart(t *testing.T) {
	for _, reloaded := range []bool{true, false} {
		w := quietWorld(t)
		w.ttl = time.Minute
		w.reload()
		key := oracleKeys[0]
		w.put(key, oracleBodies[0])
		was := w.address(key)
		w.ttl = time.Second
		if reloaded {
			w.reload()
		}
		w.remove(key)
		w.die()
		w.start()
		held := func() bool { return len(w.quarantined(key)) > 0 }
		w.pass(time.Minute + ttlMargin - time.Second)
		if !held() {
			t.Fatalf("reloaded %v: %s is free while an answer names it", reloaded, was)
		}
		w.pass(5 * time.Second)
		if held() {
			t.Errorf("reloaded %v: %s is never free", reloaded, was)
		}
		// The long TTL is over and forgotten: the next start waits no longer
		// than it has to.
		w.put(key, oracleBodies[0])
		w.remove(key)
		w.die()
		w.start()
		w.pass(w.quarantine + 2*tickEvery)
		if held() {
			t.Errorf("reloaded %v: the long TTL is never forgotten", reloaded)
		}
	}
}

// TestLongTTLThatCannotBeWritten: nobody is told a TTL that a restart would not
// know of.
func TestLongTTLThatCannotBeWritten(t *testing.T) {
	w := quietWorld(t)
	w.ttl, w.disk.mode = time.Minute, writeFull
	w.reload()
	if got := w.d.snapshot.Load().Config.TTL; got != w.quarantine-ttlMargin {
		t.Errorf("while the disk is full: %s", got)
	}
	w.disk.mode = writeWell
	w.pass(tickEvery)
	if got := w.d.snapshot.Load().Config.TTL; got != time.Minute {
		t.Errorf("afterwards: %s", got)
	}
}
