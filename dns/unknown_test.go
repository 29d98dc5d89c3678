package dns

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

func TestUnknownCallers(t *testing.T) {
	tests := []struct {
		name, from, query string
		options           []worldOption
		want              string // object of the Problem; "" is none
	}{
		{"nobody", fromNobody, "shop.acme.roost", nil, "10.99.1.0/24"},
		{"IPv6", "2001:db8:1:2::9", "nosuch.acme.roost", nil, "2001:db8:1:2::/64"},
		{"IPv4 in IPv6", "::ffff:10.99.1.23", "shop.acme.roost", nil, "10.99.1.0/24"},
		{"known", fromAcme, "shop.acme.roost", nil, ""},
		{"known, hidden", fromGlobex, "shop.acme.roost", nil, ""},
		{"dedicated", fromNobody, "shop.acme.dedicated.roost", nil, ""},
		{"apex", fromNobody, "roost", nil, ""},
		{"name server", fromNobody, "ns.roost", nil, ""},
		{"foreign", fromNobody, "example.com", nil, ""},
		{"reverse", fromNobody, "1.0.128.127.in-addr.arpa", nil, ""},
		{"loopback none", fromHost, "shop.acme.roost", []worldOption{loopback(lb.LoopbackNone)}, ""},
		{"not ready", fromNobody, "shop.acme.roost", []worldOption{notReady}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t, world(test.options...))
			for range 3 {
				ask(t, s, query(t, test.query, dns.TypeA), client{from: parse(t, test.from)})
			}
			got := s.Problems()
			if test.want == "" {
				if len(got) != 0 {
					t.Errorf("problems %v", got)
				}
				return
			}
			if len(got) != 1 || got[0].Code != "caller_unknown" || got[0].Object != test.want || got[0].Since.IsZero() ||
				!strings.Contains(got[0].Message, "3 times") || !strings.Contains(got[0].Message, "node h1") ||
				!strings.Contains(got[0].Fix, "`tenants: {TENANT: {clients: ["+test.want+"]}}`") {
				t.Errorf("problems %+v", got)
			}
		})
	}
}

func TestUnknownCallersAreBoundedAndExpire(t *testing.T) {
	u := newUnknownCallers(testNode)
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	network := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i), 0, 1}) }
	for i := range maxUnknown + 50 {
		u.note(start, network(i), "why")
	}
	if got := len(u.problems(start)); got != maxUnknown {
		t.Errorf("%d networks, want %d", got, maxUnknown)
	}
	u.note(start.Add(unknownFor/2), network(3), "why")
	u.note(start.Add(unknownFor+1), network(200), "why")
	if got := len(u.problems(start.Add(unknownFor + 1))); got != 2 {
		t.Errorf("%d networks after a while, want the two that asked since", got)
	}
	if got := u.problems(start.Add(3 * unknownFor)); len(got) != 0 {
		t.Errorf("%v after everybody has fallen silent", got)
	}
}
