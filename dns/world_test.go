package dns

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testNode = "h1"

// Callers of the world.
const (
	fromHost   = "127.0.0.1"  // the host itself: everything
	fromAcme   = "10.42.0.9"  // clients of acme
	fromGlobex = "10.43.0.9"  // clients of globex; no instance
	fromWeb    = "10.43.0.7"  // clients of globex, and the instance of globex/web
	fromShop   = "10.44.0.7"  // the instance of acme/shop
	fromNobody = "10.99.1.23" // neither
	localAddr  = "192.0.2.53" // the DNS server
)

func ports(p ...lb.PortSpec) []lb.PortSpec { return p }

type worldService struct {
	spec lb.ServiceSpec
	addr lb.Addresses
}

func key(tenant, service string) lb.Key { return lb.Key{Tenant: tenant, Service: service} }

// worldServices are: acme/shop with everything, seen by globex/web, too;
// acme/db with an IPv4 address only; acme/empty without port and address;
// globex/web and globex/api; initech/vault that no other tenant sees;
// umbrella/gate whose addresses lie outside the pools.
func worldServices() []worldService {
	ip := netip.MustParseAddr
	http := lb.PortSpec{Name: "http", Port: 80, Protocol: lb.HTTP}
	return []worldService{
		{lb.ServiceSpec{Key: key("acme", "shop"), Ports: ports(http, lb.PortSpec{Name: "game", Port: 27015, Protocol: lb.UDP}),
			Allow: []lb.Grant{{Tenant: "globex", Service: "web"}}, DedicatedPool: "public"},
			lb.Addresses{Internal: ip("127.128.0.1"), Internal6: ip("fd00:1::1"), Dedicated: ip("198.51.100.17")}},
		{lb.ServiceSpec{Key: key("acme", "db"), Ports: ports(lb.PortSpec{Name: "postgres", Port: 5432, Protocol: lb.TCP})},
			lb.Addresses{Internal: ip("127.128.0.2")}},
		{lb.ServiceSpec{Key: key("acme", "empty")}, lb.Addresses{}},
		{lb.ServiceSpec{Key: key("globex", "web"), Ports: ports(http), DedicatedPool: "public6"},
			lb.Addresses{Internal: ip("127.128.0.3"), Dedicated: ip("2001:db8::17")}},
		{lb.ServiceSpec{Key: key("globex", "api"), Ports: ports(http), Allow: []lb.Grant{{Tenant: "acme"}}},
			lb.Addresses{Internal: ip("127.128.0.4")}},
		{lb.ServiceSpec{Key: key("initech", "vault"), Ports: ports(http)},
			lb.Addresses{Internal: ip("127.128.0.5"), Internal6: ip("fd00:1::5")}},
		{lb.ServiceSpec{Key: key("umbrella", "gate"), Ports: ports(http)},
			lb.Addresses{Internal: ip("100.64.0.1")}},
	}
}

type worldOption func(*lb.Input)

func notReady(in *lb.Input)                   { in.Catalog.Ready = false }
func domain(d string) worldOption             { return func(in *lb.Input) { in.Config.Domain = d } }
func loopback(who string) worldOption         { return func(in *lb.Input) { in.Config.Loopback = who } }
func ttl(d time.Duration) worldOption         { return func(in *lb.Input) { in.Config.TTL = d } }
func parse(t testing.TB, a string) netip.Addr { t.Helper(); return netip.MustParseAddr(a) }

// world builds the Snapshot that the answering tests speak of.
func world(options ...worldOption) *lb.Snapshot {
	prefix := netip.MustParsePrefix
	in := lb.Input{
		Config: &lb.Config{
			Domain: "roost", Node: testNode, TTL: 30 * time.Second, Loopback: lb.LoopbackAll, LoopbackSet: true,
			InternalPools: []netip.Prefix{prefix("127.128.0.0/9"), prefix("fd00:1::/66")},
			DedicatedPools: []lb.DedicatedPool{{Name: "public", Prefix: prefix("198.51.100.16/28")},
				{Name: "public6", Prefix: prefix("2001:db8::/64")}},
			Tenants: []*lb.Tenant{
				{Name: "acme", Clients: []lb.Client{{Prefix: prefix("10.42.0.0/16")}}},
				{Name: "globex", Clients: []lb.Client{{Prefix: prefix("10.43.0.0/16")}}},
			},
		},
		Catalog:   &discovery.Catalog{Ready: true},
		Addresses: map[lb.Key]lb.Addresses{},
	}
	for _, s := range worldServices() {
		in.Services = append(in.Services, &s.spec)
		in.Addresses[s.spec.Key] = s.addr
	}
	groups := map[lb.Key]*discovery.Group{}
	for k, a := range map[lb.Key]string{key("acme", "shop"): fromShop, key("globex", "web"): fromWeb} {
		groups[k] = &discovery.Group{Key: k, Instances: []*discovery.Instance{{ID: k.Service + "-1", Node: testNode, Key: k,
			Address: netip.MustParseAddr(a), Ports: []discovery.Port{{Number: 8080}}, Weight: 1, Health: discovery.Passing}}}
	}
	in.Catalog.Groups = discovery.TableOf(groups)
	for _, o := range options {
		o(&in)
	}
	return lb.Build(nil, in)
}

// newServer makes a Server that answers from snap.
func newServer(t testing.TB, snap *lb.Snapshot, change ...func(*Config)) *Server {
	t.Helper()
	cfg := Config{Snapshot: func() *lb.Snapshot { return snap }, Domain: "roost", Node: testNode, Log: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// query packs a question.
func query(t testing.TB, name string, qtype uint16, change ...func(*dns.Msg)) []byte {
	t.Helper()
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	for _, c := range change {
		c(m)
	}
	out, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func withEDNS(size uint16, do bool) func(*dns.Msg) {
	return func(m *dns.Msg) { m.SetEdns0(size, do) }
}

// ask puts a packet to the handler and unpacks the reply; nil is silence.
func ask(t testing.TB, s *Server, pkt []byte, c client) *dns.Msg {
	t.Helper()
	reply, f := s.handle(pkt, c, make([]byte, replySize))
	if f != nil {
		t.Fatalf("%v is forwarded", f.msg.Question)
	}
	if reply == nil {
		return nil
	}
	m := new(dns.Msg)
	if err := m.Unpack(reply); err != nil {
		t.Fatalf("reply %x: %v", reply, err)
	}
	return m
}

// text writes the sections of a reply that hold records, one record a line.
func text(m *dns.Msg) string {
	var out []string
	add := func(mark string, rrs []dns.RR) {
		for _, rr := range rrs {
			if rr.Header().Rrtype != dns.TypeOPT {
				out = append(out, mark+strings.Join(strings.Fields(rr.String()), " "))
			}
		}
	}
	add("", m.Answer)
	add("auth ", m.Ns)
	add("more ", m.Extra)
	return strings.Join(append([]string{rcodeName(m.Rcode)}, out...), "\n")
}
