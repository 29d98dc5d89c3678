package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/roostmesh/roost/xds/envoy"
)

// StreamAggregatedResources implements the discovery service: the stream of a
// client that speaks the state of the world, as gRPC's libraries do.
func (v *service) StreamAggregatedResources(gs discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return v.serve(gs, &sotw{})
}

// sotw is the state-of-the-world form of xDS in front of one stream's state.
//
// A request names all that the client wants; what differs from the last one is
// subscribed and unsubscribed. A response is made of one in delta form. For
// listeners and clusters it holds all that the client is to have from then on:
// what it lacks the client removes. For other types it holds what is new, and
// there is no way to remove.
type sotw struct {
	q     *discovery.DiscoveryRequest // the last one
	types [envoy.Types]struct {
		names map[string]struct{} // of the last request; nil before the first
		named bool                // once a name was given, none at all means nothing
	}
}

func (w *sotw) receive(gs grpc.ServerStream) error {
	w.q = &discovery.DiscoveryRequest{}
	return gs.RecvMsg(w.q)
}

func (w *sotw) forget() { w.q = nil }

func (w *sotw) typeURL() string { return w.q.GetTypeUrl() }

func (w *sotw) node() (*corev3.Node, error) {
	if n := proto.Size(w.q.GetNode()); n > maxNode {
		return nil, fmt.Errorf("it has %d bytes, more than %d", n, maxNode)
	}
	return w.q.GetNode(), nil
}

// whole says that a response of this type is taken for all there is.
func whole(t envoy.Type) bool { return t.Wildcard() }

// delta is what the last request says, in delta form. A nonce that is not the last
// one makes it no answer, but what it names counts: the client says all of it each
// time.
func (w *sotw) delta(s *state, t envoy.Type) *request {
	s.sotw = true
	ts, q := &w.types[t], w.q
	names := map[string]struct{}{}
	for _, n := range q.GetResourceNames() {
		names[n] = struct{}{}
	}
	ts.named = ts.named || len(names) > 0
	if !ts.named && whole(t) {
		names[wildcardName] = struct{}{}
	}
	out := &request{typeURL: q.GetTypeUrl(), nonce: q.GetResponseNonce(), refused: q.GetErrorDetail() != nil, message: q.GetErrorDetail().GetMessage()}
	if ts.names == nil && q.GetVersionInfo() != "" && whole(t) {
		out.versions = s.spared(t, names)
	}
	for n := range names {
		if _, had := ts.names[n]; !had {
			out.subscribe = append(out.subscribe, n)
		}
	}
	for n := range ts.names {
		if _, still := names[n]; !still {
			out.unsubscribe = append(out.unsubscribe, n)
		}
	}
	ts.names = names
	return out
}

// next makes the response that is to be sent now, or returns nil.
func (w *sotw) next(s *state) outgoing {
	for {
		r := s.next()
		switch {
		case r == nil:
			return nil
		case whole(r.Type):
			return newWhole(r, s.full(r.Type))
		case len(r.resources) > 0:
			return newWhole(r, r.resources)
		}
		// Only removals: there is nothing to say and nobody to confirm it. The
		// client drops such a resource with what referred to it.
		s.request(r.Type, &request{nonce: r.nonce}, time.Time{})
	}
}

// newWhole is a response with all that it holds. What counts is its size, not that
// of the response in delta form.
func newWhole(r *response, all []*envoy.Resource) *wholeResponse {
	r.size = 0
	for _, res := range all {
		r.size += len(res.Body)
	}
	return &wholeResponse{r, all}
}

// full lists, by name, what the client is to have of a type once it has taken
// what is on its way. In the place of a version that it refuses is the one that
// it took before.
func (s *state) full(t envoy.Type) []*envoy.Resource {
	var all []*envoy.Resource
	for _, name := range s.names(t) {
		if r := s.types[t].last(name); r != nil && r.Body != nil && s.wants(t, name) {
			all = append(all, r)
		}
	}
	return all
}

// spared are the versions that a client which has come again goes on with in the
// place of those that it refuses. Without them it would take the first response
// for their removal.
func (s *state) spared(t envoy.Type, names map[string]struct{}) (versions []holding) {
	ts := &s.types[t]
	_, all := names[wildcardName]
	for _, r := range ts.earlier.all() {
		if _, asked := names[r.Name.Name]; (all || asked) && ts.refused.has(r.Name.Name) && r.Body != nil {
			versions = append(versions, holding{r.Name.Name, r.Version})
		}
	}
	return versions
}

// wholeResponse is one DiscoveryResponse, made of one in delta form.
type wholeResponse struct {
	*response
	all []*envoy.Resource
}

// versionLength is the length of a version in hex digits.
const versionLength = 12

// version is a short hash of what the response holds.
func (r *wholeResponse) version() string {
	h := sha256.New()
	for _, res := range r.all {
		for _, s := range []string{res.Name.Name, res.Version} {
			_, _ = h.Write(append([]byte(s), 0)) // a hash takes everything
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:versionLength]
}
