package lb

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/roostmesh/roost/discovery"
)

// Input is everything a Snapshot is built from.
type Input struct {
	Config    *Config
	Catalog   *discovery.Catalog
	Services  []*ServiceSpec // declared, recorded and newly seen; one per key
	Addresses map[Key]Addresses
	// HostAddresses are the addresses of this host's interfaces: they name the
	// node, never an instance.
	HostAddresses []netip.Addr
	// Drains are the instances to take out of service, by service and qualified
	// name.
	Drains map[Key]map[string]Drain
}

// Build makes the next Snapshot. It is pure: the same input gives the same
// Snapshot. What did not change is shared with prev, which may be nil.
func Build(prev *Snapshot, in Input) *Snapshot {
	s := &Snapshot{Version: 1, Config: in.Config, Catalog: in.Catalog, Services: make(map[Key]*Service, len(in.Services))}
	reuse := prev
	if prev != nil {
		s.Version = prev.Version + 1
		if prev.Config != in.Config {
			reuse = nil
		}
	}
	versions := routedVersions(in.Config)
	for _, spec := range in.Services {
		var before *Service
		if prev != nil && prev.Config.sameNames(in.Config) {
			before = prev.Services[spec.Key]
		}
		svc := buildService(before, in.Config, spec, in.Addresses[spec.Key], in.Catalog.Groups[spec.Key], versions[spec.Key], in.Drains[spec.Key])
		s.Services[spec.Key] = svc
		s.Order = append(s.Order, svc)
	}
	slices.SortFunc(s.Order, func(a, b *Service) int { return a.Key.Compare(b.Key) })
	s.index(reuse)
	s.callers(reuse, in)
	s.routes(reuse)
	s.problems()
	return s
}

// sameNames tells whether services built under c look the same under o.
func (c *Config) sameNames(o *Config) bool { return c == o || c.Domain == o.Domain && c.Node == o.Node }

func routedVersions(c *Config) map[Key][]string {
	out := map[Key][]string{}
	for _, r := range c.Routes {
		for _, t := range r.To {
			if t.Version != "" && !slices.Contains(out[t.Service], t.Version) {
				out[t.Service] = append(out[t.Service], t.Version)
			}
		}
	}
	for _, v := range out {
		slices.Sort(v)
	}
	return out
}

// index fills ByAddress; it is shared with prev while no address changed.
func (s *Snapshot) index(prev *Snapshot) {
	if prev != nil && len(prev.Order) == len(s.Order) {
		same := true
		for n, svc := range s.Order {
			if p := prev.Order[n]; p != svc && (p.Key != svc.Key || p.addresses() != svc.addresses()) {
				same = false
				break
			}
		}
		// The map's values may be older pointers of the same service: Service
		// resolves them.
		if same {
			s.ByAddress = prev.ByAddress
			return
		}
	}
	s.ByAddress = make(map[netip.Addr]*Service, len(s.Order))
	for _, svc := range s.Order {
		for _, a := range []netip.Addr{svc.Address, svc.Address6, svc.Dedicated} {
			if a.IsValid() {
				s.ByAddress[a] = svc
			}
		}
	}
}

// ServiceAt is the service that owns an address.
func (s *Snapshot) ServiceAt(a netip.Addr) (*Service, bool) {
	found, ok := s.ByAddress[a]
	if !ok {
		return nil, false
	}
	now, ok := s.Services[found.Key]
	return now, ok
}

func (s *Snapshot) callers(prev *Snapshot, in Input) {
	if prev == nil || prev.Callers == nil || !slices.Equal(prev.Callers.host, in.HostAddresses) {
		s.Callers = newCallers(in.Config, in.HostAddresses)
		for _, svc := range s.Order {
			for _, e := range svc.Endpoints {
				s.Callers.edit(e.Instance.Node).count(e, svc.Key, 1)
			}
		}
		return
	}
	s.Callers = prev.Callers
	for _, svc := range s.Order {
		if before := prev.Services[svc.Key]; before != svc && !samePlaces(before, svc) {
			s.Callers = s.Callers.with(before, svc)
		}
	}
	for key, before := range prev.Services {
		if s.Services[key] == nil && len(before.Endpoints) > 0 {
			s.Callers = s.Callers.with(before, nil)
		}
	}
}

func samePlaces(a, b *Service) bool {
	if a == nil {
		return len(b.Endpoints) == 0
	}
	return slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y *Endpoint) bool {
		return x.Instance.Node == y.Instance.Node && x.Instance.Address == y.Instance.Address && x.Instance.NodeAddress == y.Instance.NodeAddress
	})
}

func (s *Snapshot) problems() {
	for _, svc := range s.Order {
		s.Problems = append(s.Problems, svc.Problems...)
	}
	s.Problems = append(s.Problems, s.Catalog.Problems...)
	for key, group := range s.Catalog.Groups {
		if s.Services[key] != nil {
			continue
		}
		for _, i := range group.Instances {
			s.Problems = append(s.Problems, Problem{Code: "service_undeclared", Severity: discovery.SeverityError, Object: i.QualifiedName(), Place: i.Origin,
				Message: fmt.Sprintf("is an instance of %s, which nobody has declared; it takes no traffic", key),
				Fix:     fmt.Sprintf("declare the service in roost.yaml, or run `roost service create %s --port PORT`", key)})
		}
	}
	if c := s.Config; len(c.Tenants) > 1 && !c.LoopbackSet {
		s.Problems = append(s.Problems, Problem{Code: "loopback_unset", Severity: discovery.SeverityInfo, Object: "loopback", Place: "loopback",
			Message: "with several tenants, callers over loopback still see all of them",
			Fix:     "write `loopback: all`, `loopback: none` or `loopback: TENANT` into roost.yaml"})
	}
	SortProblems(s.Problems)
}

// SortProblems orders by severity, code, object and place.
func SortProblems(p []Problem) {
	rank := map[string]int{discovery.SeverityError: 0, discovery.SeverityWarning: 1, discovery.SeverityInfo: 2}
	slices.SortStableFunc(p, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(rank[a.Severity], rank[b.Severity]), strings.Compare(a.Code, b.Code), strings.Compare(a.Object, b.Object), strings.Compare(a.Place, b.Place))
	})
}

// routes resolves the declared routes and public listeners.
func (s *Snapshot) routes(prev *Snapshot) {
	if prev != nil && sameShapes(prev, s) {
		s.Listeners, s.Routes, s.Mesh, s.routeProblems = prev.Listeners, prev.Routes, prev.Mesh, prev.routeProblems
		s.Problems = append(s.Problems, s.routeProblems...)
		return
	}
	r := resolver{s: s, listeners: map[string]*Listener{}}
	r.run()
	s.routeProblems = r.problems
	s.Problems = append(s.Problems, r.problems...)
}

// sameShapes tells whether routes resolve alike: the same services with the
// same specs.
func sameShapes(a, b *Snapshot) bool {
	return len(a.Order) == len(b.Order) && !slices.ContainsFunc(b.Order, func(s *Service) bool {
		before := a.Services[s.Key]
		return before == nil || before.Spec != s.Spec
	})
}

// Tenants lists every tenant that is declared or owns a service, by name.
func (s *Snapshot) Tenants() []string {
	set := map[string]bool{}
	for _, t := range s.Config.Tenants {
		set[t.Name] = true
	}
	for _, svc := range s.Order {
		set[svc.Key.Tenant] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// AddProblems adds what others have found; only before s is published.
func (s *Snapshot) AddProblems(more []Problem) {
	if len(more) == 0 {
		return
	}
	s.Problems = append(slices.Clone(s.Problems), more...)
	SortProblems(s.Problems)
}
