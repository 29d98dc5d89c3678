package drain

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/roostmesh/roost/cmd/internal/replicas"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// fake is proxies and replicas whose state a test changes. The real ones are in
// cmd/internal/e2e; these fail in ways that real ones do not on demand.
type fake struct {
	mu       sync.Mutex
	acked    uint64
	busy     map[string]uint64
	silent   []string
	behind   []string
	rejected []xds.Rejected
	holders  []xds.Holder
	watched  int
	others   []replicas.Other
	closed   string
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) WatchLoad(clusters ...string) func() {
	f.set(func() { f.watched += len(clusters) })
	return func() { f.set(func() { f.watched -= len(clusters) }) }
}

func (f *fake) InFlight(time.Time, ...xds.Target) (map[string]uint64, []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.busy, f.silent
}

func (f *fake) Behind(uint64) []string { f.mu.Lock(); defer f.mu.Unlock(); return f.behind }

func (f *fake) Proxies() []xds.ProxyStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []xds.ProxyStatus{{ID: "node~h1", Rejected: f.rejected}}
}

func (f *fake) Holders(envoy.Type, func(string) bool) []xds.Holder {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.holders
}

func (f *fake) Others() ([]replicas.Other, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.others, true
}
func (f *fake) Poke() {}

// run starts a Drain of acme/shop/a in Snapshot 7 with ten seconds.
func (f *fake) run(ctx context.Context, closes bool, mark uint64) *Drain {
	s := &lb.Service{Key: lb.Key{Tenant: "acme", Service: "shop"}, Ports: []lb.Port{{PortSpec: lb.PortSpec{Name: "tcp", Port: 80}}}}
	if closes {
		s.DrainCheck = netip.MustParseAddrPort("127.0.0.1:1")
	}
	e := &lb.Endpoint{Instance: &discovery.Instance{ID: "a", Key: s.Key}, At: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80")}}
	d := New(Config{
		Proxies: f, Replicas: f, Outcomes: NewOutcomes(),
		Acked: func() uint64 { f.mu.Lock(); defer f.mu.Unlock(); return f.acked },
		Close: func(_ context.Context, instance string) error {
			f.set(func() { f.closed, f.busy = instance, nil })
			return nil
		},
	}, Wish{Version: 7, Service: s, Endpoint: e, Timeout: 10 * time.Second, Mark: mark})
	go func() { _ = d.Run(ctx) }()
	return d
}

func TestDrain(t *testing.T) {
	const name = "acme/shop/a"
	for what, c := range map[string]struct {
		start  *fake
		closes bool
		mark   uint64
		later  func(*fake) // after a second
		want   Result
		took   time.Duration
	}{
		"at once":        {start: &fake{acked: 7}, want: Result{Drained: true}},
		"a late ACK":     {start: &fake{acked: 6}, later: func(f *fake) { f.acked = 8 }, want: Result{Drained: true}, took: time.Second},
		"in flight":      {start: &fake{acked: 7, busy: map[string]uint64{"p": 2}}, later: func(f *fake) { f.busy = nil }, want: Result{Drained: true}, took: time.Second},
		"a late report":  {start: &fake{acked: 7, silent: []string{"p"}}, later: func(f *fake) { f.silent = nil }, want: Result{Drained: true}, took: time.Second},
		"never an ACK":   {start: &fake{acked: 6, behind: []string{"p"}}, want: Result{TimedOut: true, Waiting: []string{"proxy p has not confirmed"}}, took: 10 * time.Second},
		"never a report": {start: &fake{acked: 7, silent: []string{"p"}}, want: Result{TimedOut: true, Unknown: []string{"p"}}, took: 10 * time.Second},
		"never quiet":    {start: &fake{acked: 7, busy: map[string]uint64{"p": 2, "q": 1}}, want: Result{TimedOut: true, InFlight: 3}, took: 10 * time.Second},
		"closed":         {start: &fake{acked: 7, busy: map[string]uint64{"p": 2}}, closes: true, mark: 1, want: Result{Drained: true, TimedOut: true}, took: 10 * time.Second},
		"a refusal":      {start: &fake{acked: 7, rejected: []xds.Rejected{{Name: envoy.Name{Type: envoy.Endpoint, Name: "shop.acme:tcp"}, Message: "no"}}}, want: Result{Waiting: []string{"proxy node~h1 refuses the change: no"}}},
		"gone for long":  {start: &fake{acked: 7, holders: []xds.Holder{{ID: "p"}}}, want: Result{Drained: true, Gone: []string{"p"}}},
		"a replica": {start: &fake{acked: 7, others: []replicas.Other{{Name: "h2"}}}, mark: 4, later: func(f *fake) {
			f.others = []replicas.Other{{Name: "h2", Urgent: []byte(`{"acme/shop/a": {"generation": 4, "done": true}}`)}}
		}, want: Result{Drained: true}, took: time.Second},
		"a replica's proxy": {start: &fake{acked: 7, others: []replicas.Other{{Name: "h2", Urgent: []byte(`{"acme/shop/a": {"generation": 4, "done": true, "waiting": ["proxy q has not confirmed"], "in_flight": 1}}`)}}}, mark: 4, want: Result{TimedOut: true, InFlight: 1, Waiting: []string{"proxy q has not confirmed"}}},
		"an older drain":    {start: &fake{acked: 7, others: []replicas.Other{{Name: "h2", Urgent: []byte(`{"acme/shop/a": {"generation": 3, "done": true}}`)}}}, mark: 4, want: Result{TimedOut: true, Waiting: []string{"replica h2 has not confirmed"}}, took: 12 * time.Second},
		"of this one alone": {start: &fake{acked: 7, others: []replicas.Other{{Name: "h2"}}}, want: Result{Drained: true}},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := c.start
				d := f.run(t.Context(), c.closes, c.mark)
				if c.later != nil {
					time.AfterFunc(time.Second, func() { f.set(func() { c.later(f) }) })
				}
				got, err := d.Result(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				c.want.Instance = name
				if diff := cmp.Diff(c.want, got, cmpopts.EquateEmpty(), cmpopts.IgnoreFields(Result{}, "Took")); diff != "" {
					t.Error(diff)
				}
				if late := time.Duration(got.Took*float64(time.Second)) - c.took; late < -pollEvery || late > 2*pollEvery {
					t.Errorf("took %v s, want %s", got.Took, c.took)
				}
				if c.closes != (f.closed == name) || f.watched != 0 {
					t.Errorf("closed %q, still watches %d", f.closed, f.watched)
				}
			})
		})
	}
}

// TestGivenUp: who waits is told why there is nothing to wait for any more.
func TestGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		d := (&fake{}).run(ctx, false, 0)
		time.AfterFunc(time.Second, func() { cancel(ErrGivenUp) })
		if _, err := d.Result(t.Context()); !errors.Is(err, ErrGivenUp) {
			t.Error(err)
		}
	})
}
