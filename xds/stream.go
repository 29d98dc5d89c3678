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
	maxStreams   = 1000 // per connection; an Envoy needs two, a gRPC client one for each name that it dials
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
	window = 1 << 20
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

// DeltaAggregatedResources implements the discovery service: one proxy's stream.
func (v *service) DeltaAggregatedResources(gs discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return v.serve(gs, &deltaForm{})
}

// form is one of the two forms of xDS, delta and the state of the world. A state
// speaks delta; a form translates, for one stream.
type form interface {
	receive(gs grpc.ServerStream) error // waits for a request
	node() (*corev3.Node, error)        // of the request
	typeURL() string
	delta(s *state, t envoy.Type) *request // the request, in delta form
	forget()                               // lets the request go
	next(s *state) outgoing                // the response that is to be sent now, or nil
}

// outgoing is a response in one of the forms.
type outgoing interface{ base() *response }

func (r *response) base() *response { return r }

// deltaForm has nothing to translate.
type deltaForm struct{ q request }

func (f *deltaForm) receive(gs grpc.ServerStream) error { return gs.RecvMsg(&f.q) }
func (f *deltaForm) typeURL() string                    { return f.q.typeURL }
func (f *deltaForm) delta(*state, envoy.Type) *request  { return &f.q }
func (f *deltaForm) forget()                            { f.q = request{} }

func (f *deltaForm) node() (*corev3.Node, error) {
	n := &corev3.Node{}
	return n, proto.Unmarshal([]byte(f.q.node), n)
}

func (f *deltaForm) next(s *state) outgoing {
	if r := s.next(); r != nil {
		return r
	}
	return nil
}

// serve serves one stream. The handler waits for its end; requests are handled
// where they are received.
func (v *service) serve(gs grpc.ServerStream, f form) error {
	leave, err := v.enter()
	if err != nil {
		return err
	}
	defer leave()
	in := &inbound{first: make(chan struct{}, 1), failed: make(chan error, 1), admitted: make(chan *stream, 1)}
	v.wg.Go(func() { in.failed <- v.receive(gs, f, in) })
	st, err := v.first(gs, f, in)
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
	first    chan struct{} // the form has the first request
	failed   chan error    // receiving is over; nil: the client has closed the stream
	admitted chan *stream  // closed without one: it is refused
}

// first waits for the first request and admits the proxy.
func (v *service) first(gs grpc.ServerStream, f form, in *inbound) (*stream, error) {
	late := time.NewTimer(firstRequest)
	defer late.Stop()
	select {
	case <-in.first:
	case err := <-in.failed:
		return nil, err
	case <-late.C:
		return nil, status.Error(codes.DeadlineExceeded, "no request came")
	case <-v.ctx.Done():
		return nil, errStopping
	}
	node, err := f.node()
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "node: "+err.Error())
	}
	st, err := v.welcome(gs, f, node)
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
func (v *service) receive(gs grpc.ServerStream, f form, in *inbound) error {
	var st *stream
	for {
		if err := f.receive(gs); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if st == nil {
			in.first <- struct{}{}
			if st = <-in.admitted; st == nil {
				return nil
			}
		}
		if err := v.take(st, f); err != nil {
			return err
		}
	}
}

// take hands a request to the state, and what follows from it to the network.
func (v *service) take(st *stream, f form) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil
	}
	t, ok := envoy.TypeOf(f.typeURL())
	if !ok {
		v.cfg.Log.Debug("xds: proxy asks for a type that is not served", "proxy", st.id, "type", f.typeURL())
		return nil
	}
	if err := v.handle(st, t, f.delta(st.state, t)); err != nil {
		return err
	}
	f.forget()
	v.flush(st)
	return nil
}

// stream is one connected proxy, or one that has gone.
type stream struct {
	// Fixed at construction.
	id       string
	identity lb.Identity
	version  string
	metadata map[string]string
	since    time.Time
	beside   *sync.WaitGroup // of what runs beside the handlers
	over     chan error      // one slot: why the Server ends it
	ended    chan struct{}   // closed when the handler is through

	// mu is taken before the Server's, and never held while anybody waits for the
	// network. After ended nobody changes what it guards.
	mu      sync.Mutex
	wire    grpc.ServerStream // guarded by mu; nil after the end
	form    form              // guarded by mu but for what its receiver does; nil after the end
	state   *state            // guarded by mu
	at      *edition          // that the state is at; guarded by mu
	told    position          // of the tracker; guarded by mu
	sending bool              // a response is being handed to the network; guarded by mu
	closed  bool              // guarded by mu
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

// flush hands what is to be sent to the network, one response at a time, so that
// each is made from the newest World. st.mu is held.
func (s *Server) flush(st *stream) {
	for !st.sending {
		r := st.form.next(st.state)
		if r == nil {
			break
		}
		r.base().at = s.cfg.Now()
		if st.state.unacked()-r.base().size <= sendsAtOnce {
			s.send(st, r)
			continue
		}
		// It may have to wait for the client to read what came before.
		st.sending = true
		wire := st.wire
		st.beside.Go(func() {
			err := wire.SendMsg(r)
			st.mu.Lock()
			defer st.mu.Unlock()
			st.sending = err != nil // then the stream has ended
			if err == nil && !st.closed {
				s.count(r.base())
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
func (s *Server) send(st *stream, r outgoing) {
	if st.wire.SendMsg(r) != nil {
		st.sending = true // the stream has ended, which its handler sees by itself
		return
	}
	s.count(r.base())
}

func (s *Server) count(r *response) {
	s.metrics.responses[r.Type].Inc()
	s.metrics.bytes[r.Type].Add(float64(r.size))
}

// handle takes a request. st.mu is held.
func (v *service) handle(st *stream, t envoy.Type, q *request) error {
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
		if a.clusters = a.clusters[:0]; cap(a.clusters) > bagKeeps {
			a.clusters = nil // of a first sync
		}
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
