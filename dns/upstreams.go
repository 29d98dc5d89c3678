package dns

import (
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

// portDNS is where a resolv.conf's nameservers listen.
const portDNS = 53

// forwarding knows where names that are not ours go.
type forwarding struct {
	// Fixed at construction.
	rules   []Forwarder
	log     *slog.Logger
	metrics *metrics
	slots   chan struct{} // one for each forward at the moment

	// Owned by the caller of load: one at a time.
	files map[string]*resolvConf

	table atomic.Pointer[table]
}

// table is what load has made of the rules. It is immutable but for what
// upstreams remember.
type table struct {
	routes   map[string]*route // by zone: lower case, with the dot at its end
	servers  map[netip.AddrPort]*upstream
	problems []lb.Problem
}

// route is the upstream servers of one zone, the preferred one first.
type route struct {
	zone    string
	servers []*upstream
	skipped []netip.AddrPort // our own addresses
}

// upstream is one server. It outlives the table, so that its failure is
// remembered.
type upstream struct {
	addr        netip.AddrPort
	failedUntil atomic.Int64 // Unix nanoseconds; until then it is asked last
}

// resolvConf is a file as it was read last. An error keeps the servers.
type resolvConf struct {
	info    fs.FileInfo
	servers []netip.AddrPort
	err     error
}

func newForwarding(rules []Forwarder, log *slog.Logger, m *metrics) *forwarding {
	return &forwarding{rules: rules, log: log, metrics: m, slots: make(chan struct{}, maxForwards), files: map[string]*resolvConf{}}
}

// possible tells whether any name at all is forwarded.
func (f *forwarding) possible() bool { return len(f.rules) > 0 }

func (f *forwarding) problems() []lb.Problem { return slices.Clone(f.table.Load().problems) }

// load reads the files that have changed and publishes a new table. own are
// the addresses at which this server listens.
func (f *forwarding) load(own []netip.AddrPort) {
	before := f.table.Load()
	if before == nil {
		before = &table{}
	}
	t := &table{routes: map[string]*route{}, servers: map[netip.AddrPort]*upstream{}}
	mine := ownAddresses(own)
	for _, rule := range f.rules {
		zone := strings.ToLower(dns.Fqdn(rule.Zone))
		r := t.routes[zone]
		if r == nil {
			r = &route{zone: zone}
			t.routes[zone] = r
		}
		servers := slices.Clone(rule.To)
		for _, path := range rule.Files {
			servers = append(servers, f.read(path)...)
		}
		for _, a := range servers {
			r.add(t, before, mine, reachable(a))
		}
	}
	t.problems = f.faults(t, before)
	f.table.Store(t)
}

func (r *route) add(t, before *table, mine func(netip.AddrPort) bool, a netip.AddrPort) {
	if mine(a) {
		if !slices.Contains(r.skipped, a) {
			r.skipped = append(r.skipped, a)
		}
		return
	}
	u := t.servers[a]
	if u == nil {
		if u = before.servers[a]; u == nil {
			u = &upstream{addr: a}
		}
		t.servers[a] = u
	}
	if !slices.Contains(r.servers, u) {
		r.servers = append(r.servers, u)
	}
}

// faults are the Problems of a table; those that were there before keep their
// time.
func (f *forwarding) faults(t, before *table) []lb.Problem {
	var out []lb.Problem
	add := func(p lb.Problem) {
		p.Place, p.Since = "dns.forward", time.Now()
		for _, b := range before.problems {
			if b.Code == p.Code && b.Object == p.Object {
				p.Since = b.Since
			}
		}
		out = append(out, p)
	}
	for _, zone := range slices.Sorted(maps.Keys(t.routes)) {
		if r := t.routes[zone]; len(r.servers) == 0 && len(r.skipped) > 0 {
			add(lb.Problem{Code: "forward_loop", Severity: lb.SeverityError, Object: zone,
				Message: fmt.Sprintf("its only servers (%s) are this server itself; names in it are answered with SERVFAIL", join(r.skipped)),
				Fix:     "name a real upstream server in dns.forward: `forward: [IP:53]`"})
		}
	}
	for _, path := range slices.Sorted(maps.Keys(f.files)) {
		if file := f.files[path]; file.err != nil {
			add(lb.Problem{Code: "forward_unreadable", Severity: lb.SeverityWarning, Object: path,
				Message: fmt.Sprintf("%v; the servers that it named before stay: %s", file.err, join(file.servers)),
				Fix:     "mend the file, or name the servers in dns.forward: `forward: [IP:53]`"})
		}
	}
	return out
}

// read gives the nameservers of a resolv.conf file, which it reads only when
// the file is not the one that it has read before.
func (f *forwarding) read(path string) []netip.AddrPort {
	file := f.files[path]
	if file == nil {
		file = &resolvConf{}
		f.files[path] = file
	}
	info, err := os.Stat(path)
	if err == nil && file.err == nil && file.info != nil && os.SameFile(info, file.info) &&
		info.ModTime().Equal(file.info.ModTime()) && info.Size() == file.info.Size() {
		return file.servers
	}
	var servers []netip.AddrPort
	if err == nil {
		servers, err = nameservers(path)
	}
	if err == nil && len(servers) == 0 {
		err = fmt.Errorf("%s: names no nameserver", path)
	}
	if err != nil {
		if file.err == nil || file.err.Error() != err.Error() {
			f.log.Warn("DNS upstream file is of no use; its last servers stay", "path", path, "error", err)
		}
		file.err = err
		return file.servers
	}
	if file.err != nil || !slices.Equal(servers, file.servers) {
		f.log.Info("DNS upstream servers read", "path", path, "servers", join(servers))
	}
	file.info, file.servers, file.err = info, servers, nil
	return servers
}

func nameservers(path string) ([]netip.AddrPort, error) {
	in, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = in.Close() }()
	conf, err := dns.ClientConfigFromReader(in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var out []netip.AddrPort
	for _, s := range conf.Servers {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.AddrPortFrom(a, portDNS))
		}
	}
	return out, nil
}

// reachable writes an address as one that can be asked: 0.0.0.0 is this host.
func reachable(a netip.AddrPort) netip.AddrPort {
	addr := a.Addr().Unmap()
	switch addr.WithZone("") {
	case netip.IPv4Unspecified():
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case netip.IPv6Unspecified():
		addr = netip.IPv6Loopback()
	}
	return netip.AddrPortFrom(addr, a.Port())
}

// ownAddresses tells which addresses lead back to this server, also by way of
// a wildcard address.
func ownAddresses(own []netip.AddrPort) func(netip.AddrPort) bool {
	var host []netip.Addr
	if slices.ContainsFunc(own, func(a netip.AddrPort) bool { return a.Addr().IsUnspecified() }) {
		// Without the interfaces' addresses only loopback is known as ours.
		interfaces, _ := net.InterfaceAddrs()
		for _, i := range interfaces {
			if p, err := netip.ParsePrefix(i.String()); err == nil {
				host = append(host, p.Addr().Unmap().WithZone(""))
			}
		}
	}
	return func(a netip.AddrPort) bool {
		addr := a.Addr().WithZone("")
		return slices.ContainsFunc(own, func(o netip.AddrPort) bool {
			switch mine := o.Addr().Unmap().WithZone(""); {
			case o.Port() != a.Port():
				return false
			case mine.IsUnspecified():
				return mine.Is4() == addr.Is4() && (addr.IsLoopback() || slices.Contains(host, addr))
			default:
				return mine == addr
			}
		})
	}
}

// routeFor finds the route of the longest zone that a name lies in. route is
// never nil when configured.
func (f *forwarding) routeFor(name string) (r *route, configured bool) {
	t := f.table.Load()
	if len(t.routes) == 0 {
		return nil, false
	}
	name = lower(name)
	for off, end := 0, false; !end; off, end = dns.NextLabel(name, off) {
		if r := t.routes[name[off:]]; r != nil {
			return r, true
		}
	}
	r = t.routes["."]
	return r, r != nil
}

func join(addrs []netip.AddrPort) string {
	if len(addrs) == 0 {
		return "none"
	}
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return strings.Join(out, ", ")
}
