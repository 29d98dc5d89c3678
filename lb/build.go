package lb

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
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
	// Same says that Services and Addresses are those that the previous Snapshot
	// was built from: then only what the Catalog and Drains say is looked at, and
	// only where they differ.
	Same bool
	// HostAddresses are the addresses of this host's interfaces: they name the
	// node, never an instance.
	HostAddresses []netip.Addr
	// Drains are the instances to take out of service, by service and qualified
	// name.
	Drains map[Key]map[string]Drain
	// Keep are versions of instances, in order, that have clusters although no
	// route of Config may name them. It is looked at unless Same.
	Keep map[Key][]string
}

// Build makes the next Snapshot. It is pure: the same input gives the same
// Snapshot. What did not change is shared with prev, which may be nil.
func Build(prev *Snapshot, in Input) *Snapshot {
	s := &Snapshot{Version: 1, Config: in.Config, Catalog: in.Catalog, drains: in.Drains}
	if prev != nil {
		s.Version = prev.Version + 1
	}
	b := build{Snapshot: s, in: in}
	if prev != nil && prev.Config == in.Config {
		b.prev = prev
	}
	if b.prev != nil && in.Same {
		b.touched()
	} else {
		b.all(prev)
	}
	b.draining()
	b.index()
	b.callers()
	b.routes()
	b.problems()
	return s
}

// build is a Snapshot in the making.
type build struct {
	*Snapshot
	in   Input
	prev *Snapshot // of the same Config; else nil
	// moves are the services that differ from those of prev.
	moves []move
	// population says that services have come or gone, specs that one of those
	// that stayed has another spec.
	population, specs bool
}

// move is a service that has changed; before is nil for one that has come, after
// for one that has gone.
type move struct{ before, after *Service }

// all builds every service.
func (b *build) all(prev *Snapshot) {
	from := prev
	if prev == nil || !prev.Config.sameNames(b.Config) {
		from = &Snapshot{}
	}
	services := from.Services.Edit()
	versions := routedVersions(b.Config, b.in.Keep)
	exists := make(map[Key]bool, len(b.in.Services))
	b.Order = make([]*Service, 0, len(b.in.Services))
	for _, spec := range b.in.Services {
		before := from.Services.Get(spec.Key)
		svc := b.service(before, spec, b.in.Addresses[spec.Key], versions[spec.Key])
		exists[spec.Key] = true
		b.Order = append(b.Order, svc)
		services.Set(spec.Key, svc)
		b.moved(before, svc)
	}
	for _, before := range from.Order {
		if !exists[before.Key] {
			services.Delete(before.Key)
			b.moved(before, nil)
		}
	}
	b.Services = services.Table()
	slices.SortFunc(b.Order, func(a, b *Service) int { return a.Key.Compare(b.Key) })
}

// touched builds the services whose instances or drains may have changed; all
// others are those of prev.
func (b *build) touched() {
	keys := map[Key]bool{}
	for k := range b.Catalog.Groups.Differs(b.prev.Catalog.Groups) {
		keys[k] = true
	}
	for _, drains := range []map[Key]map[string]Drain{b.in.Drains, b.prev.drains} {
		for k := range drains {
			keys[k] = true
		}
	}
	services := b.prev.Services.Edit()
	b.Order = b.prev.Order
	for k := range keys {
		before := b.prev.Services.Get(k)
		if before == nil {
			continue
		}
		svc := b.service(before, before.Spec, before.addresses(), before.Versions)
		if svc == before {
			continue
		}
		if len(b.moves) == 0 {
			b.Order = slices.Clone(b.Order)
		}
		at, _ := slices.BinarySearchFunc(b.Order, k, func(s *Service, k Key) int { return s.Key.Compare(k) })
		b.Order[at] = svc
		services.Set(k, svc)
		b.moved(before, svc)
	}
	b.Services = services.Table()
}

func (b *build) service(before *Service, spec *ServiceSpec, addr Addresses, versions []string) *Service {
	return buildService(before, b.Config, spec, addr, b.Catalog.Groups.Get(spec.Key), versions, b.in.Drains[spec.Key])
}

func (b *build) moved(before, after *Service) {
	if before == after {
		return
	}
	b.moves = append(b.moves, move{before, after})
	if before == nil || after == nil {
		b.population = true
	} else if before.Spec != after.Spec {
		b.specs = true
	}
}

// draining lists the services that drain: those of prev that have not changed, and
// of those that have.
func (b *build) draining() {
	if b.prev == nil {
		for _, s := range b.Order {
			if s.Draining {
				b.Draining = append(b.Draining, s)
			}
		}
		return
	}
	for _, s := range b.prev.Draining {
		if b.Services.Get(s.Key) == s {
			b.Draining = append(b.Draining, s)
		}
	}
	for _, m := range b.moves {
		if m.after != nil && m.after.Draining {
			b.Draining = append(b.Draining, m.after)
		}
	}
	slices.SortFunc(b.Draining, func(a, b *Service) int { return a.Key.Compare(b.Key) })
}

// sameNames tells whether services built under c look the same under o.
func (c *Config) sameNames(o *Config) bool { return c == o || c.Domain == o.Domain && c.Node == o.Node }

func routedVersions(c *Config, keep map[Key][]string) map[Key][]string {
	out := map[Key][]string{}
	for k, v := range keep {
		out[k] = slices.Clone(v)
	}
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
func (b *build) index() {
	same := b.prev != nil && !b.population && !slices.ContainsFunc(b.moves, func(m move) bool { return !m.before.SameAddresses(m.after) })
	if same {
		// The map's values may be older pointers of the same service: ServiceAt
		// resolves them.
		b.ByAddress = b.prev.ByAddress
		return
	}
	b.ByAddress = make(map[netip.Addr]*Service, len(b.Order))
	for _, svc := range b.Order {
		for _, a := range []netip.Addr{svc.Address, svc.Address6, svc.Dedicated} {
			if a.IsValid() {
				b.ByAddress[a] = svc
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
	return s.Services.Find(found.Key)
}

func (b *build) callers() {
	if b.prev == nil || b.prev.Callers == nil || !slices.Equal(b.prev.Callers.host, b.in.HostAddresses) {
		b.Callers = newCallers(b.Config, b.in.HostAddresses)
		b.Callers.fill(b.Order)
		return
	}
	var moved []move
	for _, m := range b.moves {
		if !samePlaces(m.before, m.after) {
			moved = append(moved, m)
		}
	}
	b.Callers = b.prev.Callers.with(moved)
}

func samePlaces(a, b *Service) bool {
	var before, after []*Endpoint
	if a != nil {
		before = a.Endpoints
	}
	if b != nil {
		after = b.Endpoints
	}
	return slices.EqualFunc(before, after, func(x, y *Endpoint) bool {
		return x.Instance.Node == y.Instance.Node && x.Instance.Address == y.Instance.Address && x.Instance.NodeAddress == y.Instance.NodeAddress
	})
}

// problems collects them. They are shared with prev while nobody has others: most
// changes cause none.
func (b *build) problems() {
	b.undeclared = b.withoutService()
	if b.sameProblems() {
		b.found = b.prev.found
		b.Problems = b.found
		return
	}
	for _, svc := range b.Order {
		b.found = append(b.found, svc.Problems...)
	}
	b.found = append(b.found, b.refused...)
	b.found = append(b.found, b.Catalog.Problems...)
	b.found = append(b.found, b.undeclared...)
	if c := b.Config; len(c.Tenants) > 1 && !c.LoopbackSet {
		b.found = append(b.found, Problem{Code: "loopback_unset", Severity: discovery.SeverityInfo, Object: "loopback", Place: "loopback",
			Message: "with several tenants, callers over loopback still see all of them",
			Fix:     "write `loopback: all`, `loopback: none` or `loopback: TENANT` into roost.yaml"})
	}
	SortProblems(b.found)
	b.Problems = b.found
}

func (b *build) sameProblems() bool {
	return b.prev != nil && slices.Equal(b.refused, b.prev.refused) && slices.Equal(b.Catalog.Problems, b.prev.Catalog.Problems) &&
		slices.Equal(b.undeclared, b.prev.undeclared) && !slices.ContainsFunc(b.moves, func(m move) bool {
		return !slices.Equal(m.before.problemsOf(), m.after.problemsOf())
	})
}

func (s *Service) problemsOf() []Problem {
	if s == nil {
		return nil
	}
	return s.Problems
}

// withoutService are the problems of instances whose service nobody has declared.
func (b *build) withoutService() (out []Problem) {
	if b.prev != nil && !b.population {
		same := true
		for k := range b.Catalog.Groups.Differs(b.prev.Catalog.Groups) {
			same = same && b.Services.Get(k) != nil
		}
		if same {
			return b.prev.undeclared
		}
	}
	for key, group := range b.Catalog.Groups.All() {
		if b.Services.Get(key) != nil {
			continue
		}
		for _, i := range group.Instances {
			out = append(out, Problem{Code: "service_undeclared", Severity: discovery.SeverityError, Object: i.QualifiedName(), Place: i.Origin,
				Message: fmt.Sprintf("is an instance of %s, which nobody has declared; it takes no traffic", key),
				Fix:     fmt.Sprintf("declare the service in roost.yaml, or run `roost service create %s --port PORT`", key)})
		}
	}
	SortProblems(out)
	return out
}

// SortProblems orders by severity, code, object and place.
func SortProblems(p []Problem) { slices.SortStableFunc(p, compareProblems) }

var severityRank = map[string]int{discovery.SeverityError: 0, discovery.SeverityWarning: 1, discovery.SeverityInfo: 2}

func compareProblems(a, b Problem) int {
	return cmp.Or(cmp.Compare(severityRank[a.Severity], severityRank[b.Severity]), strings.Compare(a.Code, b.Code), strings.Compare(a.Object, b.Object), strings.Compare(a.Place, b.Place))
}

// routes resolves the declared routes and public listeners; they resolve alike
// while the services are the same with the same specs.
func (b *build) routes() {
	if b.prev != nil && !b.population && !b.specs {
		b.Routing = b.prev.Routing
		return
	}
	r := resolver{s: b.Snapshot, listeners: map[string]*Listener{}}
	b.Routing = r.run()
	if b.prev != nil {
		b.Routing = b.sharing(b.prev.Routing)
	}
}

// sharing is r with what is the same in prev taken from there.
func (r *Routing) sharing(prev *Routing) *Routing {
	same := reflect.DeepEqual(r.Listeners, prev.Listeners) && slices.Equal(r.refused, prev.refused)
	if same {
		r.Listeners = prev.Listeners
	}
	same = share(r.Routes, prev.Routes) && same
	if share(r.Mesh, prev.Mesh) && same {
		return prev
	}
	return r
}

func share[K comparable](now, prev map[K][]*Route) (same bool) {
	same = len(now) == len(prev)
	for k, routes := range now {
		if reflect.DeepEqual(routes, prev[k]) {
			now[k] = prev[k]
		} else {
			same = false
		}
	}
	return same
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
	more = slices.Clone(more)
	SortProblems(more)
	out := make([]Problem, 0, len(s.Problems)+len(more))
	for _, p := range s.Problems {
		for len(more) > 0 && compareProblems(more[0], p) < 0 {
			out, more = append(out, more[0]), more[1:]
		}
		out = append(out, p)
	}
	out = append(out, more...)
	s.Problems = out
}
