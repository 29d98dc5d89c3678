// Package xds has one job: bring every Envoy to what its view of the newest
// World says, over delta ADS; and gRPC clients, which speak the state of the
// world.
//
// In go Worlds with what changed in them ([Server.Publish]) and the streams of
// proxies; out come responses, and what each proxy holds, refuses and owes.
//
//	s := xds.New(xds.Config{Log: log, Node: "h1", Registry: registry, OnProgress: ...})
//	go s.Run(ctx, xds.Listener{Listener: tcp}, xds.Listener{Listener: unix, Tenant: "acme"})
//	s.Publish(world, change)       // as often as there is a new World; never waits for a proxy
//	s.Proxies()                    // every connected proxy and those of the last hour, by id
//	s.Remember(d)                  // those of longer, too
//	s.Holding(id, envoy.Listener)  // intended against sent, ACKed and refused, with bodies
//	s.Problems()                   // what proxies refuse, and ids that two proxies share
//	s.Holders(envoy.Listener, ...) // who still has a resource, or may have it
//	s.Behind(version)              // who has not settled a World yet
//	s.WatchLoad(cluster)           // asks proxies what is in flight; s.InFlight(...) tells
//
// Streams wait until the first Publish. The order of resources, and what waits
// for what, is in state, which is pure: state.go (what is known of a client),
// subscribe.go (what it asks for, and resumes), push.go (what to send now),
// settle.go (ACK, NACK, retry, progress). It speaks delta; sotw.go translates for
// clients of the other form.
//
// For wildcard types (clusters, listeners) the package takes View.All to list
// exactly what View.Get finds.
//
// Goroutines: each stream has gRPC's handler, which waits for its end, and one
// that receives and handles requests. Run owns a few that push, one for each core,
// and one that calls every hook of Config, in order and without a lock held, so
// that a hook may call the Server; it also retries and forgets. Whoever has a
// stream's lock may touch its state, and never waits for the network: a response
// that might have to is sent by a goroutine of its own. Run returns after all of
// them have ended.
package xds

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// rememberFor is how long a proxy that has gone is listed, and its refusals
	// and what it held are known; Remember makes it longer.
	rememberFor = time.Hour
	// retryEvery is how often listeners are sent again that a proxy's host did
	// not let it bind.
	retryEvery = 15 * time.Second
	// duplicateFor is how long a shared id is reported after the last clash.
	duplicateFor = time.Minute
	// changeNames bounds the names that a lagging stream goes through; beyond it
	// compares its whole view.
	changeNames = 4096
	// lagAtMost is how many Worlds a stream that none of them concerns may stay
	// behind: it keeps the one that it is at.
	lagAtMost = 64
	// hookQueue bounds the events that wait for a hook.
	hookQueue = 1 << 16
)

// Config is what a Server needs. All but Log may be left out.
type Config struct {
	Log  *slog.Logger
	Node string // this host: proxies show it as their control plane

	// Admit completes or refuses the identity that a proxy claims. An error
	// that is a gRPC status goes to the proxy as it is, any other as
	// FailedPrecondition. It runs on the stream's goroutine, after the first
	// Publish.
	Admit func(lb.Identity) (lb.Identity, error)

	// Closing says whether the connections of the instance of an
	// envoy.DrainName are to be closed. It runs on any goroutine.
	Closing func(name string) bool

	Registry   prometheus.Registerer // takes roost_xds_*; nil: none
	Now        func() time.Time      // nil: time.Now
	RetryEvery time.Duration         // 0: 15 s
	Admission  Admission             // bounds on streams; 0 is its default

	// OnAck tells that a proxy has taken endpoints of clusters, as the World of a
	// version has them. It runs on the stream's goroutine and must not wait.
	OnAck func(id string, version uint64, clusters []string)

	// The hooks below run on one goroutine of Run, one at a time.

	OnConnect    func(ProxyStatus)
	OnDisconnect func(ProxyStatus)
	// OnReject tells of a version that a proxy refuses, once per version.
	OnReject func(id string, name envoy.Name, version, message string)
	// OnProgress tells when Pushed or Acked grows; steps in between may be left
	// out.
	OnProgress func(Progress)
}

// edition is a published World, and what has changed in it. Streams follow the
// editions at their own pace, without a lock; those that all have passed are
// garbage.
type edition struct {
	world  envoy.World
	change envoy.Change
	next   atomic.Pointer[edition] // nil for the newest
}

// Progress says how far all connected proxies are, in World versions.
type Progress struct {
	Pushed  uint64 // everything up to it has been sent to every proxy it concerns
	Acked   uint64 // everything up to it is settled: ACKed or NACKed
	Proxies int    // connected streams; with none both are the newest World
}

// Listener is a socket that serves proxies.
type Listener struct {
	net.Listener
	// Tenant, where set, is the only one whose sidecars and gRPC clients are served here.
	Tenant string
}

// Server serves ADS in both forms.
type Server struct {
	// Fixed at construction.
	cfg       Config
	metrics   *metrics
	admission *admission
	ready     chan struct{} // closed by the first Publish
	wake      chan struct{} // one slot: hooks or progress for Run

	tracker  tracker  // has its own lock, taken after mu
	audience audience // has its own lock, taken after mu
	loads    *loads   // has its own lock
	queue    *queue   // has its own lock
	sets     *sets    // has its own lock

	newest atomic.Pointer[edition] // nil before the first Publish; stored with mu held

	mu         sync.Mutex
	live       map[string]*stream   // by proxy id; guarded by mu
	gone       map[string]*stream   // remembered, and not come back; guarded by mu
	duplicates map[string]duplicate // by proxy id; guarded by mu
	remember   time.Duration        // how long gone has a proxy; guarded by mu
	events     []func()             // hooks to call; guarded by mu
	dropped    int                  // events lost to a full queue; guarded by mu
}

// duplicate is an id that a second proxy came with while the first was there.
type duplicate struct{ since, last time.Time }

// New makes a Server. Nothing is started.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.RetryEvery == 0 {
		cfg.RetryEvery = retryEvery
	}
	queue := newQueue()
	return &Server{
		cfg: cfg, metrics: newMetrics(cfg.Registry, queue.depth), admission: newAdmission(cfg.Admission), ready: make(chan struct{}), wake: make(chan struct{}, 1), loads: newLoads(), queue: queue, sets: newSets(),
		live: map[string]*stream{}, gone: map[string]*stream{}, duplicates: map[string]duplicate{}, remember: rememberFor,
	}
}

// Remember has proxies that have gone known for d, where that is longer than
// before: for as long as somebody counts on Holders to name them.
func (s *Server) Remember(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remember = max(s.remember, d)
}

// Publish makes a World the newest; a World that is not newer than the last is
// dropped. It returns at once: proxies that lag behind skip to the newest.
func (s *Server) Publish(w envoy.World, c envoy.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.newest.Load()
	if last != nil && w.Version() <= last.world.Version() {
		s.cfg.Log.Error("xds: world is not newer than the last one and is dropped", "version", w.Version(), "last", last.world.Version())
		return
	}
	now := &edition{world: w, change: c}
	s.newest.Store(now) // a stream that subscribes after this looks at it by itself
	if last == nil {
		close(s.ready)
	} else {
		last.next.Store(now)
	}
	concerned := s.concerned(c)
	marks := make([]*mark, len(concerned))
	for i, st := range concerned {
		marks[i] = st.mark
	}
	s.tracker.publish(w.Version(), marks...)
	s.queue.add(concerned...)
	s.queue.add(s.audience.some(lagAtMost)...)
	s.wakeUp()
}

// concerned lists the streams that have to look at a change. s.mu is held.
func (s *Server) concerned(c envoy.Change) []*stream {
	if c.Views {
		return slices.Collect(maps.Values(s.live))
	}
	out := s.audience.of(c.Names)
	for _, node := range c.Nodes {
		st := s.live[lb.Identity{Role: lb.Node, Node: node}.String()]
		if st != nil && !slices.Contains(out, st) {
			out = append(out, st)
		}
	}
	return out
}

// Run serves on the listeners, calls the hooks and retries until ctx ends or a
// listener fails. The listeners are closed when it returns.
func (s *Server) Run(ctx context.Context, listeners ...Listener) error {
	g, serving := errgroup.WithContext(ctx)
	for _, l := range listeners {
		g.Go(func() error { return s.Serve(serving, l) })
	}
	hooks, stopHooks := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.background(hooks)
	}()
	g.Go(func() error { return s.push(serving) })
	err := g.Wait()
	if err == nil {
		<-ctx.Done() // without a listener there is still something to do
	}
	stopHooks()
	<-done
	return err
}

// background calls hooks, retries and forgets until ctx ends; then it calls the
// hooks that are left.
func (s *Server) background(ctx context.Context) {
	tick := time.NewTicker(s.cfg.RetryEvery)
	defer tick.Stop()
	var told Progress
	for {
		s.callHooks()
		if p := s.tracker.progress(); p.Pushed > told.Pushed || p.Acked > told.Acked {
			told = p
			if s.cfg.OnProgress != nil {
				s.cfg.OnProgress(p)
			}
		}
		select {
		case <-ctx.Done():
			s.callHooks()
			return
		case <-s.wake:
		case <-tick.C:
			s.retry()
			s.evict()
			s.forget()
		}
	}
}

func (s *Server) retry() {
	for _, st := range s.streams() {
		st.ask(func(p *state) {
			p.retry()
			s.flush(st)
		})
	}
}

// evict ends the streams of proxies that take too long to answer: what they owe
// would be waited for by drains and receipts, and a proxy that lives comes back.
func (s *Server) evict() {
	now := s.cfg.Now()
	for _, st := range s.streams() {
		late := false
		st.ask(func(p *state) { late = p.lateSince(now.Add(-s.cfg.Admission.answerWithin())) })
		if late {
			s.metrics.evicted.Inc()
			s.cfg.Log.Warn("xds: proxy does not answer and is cut off; it may come back", "proxy", st.id)
			st.cut(status.Errorf(codes.DeadlineExceeded, "node id %q: no answer to a response for %s", st.id, s.cfg.Admission.answerWithin()))
		}
	}
}

// forget drops the proxies that have been gone for longer than anybody asks.
func (s *Server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	for id, st := range s.gone {
		if now.Sub(st.final.Since) > s.remember {
			delete(s.gone, id)
		}
	}
	for id, d := range s.duplicates {
		if now.Sub(d.last) > duplicateFor {
			delete(s.duplicates, id)
		}
	}
}

// event queues a hook. s.mu is held.
func (s *Server) event(hook func()) {
	if len(s.events) >= hookQueue {
		s.dropped++
		return
	}
	s.events = append(s.events, hook)
	s.wakeUp()
}

func (s *Server) callHooks() {
	s.mu.Lock()
	events, dropped := s.events, s.dropped
	s.events, s.dropped = nil, 0
	s.mu.Unlock()
	if dropped > 0 {
		s.cfg.Log.Error("xds: hooks are too slow: events were lost", "lost", dropped)
	}
	for _, hook := range events {
		hook()
	}
}

func (s *Server) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
