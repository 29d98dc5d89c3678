package xds

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// Stand is how one proxy stands to one resource.
type Stand struct {
	ID        string
	Role      lb.Role
	Connected bool
	// Held is the version in force; nil is none. One of which only the version is
	// known has no Body.
	Held *envoy.Resource
	// Refused is the version that the proxy should have and refuses for what it
	// says, with what Envoy says of it. It is empty where the host is the cause.
	Refused string
	Message string
	Since   time.Time
}

// Stands tells how each proxy that has or refuses one of some resources stands to
// it, by id: connected ones, and those gone that are remembered, which refuse
// nothing.
func (s *Server) Stands(names ...envoy.Name) map[envoy.Name][]Stand {
	all := map[envoy.Name][]Stand{}
	live, gone := s.known()
	for _, st := range live {
		if !st.ask(func(p *state) { st.stands(p, names, true, all) }) {
			st.stands(st.state, names, false, all)
		}
	}
	for _, st := range gone {
		<-st.ended
		st.stands(st.state, names, false, all)
	}
	for _, list := range all {
		slices.SortFunc(list, func(a, b Stand) int { return cmp.Compare(a.ID, b.ID) })
	}
	return all
}

// stands runs where the state may be read.
func (st *stream) stands(p *state, names []envoy.Name, connected bool, all map[envoy.Name][]Stand) {
	for _, n := range names {
		ts := &p.types[n.Type]
		held := ts.held
		if !ts.started {
			held = ts.earlier
		}
		out := Stand{ID: st.id, Role: st.identity.Role, Connected: connected, Held: held.get(n.Name)}
		if f := ts.refused.get(n.Name); f != nil && connected && p.refusedNow(n.Type, n.Name, f) && !OfHost(n.Type, f.message) {
			out.Refused, out.Message, out.Since = f.version, f.message, f.since
		}
		if out.Held != nil || out.Refused != "" {
			all[n] = append(all[n], out)
		}
	}
}

// ofHost are parts of what Envoy says when the host, not the listener, is the
// cause.
var ofHost = []string{"cannot bind", "cannot listen", "Too many open files", "socket option"}

// OfHost says that a refusal is about the proxy's host, so that others may take
// the same version.
func OfHost(t envoy.Type, message string) bool {
	return retryable(t, message) || t == envoy.Listener && slices.ContainsFunc(ofHost, func(part string) bool { return strings.Contains(message, part) })
}
