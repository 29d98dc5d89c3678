package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var exact = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// TestOneUpdateIsOneBatch: all of it is there, or, after an error, nothing.
func TestOneUpdateIsOneBatch(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "a.db")
	l, b := open(t, path)
	shop, cart, p := Owner{"acme", "shop"}, Owner{"acme", "cart"}, pool("127.130.0.0/24")
	err := l.Update(ctx, func(tx *Tx) error {
		tx.Bind([]Wish{{shop, p}, {cart, p}, {shop, p}}, "test")
		if n := len(tx.Records()); n != 2 {
			return fmt.Errorf("the transaction shows %d records", n)
		}
		tx.PutObject(Object{Owner: shop, Origin: "api", Spec: []byte("{}")})
		tx.PutMark(Mark{Kind: MarkDrain, Name: "acme/shop/1@h1", Data: json.RawMessage(`{"by":"ada"}`)})
		tx.PutMark(Mark{Kind: MarkRelease, Name: "consul"})
		return nil
	})
	if err != nil || l.Generation() != 1 {
		t.Fatalf("generation %d: %v", l.Generation(), err)
	}
	before := l.State()
	failed := errors.New("thought better of it")
	if err := l.Update(ctx, func(tx *Tx) error {
		tx.Release(shop, "test")
		tx.DeleteObject(shop)
		tx.DeleteMark(MarkKey{MarkRelease, "consul"})
		if _, ok := tx.Object(shop); ok || len(tx.Marks()) != 1 || len(tx.Objects()) != 0 {
			return errors.New("the transaction does not show its own changes")
		}
		return failed
	}); !errors.Is(err, failed) {
		t.Fatal(err)
	}
	_ = b.Close()
	again, b := open(t, path)
	defer func() { _ = b.Close() }()
	for _, got := range []State{l.State(), again.State()} {
		if d := cmp.Diff(before, got, exact); d != "" {
			t.Error(d)
		}
	}
	if o := before.Objects[0]; o.Generation != 1 || before.Marks[0].Generation != 1 || before.Marks[0].Since.IsZero() {
		t.Errorf("generations: %+v %+v", o, before.Marks)
	}
	// What says nothing new is no change.
	if err := again.Update(ctx, func(tx *Tx) error {
		tx.PutObject(Object{Owner: shop, Origin: "api", Spec: []byte("{}")})
		tx.PutMark(Mark{Kind: MarkRelease, Name: "consul"})
		tx.Bind([]Wish{{shop, p}}, "again")
		return nil
	}); err != nil || again.Generation() != 1 {
		t.Errorf("generation %d after nothing: %v", again.Generation(), err)
	}
}

// TestFreeIsForWhatIsQuarantined: and the address goes to others from the next
// transaction on only.
func TestFreeIsForWhatIsQuarantined(t *testing.T) {
	ctx := t.Context()
	l, b := open(t, filepath.Join(t.TempDir(), "a.db"))
	defer func() { _ = b.Close() }()
	p := pool("127.130.0.8/32")
	shop, cart := Owner{"acme", "shop"}, Owner{"globex", "cart"}
	at := bindOne(t, l, shop, p).Address
	err := l.Update(ctx, func(tx *Tx) error {
		if tx.Free(at) {
			return errors.New("a bound address was freed")
		}
		tx.Release(shop, "deleted")
		if !tx.Free(at) || tx.Free(at) {
			return errors.New("a quarantined address was not freed, or twice")
		}
		if _, ok := tx.Lookup(shop, Internal, false); ok {
			return errors.New("the freed record is still there")
		}
		if _, refused := tx.Bind([]Wish{{cart, p}}, "test"); len(refused) != 1 {
			return errors.New("a freed address was given in the same transaction")
		}
		if bound, _ := tx.Bind([]Wish{{shop, p}}, "test"); len(bound) != 1 || bound[0].Address != at {
			return fmt.Errorf("its owner did not get it back: %v", bound)
		}
		tx.Release(shop, "deleted")
		tx.Free(at)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Records()) != 0 {
		t.Fatalf("%+v", l.Records())
	}
	if got := bindOne(t, l, cart, p); got.Address != at {
		t.Errorf("%s, want %s", got.Address, at)
	}
}

func TestPools(t *testing.T) {
	owner := func(n int) Owner { return Owner{"t", fmt.Sprint("s", n)} }
	for _, c := range []struct {
		cidr    string
		exclude []string
		size    int
	}{
		{"127.130.0.0/24", nil, 254},
		{"127.130.0.0/28", []string{"127.130.0.1", "127.130.0.14", "10.0.0.1"}, 12},
		{"127.130.0.4/30", []string{"127.130.0.5", "127.130.0.6"}, 0},
		{"127.130.0.6/31", nil, 2},
		{"127.130.0.7/32", nil, 1},
		{"127.130.0.7/32", []string{"127.130.0.7"}, 0},
		{"fd00::/120", nil, 255},
		{"fd00::/126", []string{"fd00::2"}, 2},
		{"fd00::6/127", nil, 2},
		{"fd00::7/128", nil, 1},
	} {
		t.Run(fmt.Sprint(c.cidr, c.exclude), func(t *testing.T) {
			l, b := open(t, filepath.Join(t.TempDir(), "a.db"))
			defer func() { _ = b.Close() }()
			p := pool(c.cidr)
			for _, e := range c.exclude {
				p.Exclude = append(p.Exclude, netip.MustParseAddr(e))
			}
			if p.Size().Int64() != int64(c.size) {
				t.Errorf("size %s, want %d", p.Size(), c.size)
			}
			var wishes []Wish
			for n := range c.size + 3 {
				wishes = append(wishes, Wish{owner(n), p})
			}
			bound, refused, err := l.Bind(t.Context(), wishes, "test")
			if err != nil || len(bound) != c.size || len(refused) != 3 {
				t.Fatalf("bound %d, refused %d, want %d and 3: %v", len(bound), len(refused), c.size, err)
			}
			seen := map[netip.Addr]bool{}
			for _, r := range l.Records() {
				if seen[r.Address] || !p.Prefix.Contains(r.Address) {
					t.Errorf("%s given twice or outside", r.Address)
				}
				seen[r.Address] = true
			}
			for _, e := range p.Exclude {
				if seen[e] {
					t.Errorf("excluded %s was given", e)
				}
			}
			want := fmt.Sprintf("pool %s of %s has no free address, %d of %d are used", c.cidr, c.cidr, c.size, c.size)
			if e := refused[0].Err; !errors.Is(e, ErrPoolFull) || !strings.Contains(e.Error(), want) {
				t.Errorf("%v, want %q", e, want)
			}
		})
	}
}

// TestSeveralPools: an owner has one internal address of each family, and one of
// a dedicated pool beside it; a pool that shrinks or goes takes nothing away.
func TestSeveralPools(t *testing.T) {
	ctx := t.Context()
	l, b := open(t, filepath.Join(t.TempDir(), "a.db"))
	defer func() { _ = b.Close() }()
	shop := Owner{"acme", "shop"}
	vip := Pool{Name: "vip", Kind: Dedicated, Prefix: netip.MustParsePrefix("192.0.2.0/28")}
	wishes := []Wish{{shop, pool("127.130.0.0/16")}, {shop, pool("127.140.0.0/16")}, {shop, pool("fd00::/64")}, {shop, vip}}
	bound, refused, err := l.Bind(ctx, wishes, "test")
	if err != nil || len(bound) != 3 || len(refused) != 0 {
		t.Fatalf("%v %v %v", bound, refused, err)
	}
	v4, _ := l.Lookup(shop, Internal, false)
	v6, _ := l.Lookup(shop, Internal, true)
	ip, _ := l.Lookup(shop, Dedicated, false)
	if v4.Pool != "127.130.0.0/16" || !v6.Address.Is6() || ip.Pool != "vip" || !vip.Prefix.Contains(ip.Address) {
		t.Fatalf("%+v %+v %+v", v4, v6, ip)
	}
	// The pools of tomorrow: a smaller one, and another in the place of the third.
	for _, w := range []Wish{{shop, pool("127.130.255.0/30")}, {shop, pool("fd01::/64")}} {
		if bound, _, err := l.Bind(ctx, []Wish{w}, "test"); err != nil || len(bound) != 0 {
			t.Errorf("moved to %v %v", bound, err)
		}
	}
	if gone, err := l.Release(ctx, shop, "test", Dedicated); err != nil || len(gone) != 1 || gone[0].Generation != l.Generation() {
		t.Errorf("release: %+v %v", gone, err)
	}
	back, _, err := l.Bind(ctx, []Wish{{shop, Pool{Name: "vip", Kind: Dedicated, Prefix: netip.MustParsePrefix("198.51.100.0/24")}}}, "test")
	if err != nil || len(back) != 1 || back[0].Address != ip.Address {
		t.Errorf("from quarantine: %+v %v, want %s", back, err, ip.Address)
	}
}

// TestTenThousandServices: a large change costs no more than its size, and a
// reader of the list gets what was true at one moment.
func TestTenThousandServices(t *testing.T) {
	l, b := open(t, filepath.Join(t.TempDir(), "a.db"))
	defer func() { _ = b.Close() }()
	var wishes []Wish
	for n := range 10000 {
		wishes = append(wishes, Wish{Owner{"t", fmt.Sprint("s", n)}, pool("127.128.0.0/18")})
	}
	start := time.Now()
	if _, refused, err := l.Bind(t.Context(), wishes, "test"); err != nil || len(refused) > 0 {
		t.Fatal(err, refused)
	}
	all := time.Since(start)
	start = time.Now()
	for n := range 200 {
		if _, err := l.Release(t.Context(), wishes[n].Owner, "test"); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("10,000 bound in %v, then 200 single changes in %v", all, time.Since(start))
	if all > 10*time.Second { // it takes 0.1 s; ten seconds say that something is quadratic
		t.Errorf("10,000 services took %v", all)
	}
	if n := len(l.Records()); n != 10000 {
		t.Errorf("%d records", n)
	}
}

// TestRecordsForEverybody reads the list while it changes.
func TestRecordsForEverybody(t *testing.T) {
	l, err := Open(t.Context(), Memory{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for last := 0; ctx.Err() == nil; {
				list := l.Records()
				if len(list) < last {
					t.Errorf("%d records after %d", len(list), last)
				}
				for n := 1; n < len(list); n++ {
					if !list[n-1].Address.Less(list[n].Address) {
						t.Errorf("%s before %s", list[n-1].Address, list[n].Address)
					}
				}
				last = len(list)
			}
		})
	}
	for n := range 1500 {
		bindOne(t, l, Owner{"t", fmt.Sprint("s", n)}, pool("127.128.0.0/16"))
	}
	stop()
	wg.Wait()
	if n := len(l.Records()); n != 1500 {
		t.Errorf("%d records", n)
	}
}

func TestAdopt(t *testing.T) {
	l, err := Open(t.Context(), Memory{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	rec := func(service, at string) Record {
		return Record{Address: netip.MustParseAddr(at), Kind: Internal, Owner: Owner{"t", service}, State: Bound}
	}
	good := State{Generation: 5, Records: []Record{rec("b", "127.0.0.2"), rec("a", "127.0.0.1")}, Objects: []Object{{Owner: Owner{"t", "a"}}}, Marks: []Mark{{Kind: MarkDrain, Name: "x"}}}
	if changed, err := l.Adopt(good); !changed || err != nil {
		t.Fatal(changed, err)
	}
	if changed, err := l.Adopt(good); changed || err != nil {
		t.Errorf("the same again: %v %v", changed, err)
	}
	for _, c := range []struct {
		state State
		want  string
		is    error
	}{
		{State{Generation: 4}, "generation 4 is lower than 5", ErrOlder},
		{State{Generation: 6, Records: []Record{rec("a", "127.0.0.1"), rec("b", "127.0.0.1")}}, "127.0.0.1 has two owners, t/a and t/b", nil},
		{State{Generation: 6, Records: []Record{rec("a", "127.0.0.1"), rec("a", "127.0.0.2")}}, "t/a has two internal addresses", nil},
	} {
		if changed, err := l.Adopt(c.state); changed || err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%v %v, want %q", changed, err, c.want)
		}
	}
	if l.Generation() != 5 || len(l.Records()) != 2 || l.Records()[0].Owner.Service != "a" || len(l.Marks()) != 1 || len(l.Objects()) != 1 || l.Foreign() != 1 {
		t.Errorf("%+v, %d adoptions", l.State(), l.Foreign())
	}
}

// stubborn is a store of which another writer is always first.
type stubborn struct {
	Memory
	applied int
	err     error
}

func (s *stubborn) Apply(context.Context, Batch) error {
	s.applied++
	return fmt.Errorf("store: %w", s.err)
}

func TestUpdateGivesUp(t *testing.T) {
	for _, c := range []struct {
		err   error
		tries int
	}{{ErrConflict, 0}, {ErrSessionLost, 1}, {fmt.Errorf("%w: %w", ErrLost, ErrConflict), 1}} {
		s := &stubborn{err: c.err}
		l, err := Open(t.Context(), s, nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		_, _, err = l.Bind(ctx, []Wish{{Owner{"t", "s"}, pool("127.0.0.0/24")}}, "test")
		cancel()
		if !errors.Is(err, c.err) || c.tries > 0 && s.applied != c.tries || len(l.Records()) != 0 {
			t.Errorf("%v after %d tries", err, s.applied)
		}
	}
}

// narrow is a store with a limit, which it lowers once.
type narrow struct {
	Memory
	limit   int
	batches []Batch
}

func (s *narrow) Limit() Limit { return Limit{s.limit, 4000} }

func (s *narrow) Apply(_ context.Context, b Batch) error {
	if n := 2*len(b.Put) + len(b.PutObjects) + len(b.PutMarks); n > 20 {
		s.limit = 20
		return ErrTooLarge
	}
	s.batches = append(s.batches, b)
	return nil
}

// TestALargeChangeIsASequence of whole records.
func TestALargeChangeIsASequence(t *testing.T) {
	s := &narrow{limit: 50}
	l, err := Open(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = l.Update(t.Context(), func(tx *Tx) error {
		for n := range 100 {
			tx.Bind([]Wish{{crashName(n), pool("127.130.0.0/16")}}, "test")
		}
		tx.PutObject(Object{Owner: crashName(0), Spec: make([]byte, 5000)}) // larger than the limit on its own
		tx.PutObject(Object{Owner: crashName(1), Spec: make([]byte, 10)})
		tx.PutMark(Mark{Kind: MarkDrain, Name: "x"})
		return nil
	})
	if err != nil || len(l.Records()) != 100 || len(l.Objects()) != 2 || len(l.Marks()) != 1 {
		t.Fatalf("%v: %d records, %d objects", err, len(l.Records()), len(l.Objects()))
	}
	records := 0
	for n, b := range s.batches {
		if b.Generation != uint64(n+1) || b.After != uint64(n) {
			t.Errorf("batch %d is generation %d after %d", n, b.Generation, b.After)
		}
		records += len(b.Put)
	}
	if records != 100 || l.Generation() != uint64(len(s.batches)) || len(s.batches) < 11 {
		t.Errorf("%d records in %d batches, generation %d", records, len(s.batches), l.Generation())
	}
}
