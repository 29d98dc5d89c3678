package xds

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	statusv3 "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// Bounds on what a client may cost before and after it is known.
const (
	maxHeaders   = 16 << 10
	maxStreams   = 100 // per connection; an Envoy needs two
	firstRequest = 15 * time.Second
	handshake    = 10 * time.Second
	pingAfter    = 30 * time.Second
	pingTimeout  = 10 * time.Second
	pingAtMost   = 10 * time.Second // more frequent pings of a client end its connection
	drainFor     = 2 * time.Second
	// sendsAtOnce is how many bytes may be on their way, not ACKed, when another
	// response is handed to gRPC: with so few its write quota of 64 KB does not
	// make the caller wait.
	sendsAtOnce = 32 << 10
	// readBuffer is that of a connection; nearly all requests are small.
	readBuffer = 4 << 10
	// window is how much a client may send before it is read. It is fixed: to
	// estimate it gRPC would ping a client for each of its ACKs.
	window     = 1 << 20
	wantsDelta = "state-of-the-world ADS is not served: set api_type: DELTA_GRPC in ads_config"
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
		grpc.ConnectionTimeout(handshake), grpc.ReadBufferSize(readBuffer),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingAtMost, PermitWithoutStream: true}),
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(g, v)
	loadv3.RegisterLoadReportingServiceServer(g, v)
	statusv3.RegisterClientStatusDiscoveryServiceServer(g, v)
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

// StreamAggregatedResources implements the discovery service.
func (v *service) StreamAggregatedResources(discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, wantsDelta)
}

// DeltaAggregatedResources implements the discovery service: one proxy's stream.
// The handler waits for the stream's end; requests are handled where they are
// received.
func (v *service) DeltaAggregatedResources(gs discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	leave, err := v.enter()
	if err != nil {
		return err
	}
	defer leave()
	in := &inbound{first: make(chan string, 1), failed: make(chan error, 1), admitted: make(chan *stream, 1)}
	v.wg.Go(func() { in.failed <- v.receive(gs, in) })
	st, err := v.first(gs, in)
	if err != nil {
		close(in.admitted)
		return err
	}
	in.admitted <- st
	err = v.end(st, gs, in)
	v.unregister(st)
	v.cfg.Log.Info("xds: proxy has gone", "proxy", st.final.ID, "reason", err)
	return err
}

var errStopping = status.Error(codes.Unavailable, "the control plane stops")

// inbound joins a stream's handler and its receiver.
type inbound struct {
	first    chan string  // the node of the first request
	failed   chan error   // receiving is over; nil: the client has closed the stream
	admitted chan *stream // closed without one: it is refused
}

// first waits for the first request and admits the proxy.
func (v *service) first(gs grpc.ServerStream, in *inbound) (*stream, error) {
	late := time.NewTimer(firstRequest)
	defer late.Stop()
	var node *corev3.Node
	select {
	case text := <-in.first:
		node = &corev3.Node{}
		if err := proto.Unmarshal([]byte(text), node); err != nil {
			return nil, status.Error(codes.InvalidArgument, "node: "+err.Error())
		}
	case err := <-in.failed:
		return nil, err
	case <-late.C:
		return nil, status.Error(codes.DeadlineExceeded, "no request came")
	case <-v.ctx.Done():
		return nil, errStopping
	}
	st, err := v.welcome(gs, node)
	if err != nil {
		v.metrics.refused.WithLabelValues(refusedIdentity).Inc()
		v.cfg.Log.Debug("xds: proxy is refused", "node", node.GetId(), "error", err)
	}
	return st, err
}

// end waits for the end of a stream and says why it has come.
func (v *service) end(st *stream, gs grpc.ServerStream, in *inbound) error {
	select {
	case err := <-in.failed:
		return err
	case <-gs.Context().Done():
		return gs.Context().Err()
	case err := <-st.over:
		return err
	case <-v.ctx.Done():
		return errStopping
	}
}

// receive handles requests until the stream ends; nil says that the client closed
// it, or that it is refused.
func (v *service) receive(gs grpc.ServerStream, in *inbound) error {
	var st *stream
	for q := new(request); ; {
		if err := gs.RecvMsg(q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if st == nil {
			in.first <- q.node
			if st = <-in.admitted; st == nil {
				return nil
			}
		}
		st.mu.Lock()
		err := error(nil)
		if !st.closed {
			if err = v.handle(st, q); err == nil {
				v.flush(st)
			}
		}
		st.mu.Unlock()
		if err != nil {
			return err
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
	wire     grpc.ServerStream
	beside   *sync.WaitGroup // of what runs beside the handlers
	over     chan error      // one slot: why the Server ends it
	ended    chan struct{}   // closed when the handler is through

	// mu is taken before the Server's, and never held while anybody waits for the
	// network. After ended nobody changes what it guards.
	mu      sync.Mutex
	state   *state   // guarded by mu
	at      *edition // that the state is at; guarded by mu
	told    position // of the tracker; guarded by mu
	sending bool     // a response is being handed to the network; guarded by mu
	closed  bool     // guarded by mu
	final   ProxyStatus

	queued atomic.Bool // waits for a pusher
	mark   *mark       // guarded by the tracker
	slot   int         // in the audience; guarded by the audience
}

// cut ends a stream.
func (st *stream) cut(why error) {
	select {
	case st.over <- why:
	default: // it ends already
	}
}

// ask runs f where the state may be read, or reports that the stream has ended:
// then nobody changes its state any more.
func (st *stream) ask(f func(*state)) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return false
	}
	f(st.state)
	return true
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
	if v.tenant != "" && (identity.Role != lb.Sidecar || identity.Tenant != v.tenant) {
		return identity, status.Errorf(codes.PermissionDenied, "node id %q: this socket serves sidecars of tenant %s only", node.GetId(), v.tenant)
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
func (v *service) welcome(gs grpc.ServerStream, node *corev3.Node) (*stream, error) {
	ctx := gs.Context()
	identity, err := v.identify(ctx, node)
	if err != nil {
		return nil, err
	}
	if err := v.firstWorld(ctx); err != nil {
		return nil, err
	}
	st := &stream{
		id: identity.String(), identity: identity, version: envoyVersion(node), metadata: metadataOf(node), since: v.cfg.Now(),
		wire: gs, beside: &v.wg, over: make(chan error, 1), ended: make(chan struct{}),
	}
	if err := v.register(ctx, st); err != nil {
		return nil, err
	}
	return st, nil
}

// register makes a stream the one of its id, after an older one has ended.
func (s *Server) register(ctx context.Context, st *stream) error {
	for {
		s.mu.Lock()
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
		old.cut(status.Errorf(codes.Aborted, "node id %q: a newer proxy has come with this id", st.id))
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
	st.at = s.newest.Load()
	st.state = newState(st.at.world.View(st.proxy()), st.at.world.Version(), past)
	st.state.sets = s.sets
	st.mark = s.tracker.join()
	s.audience.join(st)
	s.live[st.id] = st
	s.metrics.proxies.WithLabelValues(string(st.identity.Role)).Inc()
	if hook := s.cfg.OnConnect; hook != nil {
		now := st.status(true)
		s.event(func() { hook(now) })
	}
	s.cfg.Log.Info("xds: proxy has come", "proxy", st.id, "envoy", st.version)
	return nil
}

func (s *Server) unregister(st *stream) {
	st.mu.Lock()
	st.closed = true
	st.final = st.status(false)
	st.final.Since = s.cfg.Now()
	st.state.view, st.at = nothing{}, nil // lets the World go
	st.mu.Unlock()
	s.mu.Lock()
	delete(s.live, st.id)
	s.gone[st.id] = st
	s.audience.leave(st, st.state.subscriptions)
	s.tracker.leave(st.mark)
	if hook := s.cfg.OnDisconnect; hook != nil {
		s.event(func() { hook(st.final) })
	}
	s.wakeUp()
	s.mu.Unlock()
	s.metrics.proxies.WithLabelValues(string(st.identity.Role)).Dec()
	close(st.ended)
}

// flush hands what is to be sent to the network, one response at a time, so that
// each is made from the newest World. st.mu is held.
func (s *Server) flush(st *stream) {
	for !st.sending {
		r := st.state.next()
		if r == nil {
			break
		}
		r.at = s.cfg.Now()
		if st.state.unacked()-r.size <= sendsAtOnce {
			s.send(st, r)
			continue
		}
		// It may have to wait for the client to read what came before.
		st.sending = true
		st.beside.Go(func() {
			err := st.wire.SendMsg(r)
			st.mu.Lock()
			defer st.mu.Unlock()
			st.sending = err != nil // then the stream has ended
			if err == nil && !st.closed {
				s.count(r)
				s.flush(st)
			}
		})
	}
	if now := st.state.progress(); now != st.told {
		st.told = now
		if s.tracker.move(st.mark, now) {
			s.wakeUp()
		}
	}
}

// send hands a response to gRPC where that does not wait for the network.
func (s *Server) send(st *stream, r *response) {
	if st.wire.SendMsg(r) != nil {
		st.sending = true // the stream has ended, which its handler sees by itself
		return
	}
	s.count(r)
}

func (s *Server) count(r *response) {
	s.metrics.responses[r.Type].Inc()
	s.metrics.bytes[r.Type].Add(float64(r.size))
}

// handle takes a request. st.mu is held.
func (v *service) handle(st *stream, q *request) error {
	t, ok := envoy.TypeOf(q.typeURL)
	if !ok {
		v.cfg.Log.Debug("xds: proxy asks for a type that is not served", "proxy", st.id, "type", q.typeURL)
		return nil
	}
	if n := st.state.subscribed(t) + len(q.subscribe); n > maxNames {
		v.metrics.refused.WithLabelValues(refusedBounds).Inc()
		return status.Errorf(codes.ResourceExhausted, "node id %q: %d subscriptions of type %s, more than %d", st.id, n, t, maxNames)
	}
	if q.refused {
		v.metrics.nacks[t].Inc()
	}
	v.audience.subscribe(st, t, q.subscribe, st.state.asksForAll(t, q.subscribe))
	v.advance(st) // what came before the audience knew of this
	rejected := st.state.request(t, q, v.cfg.Now())
	v.audience.unsubscribe(st, t, q.unsubscribe)
	if a := &st.state.taken; len(a.clusters) > 0 {
		if v.cfg.OnAck != nil {
			v.cfg.OnAck(st.id, a.version, a.clusters)
		}
		a.clusters = a.clusters[:0]
	}
	if len(rejected) == 0 {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range rejected {
		v.cfg.Log.Warn("xds: proxy refuses a resource and goes on without that version", "proxy", st.id, "type", r.Type, "name", r.Name.Name, "version", r.version, "reason", r.message)
		if hook := v.cfg.OnReject; hook != nil {
			v.event(func() { hook(st.id, r.Name, r.version, r.message) })
		}
	}
	return nil
}

// advance moves a stream to the newest World. st.mu is held.
func (s *Server) advance(st *stream) {
	var few [4]envoy.Change
	changes, names := few[:0], 0
	for next := st.at.next.Load(); next != nil; next = next.next.Load() {
		st.at = next
		c := next.change
		names += len(c.Names)
		c.Views = c.Views || names > changeNames || st.identity.Role == lb.Node && slices.Contains(c.Nodes, st.identity.Node)
		changes = append(changes, c)
	}
	if len(changes) > 0 {
		st.state.update(st.at.world.View(st.proxy()), st.at.world.Version(), changes...)
	}
}

func (st *stream) proxy() envoy.Proxy { return envoy.ProxyOf(st.identity, st.metadata) }
