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
// for what, is in state, which is pure: state.go (subscriptions), push.go (what
// to send now), settle.go (ACK, NACK, retry, progress). It speaks delta; sotw.go
// translates for clients of the other form.
//
// For wildcard types (clusters, listeners) the package takes View.All to list
// exactly what View.Get finds.
//
// Goroutines: each stream has an owner, gRPC's handler, which alone touches its
// state and never blocks on the network, beside one that receives and one that
// sends. Run owns one that calls every hook of Config, in order and without a
// lock held, so that a hook may call the Server; it also retries and forgets.
// Run returns after all of them have ended.
package xds

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

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
	// changeLog is how many changes are kept for streams that lag behind; one
	// that is further behind compares its whole view.
	changeLog = 256
	// changeNames bounds the names that a lagging stream goes through.
	changeNames = 4096
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
	cfg     Config
	metrics *metrics
	ready   chan struct{} // closed by the first Publish
	wake    chan struct{} // one slot: hooks or progress for Run

	tracker tracker // has its own lock, taken after mu
	loads   *loads  // has its own lock

	mu         sync.Mutex
	world      envoy.World             // guarded by mu
	seq        uint64                  // Publishes so far; guarded by mu
	changes    [changeLog]envoy.Change // of the last ones, by seq; guarded by mu
	live       map[string]*stream      // by proxy id; guarded by mu
	gone       map[string]*stream      // remembered, and not come back; guarded by mu
	duplicates map[string]duplicate    // by proxy id; guarded by mu
	remember   time.Duration           // how long gone has a proxy; guarded by mu
	events     []func()                // hooks to call; guarded by mu
	dropped    int                     // events lost to a full queue; guarded by mu
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
	return &Server{
		cfg: cfg, metrics: newMetrics(cfg.Registry), ready: make(chan struct{}), wake: make(chan struct{}, 1), loads: newLoads(),
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
	if s.world != nil && w.Version() <= s.world.Version() {
		s.cfg.Log.Error("xds: world is not newer than the last one and is dropped", "version", w.Version(), "last", s.world.Version())
		return
	}
	if s.world == nil {
		close(s.ready)
	}
	s.world = w
	s.changes[s.seq%changeLog] = c
	s.seq++
	s.tracker.publish(w.Version())
	for _, st := range s.live {
		st.prod()
	}
	s.wakeUp()
}

// since returns the newest World, its seq, and what changed after a seq. s.mu
// is held.
func (s *Server) since(seq uint64) (envoy.World, uint64, []envoy.Change) {
	all := []envoy.Change{{Views: true}}
	if s.seq-seq > changeLog {
		return s.world, s.seq, all
	}
	var changes []envoy.Change
	names := 0
	for i := seq; i < s.seq; i++ {
		c := s.changes[i%changeLog]
		if names += len(c.Names); c.Views || names > changeNames {
			return s.world, s.seq, all
		}
		changes = append(changes, c)
	}
	return s.world, s.seq, changes
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
			s.forget()
		}
	}
}

func (s *Server) retry() {
	for _, st := range s.streams() {
		st.ask(func(p *state) { p.retry() })
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
