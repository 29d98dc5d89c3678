package ledger

import (
	"context"
	"fmt"
	"slices"
	"testing"
)

// These are failures of other meshes, by the thread that reports them.

// TestIstio44837: what comes and goes beside an entry, in whatever order, does
// not shift its address.
func TestIstio44837(t *testing.T) {
	ctx, p := context.Background(), pool("127.128.0.0/26")
	l, err := Open(ctx, Memory{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	stays := map[Owner]Record{}
	for n := range 10 {
		stays[crashName(n)] = bindOne(t, l, crashName(n), p)
	}
	for round := range 5 {
		for n := range 40 {
			bindOne(t, l, crashName(100+(n*7+round)%40), p)
		}
		err := l.Update(ctx, func(tx *Tx) error {
			for n := range 40 {
				if n%(round+2) == 0 {
					for _, r := range tx.Release(crashName(100+n), "deleted") {
						tx.Free(r.Address)
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for o, was := range stays {
			if now, ok := l.Lookup(o, Internal, false); !ok || now != was {
				t.Errorf("round %d: %s has %+v, it was %+v", round, o, now, was)
			}
		}
	}
}

// TestIstio43858: two ledgers that were given the same services in different
// orders agree on each, but where hashes collide; the record says so then.
func TestIstio43858(t *testing.T) {
	ctx, p := context.Background(), pool("127.128.0.0/24")
	var wishes []Wish
	for n := range 60 {
		wishes = append(wishes, Wish{Owner{"acme", fmt.Sprint("s", n)}, p})
	}
	fill := func(wishes []Wish) *Ledger {
		l, err := Open(ctx, Memory{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range wishes {
			bindOne(t, l, w.Owner, w.Pool)
		}
		return l
	}
	one := fill(wishes)
	slices.Reverse(wishes)
	two := fill(wishes)
	agreed := 0
	for _, w := range wishes {
		a, _ := one.Lookup(w.Owner, Internal, false)
		b, _ := two.Lookup(w.Owner, Internal, false)
		switch {
		case a.Address == b.Address:
			agreed++
		case !a.Probed && !b.Probed:
			t.Errorf("%s has %s and %s, and neither record says that it was not the first choice", w.Owner, a.Address, b.Address)
		}
	}
	if agreed < 45 || agreed == len(wishes) {
		t.Errorf("%d of %d agree: this pool shows nothing", agreed, len(wishes))
	}
}
