package xds

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// ProxyStatus is one proxy as the Server sees it: connected, or gone for less
// than an hour, or than Remember says.
type ProxyStatus struct {
	ID           string // the node id of Identity; of the further streams of a gRPC client, with #2, #3 and so on
	Identity     lb.Identity
	EnvoyVersion string
	Metadata     map[string]string // of the node; what is no string is JSON
	Connected    bool
	Since        time.Time // connected, or gone, since
	Types        [envoy.Types]TypeStatus
	Rejected     []Rejected // by type and name
}

// TypeStatus counts a proxy's resources of one type: Sent is Acked and Rejected
// and those that the proxy has not answered yet.
type TypeStatus struct {
	Sent, Acked, Rejected int
	LastError             string // of the last NACK, while something is refused
}

// Rejected is a version that a proxy refuses.
type Rejected struct {
	envoy.Name
	Version string
	Message string // of Envoy
	Since   time.Time
	Held    string // the version that the proxy goes on with; empty: none
}

// Held is one resource as a proxy holds it. Versions are empty where there is
// none.
type Held struct {
	Name     string
	Intended string // in the proxy's view
	Sent     string // the last version sent
	Acked    string // the version in force
	Rejected string // the version that is refused, with Error
	Error    string
	// Resource is the intended one; where there is none, the one in force.
	Resource *envoy.Resource
}

// Proxies lists every connected proxy, and those gone that are remembered, by
// id.
func (s *Server) Proxies() []ProxyStatus {
	var all []ProxyStatus
	live, gone := s.known()
	for _, st := range live {
		p := ProxyStatus{}
		if !st.ask(func(*state) { p = st.status(true) }) {
			p = st.final
		}
		all = append(all, p)
	}
	for _, st := range gone {
		<-st.ended
		all = append(all, st.final)
	}
	slices.SortFunc(all, func(a, b ProxyStatus) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// Proxy returns one proxy of Proxies.
func (s *Server) Proxy(id string) (p ProxyStatus, ok bool) {
	if st := s.stream(id); st != nil {
		if !st.ask(func(*state) { p = st.status(true) }) {
			p = st.final
		}
		return p, true
	}
	return ProxyStatus{}, false
}

// Holding lists a proxy's resources of one type by name; ok says that the proxy
// is known.
func (s *Server) Holding(id string, t envoy.Type) (held []Held, ok bool) {
	st := s.stream(id)
	if st == nil {
		return nil, false
	}
	if !st.ask(func(p *state) { held = p.holding(t) }) {
		held = st.state.holding(t)
	}
	return held, true
}

// Holder is a proxy that has a resource, or may have it.
type Holder struct {
	ID        string
	Name      string // of the resource; "" for one that has just come, or has gone again, and has not said yet what it has
	Connected bool
	Since     time.Time // connected, or gone, since
}

// Holders lists who has a resource of a type whose name is wanted, as far as
// the proxy ACKed it or has it on its way: connected proxies, and those gone for
// less than an hour, or than Remember says.
func (s *Server) Holders(t envoy.Type, wanted func(name string) bool) []Holder {
	var all []Holder
	live, gone := s.known()
	for _, st := range live {
		if !st.ask(func(p *state) { all = append(all, st.holders(p, t, wanted, true)...) }) {
			all = append(all, st.holders(st.state, t, wanted, false)...)
		}
	}
	for _, st := range gone {
		<-st.ended
		all = append(all, st.holders(st.state, t, wanted, false)...)
	}
	slices.SortFunc(all, func(a, b Holder) int { return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Name, b.Name)) })
	return all
}

// holders runs where the state may be read.
func (st *stream) holders(p *state, t envoy.Type, wanted func(name string) bool, connected bool) (all []Holder) {
	h := Holder{ID: st.id, Connected: connected, Since: st.since}
	if !connected {
		h.Since = st.final.Since
	}
	ts := &p.types[t]
	known := ts.held
	if !ts.started {
		known = ts.earlier
		// One that starts anew and has gone before it asked has nothing.
		unsaid := connected && time.Since(st.since) < firstRequest || !connected && p.resumes()
		if known.len() == 0 && unsaid {
			return []Holder{h}
		}
	}
	for _, r := range known.all() {
		if name := r.Name.Name; wanted(name) {
			all = append(all, Holder{h.ID, name, h.Connected, h.Since})
		}
	}
	for name, r := range ts.flying() {
		if known.get(name) == nil && r != nil && wanted(name) {
			all = append(all, Holder{h.ID, name, h.Connected, h.Since})
		}
	}
	return all
}

// Behind lists the connected proxies that have not settled everything up to a
// World version, by id.
func (s *Server) Behind(version uint64) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for id, st := range s.live {
		if s.tracker.behind(st.mark, version) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (s *Server) stream(id string) *stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.live[id]; st != nil {
		return st
	}
	return s.gone[id]
}

// known are the streams that are connected and those that are remembered, of one
// moment: one that comes back between two looks would be in neither list.
func (s *Server) known() (live, gone []*stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.live)), slices.Collect(maps.Values(s.gone))
}

func (s *Server) streams() []*stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.live))
}

// status runs where the state may be read.
func (st *stream) status(connected bool) ProxyStatus {
	p := ProxyStatus{ID: st.id, Identity: st.identity, EnvoyVersion: st.version, Metadata: st.metadata, Connected: connected, Since: st.since}
	for t := range envoy.Types {
		p.Types[t] = st.state.count(t)
		p.Rejected = append(p.Rejected, st.state.rejected(t)...)
	}
	return p
}

func (s *state) count(t envoy.Type) TypeStatus {
	ts := &s.types[t]
	c := TypeStatus{Sent: ts.held.len(), Acked: ts.held.len(), LastError: ts.lastError}
	for name, r := range ts.flying() {
		switch {
		case ts.held.get(name) != nil:
			c.Acked--
		case r != nil:
			c.Sent++
		}
	}
	for name, f := range ts.refused.m {
		if !s.refusedNow(t, name, f) {
			continue
		}
		c.Rejected++
		held := ts.held.get(name) != nil
		_, flies := ts.onItsWay(name)
		switch {
		case held && !flies:
			c.Acked--
		case !held && !flies:
			c.Sent++
		case flies: // a retry on its way counts as refused, not as on its way
		}
	}
	return c
}

// refusedNow says that a refusal is about the version that the client should
// have.
func (s *state) refusedNow(t envoy.Type, name string, f *refusal) bool {
	if !s.wants(t, name) {
		return false
	}
	r := s.get(envoy.Name{Type: t, Name: name})
	return r != nil && r.Version == f.version
}

func (s *state) rejected(t envoy.Type) (all []Rejected) {
	ts := &s.types[t]
	for _, name := range slices.Sorted(maps.Keys(ts.refused.m)) {
		f := ts.refused.get(name)
		if s.refusedNow(t, name, f) {
			all = append(all, Rejected{envoy.Name{Type: t, Name: name}, f.version, f.message, f.since, versionOf(ts.held.get(name))})
		}
	}
	return all
}

func (s *state) holding(t envoy.Type) (all []Held) {
	ts := &s.types[t]
	for _, name := range s.names(t) {
		intended := s.get(envoy.Name{Type: t, Name: name})
		if !s.wants(t, name) {
			intended = nil
		}
		h := Held{Name: name, Intended: versionOf(intended), Sent: versionOf(ts.last(name)), Acked: versionOf(ts.held.get(name)), Resource: cmp.Or(intended, ts.held.get(name))}
		if f := ts.refused.get(name); f != nil && intended != nil && intended.Version == f.version {
			h.Rejected, h.Error = f.version, f.message
		}
		if h.Intended != "" || h.Sent != "" || h.Acked != "" {
			all = append(all, h)
		}
	}
	return all
}

func versionOf(r *envoy.Resource) string {
	if r == nil {
		return ""
	}
	return r.Version
}

// nothing is the view of a proxy that has gone.
type nothing struct{}

func (nothing) Get(envoy.Name) *envoy.Resource           { return nil }
func (nothing) Limited() bool                            { return false }
func (nothing) All(envoy.Type) iter.Seq[*envoy.Resource] { return func(func(*envoy.Resource) bool) {} }

func envoyVersion(n *corev3.Node) string {
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		return fmt.Sprintf("%d.%d.%d", v.GetMajorNumber(), v.GetMinorNumber(), v.GetPatch())
	}
	return n.GetUserAgentVersion()
}

func metadataOf(n *corev3.Node) map[string]string {
	m := map[string]string{}
	for k, v := range n.GetMetadata().GetFields() {
		if s, ok := v.GetKind().(*structpb.Value_StringValue); ok {
			m[k] = s.StringValue
		} else if b, err := v.MarshalJSON(); err == nil {
			m[k] = string(b)
		}
	}
	return m
}
