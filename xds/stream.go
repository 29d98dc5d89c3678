package xds

import (
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// Bounds on what a client may cost before and after it is known.
const (
	maxRequest   = 32 << 20 // a reconnect names every version that the proxy has
	maxHeaders   = 16 << 10
	maxStreams   = 100 // per connection; an Envoy needs two
	firstRequest = 15 * time.Second
	handshake    = 10 * time.Second
	pingAfter    = 30 * time.Second
	pingTimeout  = 10 * time.Second
	pingAtMost   = 10 * time.Second // more frequent pings of a client end its connection
	drainFor     = 2 * time.Second
)

// service is the gRPC side of one Listener.
type service struct {
	*Server
	tenant string
	ctx    context.Context // of Serve: streams end with it
	wg     sync.WaitGroup  // the goroutines beside the handlers
}

// Serve serves on one listener until ctx ends; then streams end at once, and
// connections shortly after. Hooks are called only while Run runs.
func (s *Server) Serve(ctx context.Context, l Listener) error {
	v := &service{Server: s, tenant: l.Tenant, ctx: ctx}
	name := "roost"
	if s.cfg.Node != "" {
		name += "/" + s.cfg.Node
	}
	g := grpc.NewServer(
		grpc.ForceServerCodecV2(newCodec(name)), grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(maxRequest), grpc.MaxHeaderListSize(maxHeaders), grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshake),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingAtMost, PermitWithoutStream: true}),
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(g, v)
	loadv3.RegisterLoadReportingServiceServer(g, v)
	healthpb.RegisterHealthServer(g, healthService{Server: v.Server})
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		hard := time.AfterFunc(drainFor, g.Stop)
		defer hard.Stop()
		g.GracefulStop()
	})
	err := g.Serve(l.Listener)
	if stop() { // Serve failed by itself
		g.Stop()
	} else {
		<-stopped
		err = nil
	}
	v.wg.Wait()
	return err
}

// DeltaAggregatedResources implements the discovery service: one proxy's stream.
func (v *service) DeltaAggregatedResources(gs discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return serve(v, &form[*discovery.DeltaDiscoveryRequest]{
		ServerStream: gs, receive: gs.Recv,
		delta: func(_ *state, _ envoy.Type, q *discovery.DeltaDiscoveryRequest) *discovery.DeltaDiscoveryRequest {
			return q
		},
		next: func(s *state) (answer, bool) {
			r := s.next()
			return r, r != nil
		},
	})
}

// form is a stream in one of the two forms of xDS, delta and the state of the
// world. A state speaks delta; delta and next translate, on the owner's
// goroutine.
type form[Q question] struct {
	grpc.ServerStream
	receive func() (Q, error)
	delta   func(*state, envoy.Type, Q) *discovery.DeltaDiscoveryRequest
	next    func(*state) (a answer, ok bool)
}

type question interface {
	GetNode() *corev3.Node
	GetTypeUrl() string
}

// answer is a response in one of the forms.
type answer interface {
	kind() envoy.Type
	size() int
}

func serve[Q question](v *service, f *form[Q]) error {
	requests, failed := make(chan Q), make(chan error, 1)
	v.wg.Go(func() { failed <- receive(f, requests) })
	late := time.NewTimer(firstRequest)
	defer late.Stop()
	var first Q
	select {
	case first = <-requests:
	case err := <-failed:
		return err
	case <-late.C:
		return status.Error(codes.DeadlineExceeded, "no request came")
	case <-v.ctx.Done():
		return errStopping
	}
	st, err := v.welcome(f.Context(), first.GetNode())
	if err != nil {
		v.cfg.Log.Debug("xds: proxy is refused", "node", first.GetNode().GetId(), "error", err)
		return err
	}
	take(v, st, f, first)
	err = own(v, st, f, requests, failed)
	v.unregister(st)
	v.cfg.Log.Info("xds: proxy has gone", "proxy", st.final.ID, "reason", err)
	return err
}

var errStopping = status.Error(codes.Unavailable, "the control plane stops")

// receive hands requests to the owner until the stream ends; nil says that the
// client closed it.
func receive[Q question](f *form[Q], requests chan<- Q) error {
	for {
		q, err := f.receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case requests <- q:
		case <-f.Context().Done():
			return f.Context().Err()
		}
	}
}

// stream is one connected proxy, or one that has gone.
type stream struct {
	// Fixed at construction.
	id       string
	identity lb.Identity
	version  string
	metadata map[string]string
	since    time.Time
	poke     chan struct{}     // one slot: there is a newer World
	asks     chan func(*state) // run by the owner
	replaced chan struct{}     // closed when a newer stream has its id
	replace  func()            // closes replaced
	ended    chan struct{}     // closed when the owner is through

	// Owned by the owner; after ended, anybody may read it.
	state *state
	seq   uint64 // of the Publish that the state is at
	final ProxyStatus

	position *position // guarded by the tracker
}

func (st *stream) prod() {
	select {
	case st.poke <- struct{}{}:
	default:
	}
}

// ask runs f on the owner's goroutine and returns after it, or reports that the
// stream has ended: then nobody changes its state any more.
func (st *stream) ask(f func(*state)) bool {
	done := make(chan struct{})
	select {
	case st.asks <- func(s *state) { defer close(done); f(s) }:
		<-done
		return true
	case <-st.ended:
		return false
	}
}

// identify checks who a node claims to be, and whether it may be served here.
func (v *service) identify(ctx context.Context, node *corev3.Node) (lb.Identity, error) {
	identity, err := lb.ParseIdentity(node.GetId())
	if err != nil {
		return identity, status.Error(codes.InvalidArgument, err.Error())
	}
	if v.cfg.Admit != nil {
		if err := v.firstWorld(ctx); err != nil {
			return identity, err
		}
		if identity, err = v.cfg.Admit(identity); err != nil {
			if _, ok := status.FromError(err); ok {
				return identity, err
			}
			return identity, status.Error(codes.FailedPrecondition, err.Error())
		}
	}
	if v.tenant != "" && (!identity.Beside() || identity.Tenant != v.tenant) {
		return identity, status.Errorf(codes.PermissionDenied, "node id %q: this socket serves sidecars and gRPC clients of tenant %s only", node.GetId(), v.tenant)
	}
	return identity, nil
}

// firstWorld waits for the first Publish.
func (v *service) firstWorld(ctx context.Context) error {
	select {
	case <-v.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-v.ctx.Done():
		return errStopping
	}
}

// welcome checks who a proxy is, waits for the first World and registers it.
func (v *service) welcome(ctx context.Context, node *corev3.Node) (*stream, error) {
	identity, err := v.identify(ctx, node)
	if err != nil {
		return nil, err
	}
	if err := v.firstWorld(ctx); err != nil {
		return nil, err
	}
	st := &stream{
		id: identity.String(), identity: identity, version: envoyVersion(node), metadata: metadataOf(node), since: v.cfg.Now(),
		poke: make(chan struct{}, 1), asks: make(chan func(*state)), replaced: make(chan struct{}), ended: make(chan struct{}),
	}
	st.replace = sync.OnceFunc(func() { close(st.replaced) })
	if err := v.register(ctx, st); err != nil {
		return nil, err
	}
	return st, nil
}

// register makes a stream the one of its id, after an older one has ended.
func (s *Server) register(ctx context.Context, st *stream) error {
	for {
		s.mu.Lock()
		if st.identity.Role == lb.Proxyless {
			st.id = s.vacant(st.identity)
		}
		old := s.live[st.id]
		if old == nil {
			break
		}
		now := s.cfg.Now()
		d, ok := s.duplicates[st.id]
		if !ok {
			d.since = now
		}
		d.last = now
		s.duplicates[st.id] = d
		s.mu.Unlock()
		old.replace()
		select {
		case <-old.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer s.mu.Unlock()
	var past *state
	if was := s.gone[st.id]; was != nil && was.version == st.version {
		past = was.state
	}
	delete(s.gone, st.id)
	st.seq = s.seq
	st.state = newState(s.world.View(st.proxy()), s.world.Version(), past)
	st.position = s.tracker.join()
	s.live[st.id] = st
	s.metrics.proxies.WithLabelValues(string(st.identity.Role)).Inc()
	if hook := s.cfg.OnConnect; hook != nil {
		now := st.status(true)
		s.event(func() { hook(now) })
	}
	s.cfg.Log.Info("xds: proxy has come", "proxy", st.id, "envoy", st.version)
	return nil
}

// vacant is the first id of a gRPC client that no stream has: its library opens
// one stream for each name that the application dials, all with the same node
// id, and every process of the instance does the same. s.mu is held.
func (s *Server) vacant(identity lb.Identity) string {
	id := identity.String()
	for n := 2; s.live[id] != nil; n++ {
		id = identity.String() + "#" + strconv.Itoa(n)
	}
	return id
}

func (s *Server) unregister(st *stream) {
	st.final = st.status(false)
	st.final.Since = s.cfg.Now()
	st.state.view = nothing{} // lets the World go
	s.mu.Lock()
	delete(s.live, st.id)
	s.gone[st.id] = st
	s.tracker.leave(st.position)
	if hook := s.cfg.OnDisconnect; hook != nil {
		s.event(func() { hook(st.final) })
	}
	s.wakeUp()
	s.mu.Unlock()
	s.metrics.proxies.WithLabelValues(string(st.identity.Role)).Dec()
	close(st.ended)
}

// own is the owner's loop: it feeds the state and hands what comes out to the
// sender, one response at a time, so that each is made from the newest World.
func own[Q question](v *service, st *stream, f *form[Q], requests <-chan Q, failed <-chan error) error {
	out, sent := make(chan answer, 1), make(chan struct{}, 1)
	defer close(out)
	v.wg.Go(func() { v.send(f, out, sent) })
	var at position // last told to the tracker
	for idle := true; ; {
		if idle {
			if r, ok := f.next(st.state); ok {
				out <- r
				idle = false
			}
		}
		if now := st.state.progress(); now != at {
			at = now
			v.tracker.move(st.position, at)
			v.wakeUp()
		}
		select {
		case q := <-requests:
			take(v, st, f, q)
		case <-sent:
			idle = true
		case <-st.poke:
			v.advance(st)
		case ask := <-st.asks:
			ask(st.state)
		case err := <-failed:
			return err
		case <-f.Context().Done():
			return f.Context().Err()
		case <-st.replaced:
			return status.Errorf(codes.Aborted, "node id %q: a newer proxy has come with this id", st.id)
		case <-v.ctx.Done():
			return errStopping
		}
	}
}

// send is the sender's loop. When sending fails the stream has ended, which the
// owner sees by itself.
func (v *service) send(gs grpc.ServerStream, out <-chan answer, sent chan<- struct{}) {
	for r := range out {
		if gs.SendMsg(r) != nil {
			return
		}
		v.metrics.responses[r.kind()].Inc()
		v.metrics.bytes.Add(float64(r.size()))
		sent <- struct{}{}
	}
}

// take hands a request to the state.
func take[Q question](v *service, st *stream, f *form[Q], q Q) {
	t, ok := envoy.TypeOf(q.GetTypeUrl())
	if !ok {
		v.cfg.Log.Debug("xds: proxy asks for a type that is not served", "proxy", st.id, "type", q.GetTypeUrl())
		return
	}
	v.handle(st, t, f.delta(st.state, t, q))
}

func (v *service) handle(st *stream, t envoy.Type, q *discovery.DeltaDiscoveryRequest) {
	if e := q.GetErrorDetail(); e != nil {
		v.metrics.nacks[t].Inc()
	}
	rejected := st.state.request(t, q, v.cfg.Now())
	if a := &st.state.taken; len(a.clusters) > 0 {
		if v.cfg.OnAck != nil {
			v.cfg.OnAck(st.id, a.version, a.clusters)
		}
		*a = taken{}
	}
	if len(rejected) == 0 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range rejected {
		v.cfg.Log.Warn("xds: proxy refuses a resource and goes on without that version", "proxy", st.id, "type", r.Type, "name", r.Name.Name, "version", r.version, "reason", r.message)
		if hook := v.cfg.OnReject; hook != nil {
			v.event(func() { hook(st.id, r.Name, r.version, r.message) })
		}
	}
}

// advance moves a stream to the newest World.
func (s *Server) advance(st *stream) {
	s.mu.Lock()
	world, seq, changes := s.since(st.seq)
	s.mu.Unlock()
	st.seq = seq
	for i, c := range changes {
		if st.identity.Role == lb.Node && slices.Contains(c.Nodes, st.identity.Node) {
			changes[i].Views = true
		}
	}
	if world.Version() != st.state.version {
		st.state.update(world.View(st.proxy()), world.Version(), changes...)
	}
}

func (st *stream) proxy() envoy.Proxy { return envoy.ProxyOf(st.identity, st.metadata) }
