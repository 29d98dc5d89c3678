package consulstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/roostmesh/roost/lb/ledger"
)

func TestPermissionDenied(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	l, _ := a.ledger(t, prefix, "good")
	bind(t, l, owner(1))
	needs := []string{`key_prefix "` + strings.TrimSuffix(prefix, "/") + `" write`, `session "" write`, prefix}
	for n, c := range []struct {
		rules string
		load  bool
	}{
		{`key_prefix "" { policy = "deny" } session_prefix "" { policy = "write" }`, false},
		{`key_prefix "" { policy = "read" } session_prefix "" { policy = "write" }`, true},
		{`key_prefix "" { policy = "write" } session_prefix "" { policy = "read" }`, true},
	} {
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, []byte(a.token(t, fmt.Sprint(prefix[:len(prefix)-1], "-", n), c.rules)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		s := a.store(t, prefix, fmt.Sprint("bad", n), func(c *Config) { c.TokenFile = file })
		_, err := s.Load(t.Context())
		if !c.load {
			wantErr(t, c.rules, err, nil, a, needs...)
		} else if err != nil {
			t.Errorf("%s: %v", c.rules, err)
		}
		err = s.Apply(t.Context(), ledger.Batch{After: 1, Generation: 2, PutMarks: []ledger.Mark{{Kind: "drain", Name: "x"}}})
		wantErr(t, c.rules, err, nil, a, needs...)
	}
	if got := a.get(t, prefix+"generation"); got != `{"generation":1,"records":1,"objects":0,"marks":0}` {
		t.Error(got)
	}
}

// TestWhatIsNoLedger is refused with the way out, and left alone.
func TestWhatIsNoLedger(t *testing.T) {
	a := consul(t)
	for name, c := range map[string]struct {
		change func(prefix string)
		says   []string
	}{
		"foreign keys":    {func(p string) { a.put(t, p+"services/theirs", "x") }, []string{"another program", "set another prefix"}},
		"a newer format":  {func(p string) { a.put(t, p+"format", "roost-ledger-9") }, []string{"roost-ledger-9", "another version"}},
		"damaged JSON":    {func(p string) { whole(t, a, p); a.put(t, p+"services/acme/s1", "{") }, []string{"services/acme/s1: it is damaged", "put its old value back"}},
		"a misplaced one": {func(p string) { whole(t, a, p); a.put(t, p+"services/acme/s9", a.get(t, p+"services/acme/s1")) }, []string{"services/acme/s9", "belongs to key services/acme/s1"}},
		"a lost address":  {func(p string) { whole(t, a, p); a.del(t, p+"addresses/", true) }, []string{"0 records with 1 owners", "snapshot"}},
		"a lost owner":    {func(p string) { whole(t, a, p); a.del(t, p+"owners/", true) }, []string{"owners/acme/s1/internal", "addresses/127.130."}},
		"a lost object":   {func(p string) { whole(t, a, p); a.del(t, p+"services/", true) }, []string{"0 services", "left 1, 1 and 0"}},
		"no generation":   {func(p string) { whole(t, a, p); a.del(t, p+"generation", false) }, []string{"generation", "the key is gone"}},
		"no format":       {func(p string) { whole(t, a, p); a.del(t, p+"format", false) }, []string{"format", "deleted in part"}},
	} {
		t.Run(name, func(t *testing.T) {
			prefix := newPrefix()
			c.change(prefix)
			before, _, err := a.client.KV().List(prefix, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, err = ledger.Open(t.Context(), a.store(t, prefix, "one"), nil)
			wantErr(t, name, err, nil, a, append(c.says, prefix)...)
			if err := a.store(t, prefix, "two").Restore(t.Context(), ledger.State{Generation: 5}); err == nil {
				t.Error("somebody who has never seen it may restore it")
			}
			after, _, err := a.client.KV().List(prefix, nil)
			if err != nil || len(after) != len(before)+1 { // the key of two
				t.Errorf("%d keys, then %d: %v", len(before), len(after), err)
			}
		})
	}
}

// whole writes a small ledger of a replica that has gone.
func whole(t *testing.T, a *agent, prefix string) {
	t.Helper()
	l, s := a.ledger(t, prefix, "zero")
	bind(t, l, owner(1))
	if err := l.PutObjects(t.Context(), []ledger.Object{{Owner: owner(1), Origin: "api"}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func (a *agent) del(t *testing.T, key string, tree bool) {
	t.Helper()
	var err error
	if tree {
		_, err = a.client.KV().DeleteTree(key, nil)
	} else {
		_, err = a.client.KV().Delete(key, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestWhatIsLostIsWrittenAgain by a replica that has seen it, in whichever way it
// was lost; the others follow.
func TestWhatIsLostIsWrittenAgain(t *testing.T) {
	a := consul(t)
	for name, lose := range map[string]func(prefix string){
		"all":        func(p string) { a.del(t, p, true) },
		"addresses":  func(p string) { a.del(t, p+"addresses/", true) },
		"an owner":   func(p string) { a.del(t, p+"owners/acme/s3/internal", false) },
		"format":     func(p string) { a.del(t, p+"format", false) },
		"generation": func(p string) { a.del(t, p+"generation", false) },
		"and another has begun anew": func(p string) {
			a.del(t, p, true)
			l, _ := a.ledger(t, p, "fresh")
			bind(t, l, owner(900))
		},
	} {
		t.Run(name, func(t *testing.T) {
			prefix := newPrefix()
			l, s := a.ledger(t, prefix, "one")
			for n := range 40 {
				bind(t, l, owner(n))
			}
			err := l.Update(t.Context(), func(tx *ledger.Tx) error {
				tx.PutObject(ledger.Object{Owner: owner(1), Origin: "api", Spec: []byte("x")})
				tx.PutMark(ledger.Mark{Kind: ledger.MarkDrain, Name: "a/b/c"})
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			other, late := a.ledger(t, prefix, "two")
			before := l.State()
			lose(prefix)
			_, err = s.Load(t.Context())
			wantErr(t, "load", err, ledger.ErrLost, a, prefix)
			_, err = s.Watch(t.Context(), l.Generation()+1)
			wantErr(t, "watch", err, ledger.ErrLost, a, prefix)
			if name != "addresses" && name != "an owner" { // nobody has looked there
				_, _, err = l.Bind(t.Context(), []ledger.Wish{wish(owner(99), "127.130.0.0/16")}, "test")
				wantErr(t, "a write", err, ledger.ErrLost, a, prefix)
			}
			same(t, "in memory", before, l.State())
			if err := l.Restore(t.Context()); err != nil {
				t.Fatal(err)
			}
			if l.Generation() <= before.Generation {
				t.Errorf("generation %d after %d", l.Generation(), before.Generation)
			}
			before.Generation = l.Generation()
			same(t, "restored", before, load(t, a.store(t, prefix, "three")))
			state, err := late.Watch(t.Context(), other.Generation())
			if err != nil {
				t.Fatal(err)
			}
			if changed, err := other.Adopt(state); err != nil || !changed {
				t.Error(changed, err)
			}
			same(t, "the other", before, other.State())
			bind(t, other, owner(99))
			// A second repair finds nothing to do, and hears what is new.
			if err := l.Restore(t.Context()); err != nil || l.Generation() != other.Generation() {
				t.Errorf("%v, generation %d, want %d", err, l.Generation(), other.Generation())
			}
			agree(t, []*ledger.Ledger{l, other}, s)
		})
	}
}

// TestHalfARestorationIsNoLedger: nobody reads or writes it, and once its writer
// is dead the next one begins again.
func TestHalfARestorationIsNoLedger(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	l, one := a.ledger(t, prefix, "one")
	for n := range 60 {
		bind(t, l, owner(n))
	}
	other, _ := a.ledger(t, prefix, "two")
	fresh := a.store(t, prefix, "fresh")
	a.del(t, prefix, true)
	load(t, fresh) // it sees an empty prefix, just before

	ctx := t.Context()
	one.forget(one.session) // its key is gone
	session, err := one.ensure(ctx)
	if err != nil {
		t.Fatal(err)
	}
	pairs, err := one.list(ctx)
	if err != nil {
		t.Fatal(err)
	}
	r, err := one.restoration(pairs, session)
	if err != nil {
		t.Fatal(err)
	}
	want, err := one.wanted(l.State())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.begin(ctx), r.fill(ctx, want)); err != nil {
		t.Fatal(err)
	}
	for what, s := range map[string]*Store{"the writer": one, "another": fresh} {
		_, err := s.Load(ctx)
		wantErr(t, what, err, ledger.ErrLost, a, "restoring", "one")
	}
	err = fresh.Apply(ctx, ledger.Batch{Generation: 1, PutMarks: []ledger.Mark{{Kind: "drain", Name: "x"}}})
	wantErr(t, "a write in between", err, ledger.ErrConflict, a)
	wantErr(t, "a second restorer", other.Restore(ctx), ledger.ErrLost, a, "restoring")
	if _, err := a.client.Session().Destroy(session, nil); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "the end of a dead one", r.end(ctx, want), ledger.ErrSessionLost, a)
	if err := other.Restore(ctx); err != nil {
		t.Fatal(err)
	}
	same(t, "restored", other.State(), load(t, fresh))
	if len(other.Records()) != 60 {
		t.Errorf("%d records", len(other.Records()))
	}
}

// TestConsulRestarts with its data: all goes on. And without: what is in memory
// is written again.
func TestConsulRestarts(t *testing.T) {
	t.Parallel() // it waits most of the time
	a := newAgent(t, t.TempDir())
	defer a.stop()
	prefix := newPrefix()
	l, s := a.ledger(t, prefix, "one")
	other, late := a.ledger(t, prefix, "two")
	for n := range 20 {
		bind(t, l, owner(n))
	}
	a.stop()
	_, _, err := l.Bind(t.Context(), []ledger.Wish{wish(owner(20), "127.130.0.0/16")}, "test")
	wantErr(t, "without Consul", err, nil, a, prefix)
	if len(l.Records()) != 20 {
		t.Errorf("%d records", len(l.Records()))
	}
	a.start(t)
	until(t, "a write after the restart", func() error {
		_, _, err := l.Bind(t.Context(), []ledger.Wish{wish(owner(20), "127.130.0.0/16")}, "test")
		return err
	})
	if l.Generation() != 21 {
		t.Errorf("generation %d", l.Generation())
	}
	agree(t, []*ledger.Ledger{l, other}, late)

	a.stop()
	if err := os.RemoveAll(filepath.Join(a.dir, "data")); err != nil {
		t.Fatal(err)
	}
	a.start(t)
	_, err = s.Load(t.Context())
	wantErr(t, "load after a wipe", err, ledger.ErrLost, a, prefix)
	_, _, err = l.Bind(t.Context(), []ledger.Wish{wish(owner(21), "127.130.0.0/16")}, "test")
	wantErr(t, "a write after a wipe", err, ledger.ErrLost, a, prefix)
	before := l.State()
	// Both find out, and both repair; one of them is first.
	var g errgroup.Group
	for _, each := range []*ledger.Ledger{l, other} {
		g.Go(func() error { return eventually(func() error { return each.Restore(t.Context()) }) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	before.Generation = l.Generation()
	same(t, "restored", before, load(t, late))
	same(t, "restored", before, other.State())
	bind(t, l, owner(21))
	agree(t, []*ledger.Ledger{l, other}, late)
}
