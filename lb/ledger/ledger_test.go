package ledger

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func pool(cidr string) Pool {
	return Pool{Name: cidr, Kind: Internal, Prefix: netip.MustParsePrefix(cidr)}
}

func crashName(n int) Owner { return Owner{"t", fmt.Sprint("s", n)} }

func open(t interface {
	Helper()
	Fatalf(string, ...any)
}, path string) (*Ledger, *Bolt) {
	t.Helper()
	b, err := OpenBolt(path)
	if err != nil {
		t.Fatalf("%v", err)
	}
	l, err := Open(context.Background(), b, func() time.Time { return time.Unix(1700000000, 0).UTC() })
	if err != nil {
		t.Fatalf("%v", err)
	}
	return l, b
}

func bindOne(t *testing.T, l *Ledger, o Owner, p Pool) Record {
	t.Helper()
	_, refused, err := l.Bind(context.Background(), []Wish{{o, p}}, "test")
	if err != nil || len(refused) > 0 {
		t.Fatalf("bind %s: %v %v", o, err, refused)
	}
	r, ok := l.Lookup(o, p.Kind, p.Prefix.Addr().Is6())
	if !ok {
		t.Fatalf("%s has no address after Bind", o)
	}
	return r
}

func TestAddressSurvivesReopenAndIsTheSameEverywhere(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	shop, p := Owner{"acme", "shop"}, pool("127.128.0.0/9")
	l, b := open(t, filepath.Join(dir, "a.db"))
	first := bindOne(t, l, shop, p)
	if !p.Prefix.Contains(first.Address) || first.Probed || first.Generation != 1 {
		t.Fatalf("first record: %+v", first)
	}
	if _, err := l.Release(ctx, shop, "deleted"); err != nil {
		t.Fatal(err)
	}
	if r, _ := l.Lookup(shop, Internal, false); r.State != Quarantined || r.Generation != 2 {
		t.Fatalf("after release: %+v", r)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	l, b = open(t, filepath.Join(dir, "a.db"))
	defer func() { _ = b.Close() }()
	if again := bindOne(t, l, shop, p); again.Address != first.Address || again.Generation != 3 {
		t.Fatalf("created again: %+v, was %+v", again, first)
	}
	other, b2 := open(t, filepath.Join(dir, "b.db"))
	defer func() { _ = b2.Close() }()
	if elsewhere := bindOne(t, other, shop, p); elsewhere.Address != first.Address {
		t.Fatalf("another ledger derives %s, this one %s", elsewhere.Address, first.Address)
	}
}

func TestPoolFullNamesThePool(t *testing.T) {
	l, b := open(t, filepath.Join(t.TempDir(), "a.db"))
	defer func() { _ = b.Close() }()
	p := pool("127.130.0.0/29")
	p.Exclude = []netip.Addr{netip.MustParseAddr("127.130.0.3")}
	var wishes []Wish
	for n := range 6 {
		wishes = append(wishes, Wish{Owner{"acme", fmt.Sprint("s", n)}, p})
	}
	bound, refused, err := l.Bind(context.Background(), wishes, "test")
	if err != nil {
		t.Fatal(err)
	}
	if len(bound) != 5 || len(refused) != 1 {
		t.Fatalf("bound %d, refused %d; want 5 and 1", len(bound), len(refused))
	}
	if e := refused[0].Err; !errors.Is(e, ErrPoolFull) || !strings.Contains(e.Error(), "127.130.0.0/29") {
		t.Fatalf("message: %v", e)
	}
	for _, r := range l.Records() {
		if r.Address == p.Exclude[0] {
			t.Fatalf("excluded address was given: %+v", r)
		}
	}
}

// TestMemoryIsWhatTheStoreHas drives two ledgers of one store at random, Free
// and marks included: what each shows is what is written, whoever was first, and
// an address has left quarantine before it changes hands.
func TestMemoryIsWhatTheStoreHas(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		ctx := context.Background()
		path := filepath.Join(dir, "rapid.db")
		_ = os.Remove(path)
		l, b := open(rt, path)
		defer func() { _ = b.Close() }()
		other, err := Open(ctx, b, nil)
		if err != nil {
			rt.Fatalf("%v", err)
		}
		both, p, held := []*Ledger{l, other}, pool("127.128.0.0/29"), map[netip.Addr]Owner{}
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			who := both[rapid.IntRange(0, 1).Draw(rt, "ledger")]
			type op struct{ kind, service int }
			ops := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) op {
				return op{rapid.IntRange(0, 5).Draw(rt, "kind"), rapid.IntRange(0, 9).Draw(rt, "service")}
			}), 1, 5).Draw(rt, "ops")
			freed := map[netip.Addr]bool{}
			err := who.Update(ctx, func(tx *Tx) error {
				clear(freed)
				for _, op := range ops {
					o := crashName(op.service)
					switch op.kind {
					case 0, 1:
						tx.Bind([]Wish{{o, p}}, "test")
					case 2:
						tx.Release(o, "test")
					case 3:
						if r, ok := tx.Lookup(o, Internal, false); ok && tx.Free(r.Address) {
							freed[r.Address] = true
						}
					case 4:
						tx.PutMark(Mark{Kind: MarkDrain, Name: o.Service})
						tx.PutObject(Object{Owner: o, Origin: o.Service})
					default:
						tx.DeleteMark(MarkKey{MarkDrain, o.Service})
						tx.DeleteObject(o)
					}
				}
				return nil
			})
			if err != nil {
				rt.Fatalf("%v", err)
			}
			written, err := Open(ctx, b, nil)
			if err != nil {
				rt.Fatalf("%v", err)
			}
			// One that changed nothing may not have heard of the other yet.
			if _, err := who.Adopt(written.State()); err != nil {
				rt.Fatalf("%v", err)
			}
			if d := cmp.Diff(written.State(), who.State(), exact); d != "" {
				rt.Fatalf("%s", d)
			}
			now := map[netip.Addr]Owner{}
			for _, r := range who.Records() {
				now[r.Address] = r.Owner
				if was, ok := held[r.Address]; ok && was != r.Owner {
					rt.Fatalf("%s went from %s to %s", r.Address, was, r.Owner)
				}
			}
			for a := range held {
				if _, ok := now[a]; !ok && !freed[a] {
					rt.Fatalf("%s is gone and was not freed", a)
				}
			}
			held = now
		}
	})
}

func TestSecondProcessIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	_, b := open(t, path)
	defer func() { _ = b.Close() }()
	if _, err := OpenBolt(path); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Fatalf("second open: %v", err)
	}
}

func TestForeignFileIsRefusedAndKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	junk := []byte(strings.Repeat("not a ledger ", 2000))
	if err := os.WriteFile(path, junk, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Fatalf("foreign file: %v", err)
	}
	if now, _ := os.ReadFile(path); string(now) != string(junk) {
		t.Fatal("the foreign file was changed")
	}
}

// TestTheSecondWriterAdoptsAndTriesAgain: its first try is refused, and what it
// writes then fits what the first has written.
func TestTheSecondWriterAdoptsAndTriesAgain(t *testing.T) {
	ctx := t.Context()
	l, b := open(t, filepath.Join(t.TempDir(), "a.db"))
	defer func() { _ = b.Close() }()
	late, err := Open(ctx, b, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := pool("127.130.0.0/31")
	first := bindOne(t, l, Owner{"acme", "shop"}, p)
	second := bindOne(t, late, Owner{"globex", "shop"}, p)
	if second.Address == first.Address || second.Generation != 2 || late.Foreign() != 1 || len(late.Records()) != 2 {
		t.Fatalf("%+v, then %+v; %d adoptions", first, second, late.Foreign())
	}
	if got, ok := late.Lookup(first.Owner, Internal, false); !ok || got != first {
		t.Fatalf("the late one knows %+v, want %+v", got, first)
	}
}

// TestNoAddressHasTwoOwners drives the ledger at random: an address once given
// is never given to another service, and a bound one never changes.
func TestNoAddressHasTwoOwners(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		ctx := context.Background()
		path := filepath.Join(dir, "rapid.db")
		_ = os.Remove(path)
		l, b := open(rt, path)
		defer func() { _ = b.Close() }()
		p, owners, had := pool("127.128.0.0/27"), map[netip.Addr]Owner{}, map[Owner]netip.Addr{}
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			o := Owner{"t", rapid.StringMatching("[a-d][0-9]").Draw(rt, "service")}
			if rapid.Bool().Draw(rt, "bind") {
				if _, _, err := l.Bind(ctx, []Wish{{o, p}}, "test"); err != nil {
					rt.Fatalf("bind: %v", err)
				}
			} else if _, err := l.Release(ctx, o, "test"); err != nil {
				rt.Fatalf("release: %v", err)
			}
			for _, r := range l.Records() {
				if was, ok := owners[r.Address]; ok && was != r.Owner {
					rt.Fatalf("%s went from %s to %s", r.Address, was, r.Owner)
				}
				if was, ok := had[r.Owner]; ok && was != r.Address {
					rt.Fatalf("%s moved from %s to %s", r.Owner, was, r.Address)
				}
				owners[r.Address], had[r.Owner] = r.Owner, r.Address
			}
		}
	})
}
