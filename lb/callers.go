package lb

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/roostmesh/roost/discovery"
)

// ViewKind is how much a caller may see.
type ViewKind uint8

// Nobody sees only public names; a tenant its own services and what was
// granted to it; All everything.
const (
	ViewNobody ViewKind = iota
	ViewTenant
	ViewAll
)

// View is what one caller may see.
type View struct {
	Kind    ViewKind
	Tenant  string
	Service string // the caller's own service where it is known
	Why     string // the rule that decided, for people
}

// String is the tenant, "all" or "nobody".
func (v View) String() string {
	switch v.Kind {
	case ViewAll:
		return "all"
	case ViewTenant:
		return v.Tenant
	}
	return "nobody"
}

// Sees tells whether s exists for this caller.
func (v View) Sees(s *Service) bool {
	return v.Kind == ViewAll || v.Kind == ViewTenant && s.Allows(v.Tenant, v.Service)
}

// Callers knows who a source address is on each node. It is immutable.
type Callers struct {
	loopback string
	host     []netip.Addr        // addresses of this host's interfaces
	shared   *bart.Table[string] // clients of every node
	byNode   map[string]*bart.Table[string]
	nodes    Table[string, *nodeCallers]
}

// nodeCallers are the instances on one node, by address. Callers share it
// until an instance of that node comes or goes.
type nodeCallers struct {
	at      map[netip.Addr]map[Key]int // how many instances of a service
	own     map[netip.Addr]int         // addresses of the node itself, and how many say so
	tenants map[string]int             // instances of each tenant
}

func newCallers(c *Config, hostAddresses []netip.Addr) *Callers {
	out := &Callers{loopback: c.Loopback, host: hostAddresses, shared: new(bart.Table[string]), byNode: map[string]*bart.Table[string]{}}
	for _, t := range c.Tenants {
		for _, client := range t.Clients {
			client.Prefix = client.Prefix.Masked()
			table := out.shared
			if client.Node != "" {
				if out.byNode[client.Node] == nil {
					out.byNode[client.Node] = new(bart.Table[string])
				}
				table = out.byNode[client.Node]
			}
			table.Insert(client.Prefix, t.Name)
		}
	}
	if len(hostAddresses) > 0 {
		n := newNodeCallers()
		for _, a := range hostAddresses {
			n.own[a.Unmap()]++
		}
		out.nodes = discovery.TableOf(map[string]*nodeCallers{c.Node: n})
	}
	return out
}

// fill counts the instances of all services; only before c is shared.
func (c *Callers) fill(services []*Service) {
	nodes := map[string]*nodeCallers{}
	for node, n := range c.nodes.All() {
		nodes[node] = n
	}
	for _, s := range services {
		for _, e := range s.Endpoints {
			node := e.Instance.Node
			if nodes[node] == nil {
				nodes[node] = newNodeCallers()
			}
			nodes[node].count(e, s.Key, 1)
		}
	}
	c.nodes = discovery.TableOf(nodes)
}

// with returns Callers in which some services' instances have moved; only the
// nodes that they leave or join are copied.
func (c *Callers) with(moves []move) *Callers {
	if len(moves) == 0 {
		return c
	}
	fresh := map[string]*nodeCallers{}
	nodes := c.nodes.Edit()
	apply := func(s *Service, by int) {
		if s == nil {
			return
		}
		for _, e := range s.Endpoints {
			node := e.Instance.Node
			if fresh[node] == nil {
				fresh[node] = c.nodes.Get(node).clone()
				nodes.Set(node, fresh[node])
			}
			fresh[node].count(e, s.Key, by)
		}
	}
	for _, m := range moves {
		apply(m.before, -1)
		apply(m.after, 1)
	}
	out := *c
	out.nodes = nodes.Table()
	return &out
}

func newNodeCallers() *nodeCallers {
	return &nodeCallers{at: map[netip.Addr]map[Key]int{}, own: map[netip.Addr]int{}, tenants: map[string]int{}}
}

func (n *nodeCallers) clone() *nodeCallers {
	if n == nil {
		return newNodeCallers()
	}
	out := &nodeCallers{at: make(map[netip.Addr]map[Key]int, len(n.at)), own: maps.Clone(n.own), tenants: maps.Clone(n.tenants)}
	for a, keys := range n.at {
		out.at[a] = maps.Clone(keys)
	}
	return out
}

func (n *nodeCallers) count(e *Endpoint, k Key, by int) {
	a := e.Instance.Address.Unmap()
	if n.at[a] == nil {
		n.at[a] = map[Key]int{}
	}
	if n.at[a][k] += by; n.at[a][k] <= 0 {
		delete(n.at[a], k)
	}
	if n.tenants[k.Tenant] += by; n.tenants[k.Tenant] <= 0 {
		delete(n.tenants, k.Tenant)
	}
	if own := e.Instance.NodeAddress.Unmap(); own.IsValid() {
		if n.own[own] += by; n.own[own] <= 0 {
			delete(n.own, own)
		}
	}
}

// Who says who a source address is on a node: loopback by its rule, then the
// longest clients prefix, then the address of an instance on that node unless
// it is ambiguous, else nobody.
func (c *Callers) Who(node string, addr netip.Addr) View {
	addr = addr.Unmap().WithZone("")
	if addr.IsLoopback() {
		return c.loopbackView()
	}
	tenant, known := c.client(node, addr)
	instance := c.instance(node, addr)
	if known {
		v := View{Kind: ViewTenant, Tenant: tenant, Why: "clients of tenant " + tenant}
		if instance.Kind == ViewTenant && instance.Tenant == tenant {
			v.Service = instance.Service
		}
		return v
	}
	return instance
}

func (c *Callers) loopbackView() View {
	switch c.loopback {
	case "", LoopbackAll:
		return View{Kind: ViewAll, Why: "loopback: all"}
	case LoopbackNone:
		return View{Why: "loopback: none"}
	}
	return View{Kind: ViewTenant, Tenant: c.loopback, Why: "loopback: " + c.loopback}
}

func (c *Callers) client(node string, addr netip.Addr) (string, bool) {
	host := netip.PrefixFrom(addr, addr.BitLen())
	shared, st, sok := c.shared.LookupPrefixLPM(host)
	if table := c.byNode[node]; table != nil {
		if own, t, ok := table.LookupPrefixLPM(host); ok && (!sok || own.Bits() >= shared.Bits()) {
			return t, true
		}
	}
	return st, sok
}

func (c *Callers) instance(node string, addr netip.Addr) View {
	n := c.nodes.Get(node)
	if n == nil || len(n.at[addr]) == 0 {
		return View{Why: "no clients prefix and no instance on node " + node + " has this address"}
	}
	if n.own[addr] > 0 {
		return View{Why: "the address is the node's own, so it names no instance"}
	}
	keys := slices.SortedFunc(maps.Keys(n.at[addr]), Key.Compare)
	for _, k := range keys {
		if k.Tenant != keys[0].Tenant {
			return View{Why: "instances of several tenants have this address"}
		}
	}
	v := View{Kind: ViewTenant, Tenant: keys[0].Tenant, Why: "address of an instance of " + keys[0].String()}
	if len(keys) == 1 {
		v.Service = keys[0].Service
	}
	return v
}

// Tenants lists the tenants that a node proxy serves: those with an instance
// on the node or with clients there, and the one that loopback callers are.
// all says that loopback callers are everybody.
func (c *Callers) Tenants(node string) (tenants []string, all bool) {
	set := map[string]bool{}
	if n := c.nodes.Get(node); n != nil {
		for t := range n.tenants {
			set[t] = true
		}
	}
	for _, t := range c.clientTenants(node) {
		set[t] = true
	}
	v := c.loopbackView()
	if v.Kind == ViewTenant {
		set[v.Tenant] = true
	}
	return slices.Sorted(maps.Keys(set)), v.Kind == ViewAll
}

func (c *Callers) clientTenants(node string) []string {
	var out []string
	for _, t := range c.shared.All() {
		out = append(out, t)
	}
	if table := c.byNode[node]; table != nil {
		for _, t := range table.All() {
			out = append(out, t)
		}
	}
	return out
}

// Services lists the services of which an instance runs on the node.
func (c *Callers) Services(node string) map[Key]bool {
	out := map[Key]bool{}
	if n := c.nodes.Get(node); n != nil {
		for _, keys := range n.at {
			for k := range keys {
				out[k] = true
			}
		}
	}
	return out
}

// Admitted is one range of source addresses that may call, less the narrower
// ranges inside it that are somebody else's.
type Admitted struct {
	Prefix netip.Prefix
	Except []netip.Prefix
}

var loopbacks = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// Admit lists the sources on a node from which a service of tenant that grants
// allow may be called, in a stable order. It agrees with Who.
func (c *Callers) Admit(node, tenant string, allow []Grant) []Admitted {
	s := &Service{Key: Key{Tenant: tenant}, Spec: &ServiceSpec{Allow: allow}}
	var out []Admitted
	if c.loopbackView().Sees(s) {
		for _, p := range loopbacks {
			out = append(out, Admitted{Prefix: p})
		}
	}
	effective := map[netip.Prefix]string{}
	for p, t := range c.shared.All() {
		effective[p] = t
	}
	if table := c.byNode[node]; table != nil {
		for p, t := range table.All() {
			effective[p] = t
		}
	}
	for p, t := range effective {
		if !s.Allows(t, "") || p.Addr().IsLoopback() {
			continue
		}
		a := Admitted{Prefix: p}
		for _, inner := range loopbacks {
			if p.Overlaps(inner) {
				a.Except = append(a.Except, inner) // its own rule decides, and comes first
			}
		}
		for inner, other := range effective {
			if inner.Bits() > p.Bits() && p.Overlaps(inner) && !s.Allows(other, "") {
				a.Except = append(a.Except, inner)
			}
		}
		slices.SortFunc(a.Except, netip.Prefix.Compare)
		out = append(out, a)
	}
	if n := c.nodes.Get(node); n != nil {
		for addr, keys := range n.at {
			if v := c.Who(node, addr); len(keys) > 0 && !addr.IsLoopback() && v.Sees(s) {
				out = append(out, Admitted{Prefix: netip.PrefixFrom(addr, addr.BitLen())})
			}
		}
	}
	slices.SortFunc(out, func(a, b Admitted) int { return a.Prefix.Compare(b.Prefix) })
	return slices.CompactFunc(out, func(a, b Admitted) bool { return a.Prefix == b.Prefix })
}
