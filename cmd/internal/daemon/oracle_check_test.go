package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	mdns "github.com/miekg/dns"

	"github.com/roostmesh/roost/dns"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds/envoy"
)

// answer is an address as somebody was told it.
type answer struct {
	key     lb.Key
	address netip.Addr
}

// decoder reads resources as Envoy does, each once.
type decoder struct{ seen map[*envoy.Resource]any }

func newDecoder() *decoder { return &decoder{map[*envoy.Resource]any{}} }

// heard is a listener: where it listens, and what its chains lead to.
type heard struct {
	at       []netip.AddrPort
	clusters []string
	routes   []string
}

func (d *decoder) listener(r *envoy.Resource) heard {
	return decode(d, r, func(l *listenerv3.Listener) (h heard) {
		addresses := []*listenerv3.AdditionalAddress{{Address: l.GetAddress()}}
		for _, a := range append(addresses, l.GetAdditionalAddresses()...) {
			s := a.GetAddress().GetSocketAddress()
			h.at = append(h.at, netip.AddrPortFrom(netip.MustParseAddr(s.GetAddress()), uint16(s.GetPortValue())))
		}
		for _, chain := range l.GetFilterChains() {
			for _, f := range chain.GetFilters() {
				if f.GetTypedConfig() == nil {
					continue
				}
				m, err := f.GetTypedConfig().UnmarshalNew()
				if err != nil {
					panic(err)
				}
				switch m := m.(type) {
				case *tcpproxyv3.TcpProxy:
					h.clusters = append(h.clusters, m.GetCluster())
				case *hcmv3.HttpConnectionManager:
					h.routes = append(h.routes, m.GetRds().GetRouteConfigName())
				}
			}
		}
		return h
	})
}

func (d *decoder) route(r *envoy.Resource) []string {
	return decode(d, r, func(c *routev3.RouteConfiguration) (out []string) {
		for _, h := range c.GetVirtualHosts() {
			for _, r := range h.GetRoutes() {
				a := r.GetRoute()
				if a.GetCluster() != "" {
					out = append(out, a.GetCluster())
				}
				for _, share := range a.GetWeightedClusters().GetClusters() {
					out = append(out, share.GetName())
				}
			}
		}
		return out
	})
}

func (d *decoder) cluster(r *envoy.Resource) string {
	return decode(d, r, func(c *clusterv3.Cluster) string {
		if name := c.GetEdsClusterConfig().GetServiceName(); name != "" {
			return name
		}
		return c.GetName()
	})
}

func (d *decoder) endpoints(r *envoy.Resource) []netip.Addr {
	return decode(d, r, func(a *endpointv3.ClusterLoadAssignment) (out []netip.Addr) {
		for _, group := range a.GetEndpoints() {
			for _, e := range group.GetLbEndpoints() {
				out = append(out, netip.MustParseAddr(e.GetEndpoint().GetAddress().GetSocketAddress().GetAddress()))
			}
		}
		return out
	})
}

func decode[M any, T any](d *decoder, r *envoy.Resource, read func(M) T) T {
	if v, ok := d.seen[r]; ok {
		return v.(T)
	}
	m, err := r.Message()
	if err != nil {
		panic(err)
	}
	v := read(m.(M))
	d.seen[r] = v
	return v
}

// reachable says which instances a connection to an address gets to.
type reachable struct {
	at map[netip.AddrPort][]netip.Addr
}

// reaches follows what a proxy holds, from the address to the instances.
func (w *world) reaches(p *proxy) *reachable {
	if p.index != nil {
		return p.index
	}
	p.index = &reachable{at: map[netip.AddrPort][]netip.Addr{}}
	for n, r := range p.holds {
		if n.Type != envoy.Listener || n.Name == envoy.CaptureListener {
			continue
		}
		l := w.decoded.listener(r)
		clusters := slices.Clone(l.clusters)
		for _, name := range l.routes {
			if route := p.holds[envoy.Name{Type: envoy.Route, Name: name}]; route != nil {
				clusters = append(clusters, w.decoded.route(route)...)
			}
		}
		for _, name := range clusters {
			c := p.holds[envoy.Name{Type: envoy.Cluster, Name: name}]
			if c == nil {
				continue
			}
			if a := p.holds[envoy.Name{Type: envoy.Endpoint, Name: w.decoded.cluster(c)}]; a != nil {
				for _, at := range l.at {
					p.index.at[at] = append(p.index.at[at], w.decoded.endpoints(a)...)
				}
			}
		}
	}
	return p.index
}

// instanceAddress tells by itself of which service an instance is.
func instanceAddress(key lb.Key, n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(slices.Index(oracleKeys, key)), byte(n >> 8), byte(n)})
}

func instanceOf(a netip.Addr) lb.Key { return oracleKeys[a.As4()[1]] }

// checkCalls: whoever was told an address reaches the service that it was told
// for, or nothing, through every proxy that is alive.
func (w *world) checkCalls() {
	for told := range w.told {
		for _, p := range w.proxies {
			for _, port := range oraclePorts {
				reached := w.reaches(p).at[netip.AddrPortFrom(told.address, port)]
				if len(reached) > 0 {
					w.seen.reached++
				} else {
					w.seen.silent++
				}
				for _, i := range reached {
					if instanceOf(i) != told.key {
						w.t.Fatalf("%s was told as %s until %s, and reaches an instance of %s through %s (now %s)",
							told.address, told.key, w.told[told].Format(time.TimeOnly), instanceOf(i), p.id, w.now.Format(time.TimeOnly))
					}
				}
			}
		}
	}
}

// checkBuild holds the ledger, the Snapshot, the views and DNS against what was
// before.
func (w *world) checkBuild(err error) {
	records := w.d.ledger.Records()
	w.checkLedger(records)
	w.count(records)
	w.records = records
	s := w.d.snapshot.Load()
	if s.Version == w.checked {
		return
	}
	w.checked = s.Version
	if err == nil && w.disk.mode == writeWell && !w.r.dirty {
		w.checkExistence(s)
	}
	w.checkConstancy(s)
	w.checkQuarantine(s)
	w.checkViews()
}

// checkLedger: an address has one owner, a service one address, and nothing
// changes hands or moves without having been free.
func (w *world) checkLedger(records []ledger.Record) {
	type slot struct {
		ledger.Owner
		kind string
		v6   bool
	}
	at, of := map[netip.Addr]ledger.Record{}, map[slot]netip.Addr{}
	for _, r := range records {
		s := slot{r.Owner, r.Kind, r.Address.Is6()}
		if other, twice := at[r.Address]; twice {
			w.t.Fatalf("%s is %s's and %s's", r.Address, r.Owner, other.Owner)
		}
		if other, twice := of[s]; twice {
			w.t.Fatalf("%s has %s and %s", r.Owner, r.Address, other)
		}
		at[r.Address], of[s] = r, r.Address
	}
	for _, was := range w.records {
		now, kept := at[was.Address]
		if kept && now.Owner != was.Owner {
			w.t.Fatalf("%s went from %s to %s at once", was.Address, was.Owner, now.Owner)
		}
		if moved := of[slot{was.Owner, was.Kind, was.Address.Is6()}]; moved.IsValid() && moved != was.Address {
			w.t.Fatalf("%s of %s became %s", was.Address, was.Owner, moved)
		}
		if !kept && was.State == ledger.Bound {
			w.t.Fatalf("%s of %s was free at once", was.Address, was.Owner)
		}
	}
}

// count tells how addresses fared since the last build.
func (w *world) count(records []ledger.Record) {
	was := map[netip.Addr]ledger.Record{}
	for _, r := range w.records {
		was[r.Address] = r
	}
	for _, r := range records {
		before, had := was[r.Address]
		delete(was, r.Address)
		switch {
		case r.State == ledger.Quarantined && before.State == ledger.Bound:
			w.seen.quarantined++
		case r.State == ledger.Bound && before.State == ledger.Quarantined:
			w.seen.again++
		case !had && w.last[r.Address] != (ledger.Owner{}) && w.last[r.Address] != r.Owner:
			w.seen.reused++
		}
		w.last[r.Address] = r.Owner
	}
	w.seen.freed += len(was)
}

// checkExistence: what was created and not deleted exists, and nothing else.
func (w *world) checkExistence(s *lb.Snapshot) {
	for _, key := range oracleKeys {
		_, declared := w.model.declared[key]
		if exists := s.Services.Get(key) != nil; exists != (declared || w.model.recorded[key]) {
			w.t.Fatalf("service %s exists: %v; declared %v, recorded %v", key, exists, declared, w.model.recorded[key])
		}
	}
}

// checkConstancy: what a service has once it keeps.
func (w *world) checkConstancy(s *lb.Snapshot) {
	for _, key := range oracleKeys {
		svc := s.Services.Get(key)
		if svc == nil {
			delete(w.model.since, key)
			continue
		}
		was := w.model.since[key]
		keep := func(what string, was *netip.Addr, now netip.Addr) {
			if was.IsValid() && now != *was {
				w.t.Fatalf("%s of %s was %s and is %s", what, key, was, now)
			}
			*was = now
		}
		keep("internal address", &was.Internal, svc.Address)
		keep("internal address", &was.Internal6, svc.Address6)
		if svc.Spec.DedicatedPool == "" {
			was.Dedicated = netip.Addr{}
		}
		keep("dedicated IP", &was.Dedicated, svc.Dedicated)
		w.model.since[key] = was
	}
}

var oracleViews = []lb.View{{Kind: lb.ViewAll}, {Kind: lb.ViewTenant, Tenant: oracleTenants[0]}, {Kind: lb.ViewTenant, Tenant: oracleTenants[1]}}

// ask is what DNS says of a service to one caller.
func ask(s *lb.Snapshot, v lb.View, key lb.Key) (out []dns.RR) {
	name := key.Service + "." + key.Tenant
	out = append(out, dns.Resolve(s, v, name+".roost", mdns.TypeA).Answers...)
	out = append(out, dns.Resolve(s, v, name+".roost", mdns.TypeAAAA).Answers...)
	return append(out, dns.Resolve(s, v, name+".dedicated.roost", mdns.TypeA).Answers...)
}

// checkQuarantine: DNS and proxies know nothing of an address that waits.
func (w *world) checkQuarantine(s *lb.Snapshot) {
	waits := map[string]ledger.Record{}
	for _, r := range w.records {
		if r.State == ledger.Quarantined {
			waits[r.Address.String()] = r
		}
	}
	if len(waits) == 0 || w.disk.mode == writeDying {
		return
	}
	for _, key := range oracleKeys {
		for _, rr := range ask(s, oracleViews[0], key) {
			if r, ok := waits[rr.Data]; ok {
				w.t.Fatalf("DNS answers %s with %s, which is in quarantine: %+v", key, rr.Data, r)
			}
		}
	}
	for text := range waits {
		if reverse, err := mdns.ReverseAddr(text); err != nil || len(dns.Resolve(s, oracleViews[0], reverse, mdns.TypePTR).Answers) > 0 {
			w.t.Fatalf("DNS names %s, which is in quarantine", text)
		}
	}
	if !w.r.served {
		return
	}
	for id, l := range w.viewed() {
		for _, at := range l {
			if r, ok := waits[at.Addr().String()]; ok {
				w.t.Fatalf("the world of %s has %s, which is in quarantine: %+v", id, at, r)
			}
		}
	}
}

// viewed are all listeners' addresses in the World of now, by kind of proxy.
func (w *world) viewed() map[string][]netip.AddrPort {
	out := map[string][]netip.AddrPort{}
	for _, who := range []lb.Identity{{Role: lb.Node, Node: "h1"}, {Role: lb.Gateway, Group: "edge"}, {Role: lb.Sidecar, Tenant: oracleTenants[0], Service: "s0"}, {Role: lb.Sidecar, Tenant: oracleTenants[1], Service: "s0"}} {
		id := fmt.Sprint(who.Role, " ", who.Tenant)
		for r := range w.r.world.View(envoy.Proxy{Identity: who}).All(envoy.Listener) {
			out[id] = append(out[id], w.decoded.listener(r).at...)
		}
	}
	return out
}

// checkViews: no two listeners of one proxy have the same address and port.
func (w *world) checkViews() {
	if !w.r.served {
		return
	}
	for id, all := range w.viewed() {
		slices.SortFunc(all, netip.AddrPort.Compare)
		for n := range all[:max(len(all)-1, 0)] {
			if all[n] == all[n+1] {
				w.t.Fatalf("two listeners of %s are on %s", id, all[n])
			}
		}
	}
}
