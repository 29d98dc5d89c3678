package xds

import (
	"context"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/roostmesh/roost/lb"
)

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
func (v *service) welcome(gs grpc.ServerStream, f form, node *corev3.Node) (*stream, error) {
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
		wire: gs, form: f, beside: &v.wg, over: make(chan error, 1), ended: make(chan struct{}),
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
	st.state = newState(st.at.world.View(st.proxy()), st.at.world.Version(), s.sets, past)
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
	st.mu.Lock()
	st.closed = true
	st.final = st.status(false)
	st.final.Since = s.cfg.Now()
	// It is remembered for a while: the World and the connection are not.
	st.state.view, st.at, st.wire, st.form = nothing{}, nil, nil, nil
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
