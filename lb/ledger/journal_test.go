package ledger

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// journaled opens a ledger with a journal in a directory.
func journaled(t *testing.T, dir string) (*Ledger, *Journal) {
	t.Helper()
	b, err := OpenBolt(filepath.Join(dir, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	j, err := NewJournal(b, filepath.Join(dir, "ledger.journal"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := Open(context.Background(), j, func() time.Time { return time.Unix(1700000000, 0).UTC() })
	if err != nil {
		t.Fatal(err)
	}
	return l, j
}

func closed(t *testing.T, j *Journal) {
	t.Helper()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

// busyLedger makes changes of every kind.
func busyLedger(t *testing.T, l *Ledger, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		o := Owner{"acme", fmt.Sprint("s", i)}
		err := l.Update(context.Background(), func(tx *Tx) error {
			tx.PutObject(Object{Owner: o, Origin: "api", Spec: []byte(`{}`)})
			tx.Bind([]Wish{{o, pool("127.128.0.0/9")}}, "test")
			tx.PutMark(Mark{Kind: MarkDrain, Name: o.String() + "/1"})
			if i%3 == 1 {
				before := Owner{"acme", fmt.Sprint("s", i-1)}
				tx.DeleteObject(before)
				tx.Release(before, "deleted")
				tx.DeleteMark(MarkKey{MarkDrain, before.String() + "/1"})
			}
			if i%3 == 2 {
				if r, ok := tx.Lookup(Owner{"acme", fmt.Sprint("s", i-2)}, Internal, false); ok {
					tx.Free(r.Address)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func file(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func overwrite(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestOldBackup: a ledger file from an earlier day, or none, is brought forwards
// to what was last written; so is one behind which the journal was torn, as far
// as the journal goes.
func TestOldBackup(t *testing.T) {
	dir := t.TempDir()
	db, journal := filepath.Join(dir, "ledger.db"), filepath.Join(dir, "ledger.journal")
	l, j := journaled(t, dir)
	busyLedger(t, l, 0, 10)
	closed(t, j)
	backup := file(t, db)
	l, j = journaled(t, dir)
	if j.Healed() != "" {
		t.Errorf("an ordinary start: %s", j.Healed())
	}
	busyLedger(t, l, 10, 40)
	want := l.State()
	closed(t, j)
	lines := file(t, journal)

	check := func(name string, generation uint64) {
		t.Helper()
		l, j := journaled(t, dir)
		defer closed(t, j)
		if generation == want.Generation {
			if diff := cmp.Diff(want, l.State(), cmp.Comparer(func(a, b Record) bool { return a == b })); diff != "" {
				t.Errorf("%s: %s", name, diff)
			}
		}
		if l.Generation() != generation || !strings.Contains(j.Healed(), "was written again") {
			t.Errorf("%s: generation %d, want %d; it says %q", name, l.Generation(), generation, j.Healed())
		}
		busyLedger(t, l, 100, 103) // and goes on
	}
	overwrite(t, db, backup)
	check("a backup", want.Generation)
	if err := os.Remove(db); err != nil {
		t.Fatal(err)
	}
	overwrite(t, journal, lines)
	check("no ledger", want.Generation)
	overwrite(t, db, backup)
	overwrite(t, journal, lines[:len(lines)-10])
	check("a torn journal", want.Generation-1)

	l, j = journaled(t, dir)
	if j.Healed() != "" {
		t.Errorf("healed twice: %s", j.Healed())
	}
	if err := os.Remove(journal); err != nil {
		t.Fatal(err)
	}
	busyLedger(t, l, 200, 203)
	want = l.State()
	closed(t, j)
	if l, j = journaled(t, dir); l.Generation() != want.Generation || j.Healed() != "" {
		t.Errorf("without a journal: generation %d, want %d", l.Generation(), want.Generation)
	}
	closed(t, j)
}

// TestJournalBeginsAnew: it does not grow without bound, and what is no journal
// is not taken for one, nor lost.
func TestJournalBeginsAnew(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger.journal")
	b, err := OpenBolt(filepath.Join(dir, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	b.db.NoSync = true
	j, err := NewJournal(b, path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Open(context.Background(), j, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 * journalSlack {
		if err := l.Update(context.Background(), func(tx *Tx) error { tx.PutMark(Mark{Kind: MarkRelease, Name: "consul", Since: time.Now()}); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if j.lines > journalSlack+1 || strings.Count(string(file(t, path)), "\n") > journalSlack+2 {
		t.Errorf("%d lines after %d changes", j.lines, 3*journalSlack)
	}
	closed(t, j)

	overwrite(t, path, []byte("a letter\nto a friend\n"))
	b, err = OpenBolt(filepath.Join(dir, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	if j, err = NewJournal(b, path); err != nil {
		t.Fatal(err)
	}
	defer closed(t, j)
	if _, err := j.Load(context.Background()); err == nil || !strings.Contains(err.Error(), path+": it is not a journal") {
		t.Errorf("a foreign file: %v", err)
	}
	if got := string(file(t, path)); got != "a letter\nto a friend\n" {
		t.Errorf("a foreign file was changed to %q", got)
	}
	overwrite(t, path, []byte("no line end"))
	if _, err := j.Load(context.Background()); err == nil || string(file(t, path)) != "no line end" {
		t.Errorf("a foreign file without a line end: %v", err)
	}
	overwrite(t, path, []byte(`{"format":"roost-jour`))
	if _, err := j.Load(context.Background()); err != nil {
		t.Errorf("torn within the first line: %v", err)
	}
	if _, err := NewJournal(b, dir); err == nil {
		t.Error("a directory is taken for a journal")
	}
}
