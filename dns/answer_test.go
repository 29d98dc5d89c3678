package dns

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

const (
	testSOA = "auth roost. 5 IN SOA ns.roost. hostmaster.roost. 1 3600 600 86400 5"
	absent  = "NXDOMAIN\n" + testSOA
	nodata  = "NOERROR\n" + testSOA
	// forwarded stands for a name that is not ours.
	forwarded = "forwarded"
)

// answerTest is the one form of every test of what our zones answer. Each is
// asked of the packet handler and of Resolve, which have to agree.
type answerTest struct {
	name string // presentation form
	typ  string
	from string // source address
	want string // response code, then the records as dig writes them
	why  string // a part of Resolve's Why
}

func absentIn(zone string) string {
	return "NXDOMAIN\nauth " + zone + " 5 IN SOA ns.roost. hostmaster.roost. 1 3600 600 86400 5"
}

func nodataIn(zone string) string { return strings.Replace(absentIn(zone), "NXDOMAIN", "NOERROR", 1) }

var forwardTests = []answerTest{
	{"shop.acme.roost", "A", fromAcme, "NOERROR\nshop.acme.roost. 30 IN A 127.128.0.1", "service acme/shop exists, with 1 of 1 instances"},
	{"shop.acme.roost", "AAAA", fromAcme, "NOERROR\nshop.acme.roost. 30 IN AAAA fd00:1::1", "by: clients of tenant acme"},
	{"ShOp.aCmE.RoOsT", "A", fromAcme, "NOERROR\nShOp.aCmE.RoOsT. 30 IN A 127.128.0.1", ""},
	{"shop.acme.roost", "A", fromHost, "NOERROR\nshop.acme.roost. 30 IN A 127.128.0.1", "the view is all by: loopback: all"},
	{"shop.acme.roost", "A", fromShop, "NOERROR\nshop.acme.roost. 30 IN A 127.128.0.1", "by: address of an instance of acme/shop"},
	{"shop.acme.roost", "A", fromWeb, "NOERROR\nshop.acme.roost. 30 IN A 127.128.0.1", ""},
	{"shop.acme.roost", "A", fromGlobex, absent, "service acme/shop exists, but tenant globex may not call it"},
	{"shop.acme.roost", "A", fromNobody, absent, "but a caller that is nobody may not call it"},
	{"api.globex.roost", "A", fromAcme, "NOERROR\napi.globex.roost. 30 IN A 127.128.0.4", ""},
	{"nosuch.acme.roost", "A", fromAcme, absent, "tenant acme has no service nosuch"},
	{"shop.nosuch.roost", "A", fromAcme, absent, "tenant nosuch has no service shop"},

	{"db.acme.roost", "A", fromAcme, "NOERROR\ndb.acme.roost. 30 IN A 127.128.0.2", "with 0 of 0 instances"},
	{"db.acme.roost", "AAAA", fromAcme, nodata, "has no record of type AAAA"},
	{"db.acme.roost", "MX", fromAcme, nodata, "has no record of type MX"},
	{"db.acme.roost", "TYPE65399", fromAcme, nodata, ""},
	{"db.acme.roost", "ANY", fromAcme, "NOERROR\ndb.acme.roost. 30 IN HINFO \"RFC8482\" \"\"", ""},
	{"db.acme.roost", "AXFR", fromAcme, "REFUSED", "nobody may copy a zone"},
	{"roost", "IXFR", fromHost, "REFUSED", ""},
	{"empty.acme.roost", "A", fromAcme, nodata, ""},
	{"empty.acme.roost", "ANY", fromAcme, nodata, ""},

	{"roost", "SOA", fromNobody, "NOERROR\nroost. 30 IN SOA ns.roost. hostmaster.roost. 1 3600 600 86400 5", "belongs to the zone itself"},
	{"ROOST", "NS", fromNobody, "NOERROR\nROOST. 30 IN NS ns.roost.\nmore ns.roost. 30 IN A 192.0.2.53", ""},
	{"roost", "A", fromHost, nodata, ""},
	{"ns.roost", "A", fromNobody, "NOERROR\nns.roost. 30 IN A 192.0.2.53", ""},
	{"ns.roost", "AAAA", fromNobody, nodata, ""},

	{"acme.roost", "A", fromAcme, nodata, "names below it"},
	{"acme.roost", "ANY", fromAcme, nodata, ""},
	{"acme.roost", "A", fromWeb, nodata, ""}, // shop is granted to it
	{"acme.roost", "A", fromGlobex, absent, "tenant acme has no service that tenant globex may call"},
	{"initech.roost", "A", fromAcme, absent, ""},
	{"acme.roost", "A", fromNobody, absent, ""},
	{"nosuch.roost", "A", fromHost, absent, ""},

	{"_http._tcp.shop.acme.roost", "SRV", fromAcme, "NOERROR\n_http._tcp.shop.acme.roost. 30 IN SRV 0 0 80 shop.acme.roost.\n" +
		"more shop.acme.roost. 30 IN A 127.128.0.1\nmore shop.acme.roost. 30 IN AAAA fd00:1::1", ""},
	{"_GAME._udp.shop.acme.roost", "SRV", fromAcme, "NOERROR\n_GAME._udp.shop.acme.roost. 30 IN SRV 0 0 27015 shop.acme.roost.\n" +
		"more shop.acme.roost. 30 IN A 127.128.0.1\nmore shop.acme.roost. 30 IN AAAA fd00:1::1", ""},
	{"_http._tcp.shop.acme.roost", "A", fromAcme, nodata, ""},
	{"_http._udp.shop.acme.roost", "SRV", fromAcme, absent, "no such port; it has _http._tcp, _game._udp"},
	{"_game._tcp.shop.acme.roost", "SRV", fromAcme, absent, ""},
	{"http._tcp.shop.acme.roost", "SRV", fromAcme, absent, ""},
	{"_._tcp.shop.acme.roost", "SRV", fromAcme, absent, ""},
	{"_http._tcp.shop.acme.roost", "SRV", fromGlobex, absent, ""},
	{"_tcp.shop.acme.roost", "A", fromAcme, nodata, ""},
	{"_tcp.db.acme.roost", "SRV", fromAcme, nodata, ""},
	{"_udp.db.acme.roost", "SRV", fromAcme, absent, ""},
	{"_tcp.shop.acme.roost", "A", fromGlobex, absent, ""},
	{"www.shop.acme.roost", "A", fromAcme, absent, ""},
	{"a._http._tcp.shop.acme.roost", "A", fromAcme, absent, "names of this form"},
	{`shop\.acme.roost`, "A", fromHost, absent, ""},
	{`shop.acme\.roost`, "A", fromHost, forwarded, ""},
	{`a\\.roost`, "A", fromHost, absent, ""},

	{"shop.acme.dedicated.roost", "A", fromNobody, "NOERROR\nshop.acme.dedicated.roost. 30 IN A 198.51.100.17", ""},
	{"shop.acme.dedicated.roost", "A", fromGlobex, "NOERROR\nshop.acme.dedicated.roost. 30 IN A 198.51.100.17", ""},
	{"shop.acme.dedicated.roost", "AAAA", fromNobody, nodata, ""},
	{"web.globex.dedicated.roost", "AAAA", fromNobody, "NOERROR\nweb.globex.dedicated.roost. 30 IN AAAA 2001:db8::17", ""},
	{"db.acme.dedicated.roost", "A", fromAcme, absent, "service acme/db has no dedicated IP"},
	{"nosuch.acme.dedicated.roost", "A", fromAcme, absent, "tenant acme has no service nosuch"},
	{"acme.dedicated.roost", "A", fromNobody, nodata, ""},
	{"initech.dedicated.roost", "A", fromHost, absent, "no service of tenant initech has a dedicated IP"},
	{"dedicated.roost", "A", fromNobody, nodata, ""},
	{"_tcp.shop.acme.dedicated.roost", "A", fromHost, absent, ""},

	{"example.com", "A", fromAcme, forwarded, "the name is not ours"},
	{"xroost", "A", fromAcme, forwarded, ""},
	{"shop.acme.roost.example.com", "A", fromAcme, forwarded, ""},
	{".", "NS", fromAcme, forwarded, ""},
}

var reverseTests = []answerTest{
	{"1.0.128.127.in-addr.arpa", "PTR", fromAcme, "NOERROR\n1.0.128.127.in-addr.arpa. 30 IN PTR shop.acme.roost.", "bound to service acme/shop"},
	{"1.0.128.127.IN-ADDR.arpa", "PTR", fromWeb, "NOERROR\n1.0.128.127.IN-ADDR.arpa. 30 IN PTR shop.acme.roost.", ""},
	{"1.0.128.127.in-addr.arpa", "A", fromAcme, nodataIn("128.127.in-addr.arpa."), ""},
	{"1.0.128.127.in-addr.arpa", "ANY", fromAcme, "NOERROR\n1.0.128.127.in-addr.arpa. 30 IN HINFO \"RFC8482\" \"\"", ""},
	{"1.0.128.127.in-addr.arpa", "PTR", fromGlobex, absentIn("128.127.in-addr.arpa."), "service acme/shop exists, but tenant globex may not call it"},
	{"1.0.128.127.in-addr.arpa", "PTR", fromNobody, absentIn("128.127.in-addr.arpa."), ""},
	{"99.0.128.127.in-addr.arpa", "PTR", fromHost, absentIn("128.127.in-addr.arpa."), "127.128.0.99 is bound to no service"},
	{"x.1.0.128.127.in-addr.arpa", "PTR", fromHost, absentIn("128.127.in-addr.arpa."), ""},
	{"01.0.128.127.in-addr.arpa", "PTR", fromHost, absentIn("128.127.in-addr.arpa."), ""},
	{"0.128.127.in-addr.arpa", "PTR", fromNobody, nodataIn("128.127.in-addr.arpa."), ""},
	{"128.127.in-addr.arpa", "SOA", fromNobody, "NOERROR\n128.127.in-addr.arpa. 30 IN SOA ns.roost. hostmaster.roost. 1 3600 600 86400 5", ""},
	{"200.127.in-addr.arpa", "NS", fromNobody, "NOERROR\n200.127.in-addr.arpa. 30 IN NS ns.roost.\nmore ns.roost. 30 IN A 192.0.2.53", ""},
	{"127.in-addr.arpa", "PTR", fromHost, forwarded, ""},
	{"1.0.0.127.in-addr.arpa", "PTR", fromHost, forwarded, ""},
	{"in-addr.arpa", "NS", fromHost, forwarded, ""},

	{"17.100.51.198.in-addr.arpa", "PTR", fromNobody, "NOERROR\n17.100.51.198.in-addr.arpa. 30 IN PTR shop.acme.dedicated.roost.", ""},
	{"18.100.51.198.in-addr.arpa", "PTR", fromHost, absentIn("18.100.51.198.in-addr.arpa."), ""},
	{"33.100.51.198.in-addr.arpa", "PTR", fromHost, forwarded, ""},

	{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa", "PTR", fromAcme,
		"NOERROR\n1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa. 30 IN PTR shop.acme.roost.", ""},
	{"5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.D.F.ip6.arpa", "PTR", fromAcme,
		absentIn("0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa."), "initech/vault exists, but"},
	{"00.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa", "PTR", fromAcme, absentIn("0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa."), ""},
	{"7.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa", "PTR", fromNobody,
		"NOERROR\n7.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa. 30 IN PTR web.globex.dedicated.roost.", ""},
	{"d.f.ip6.arpa", "PTR", fromAcme, forwarded, ""},

	// An address that stayed bound when the pool was changed.
	{"1.0.64.100.in-addr.arpa", "PTR", fromHost, "NOERROR\n1.0.64.100.in-addr.arpa. 30 IN PTR gate.umbrella.roost.", ""},
	{"1.0.64.100.in-addr.arpa", "PTR", fromAcme, forwarded, "may not see, and in no pool"},
}

var notReadyTests = []answerTest{
	{"shop.acme.roost", "A", fromAcme, "NOERROR\nshop.acme.roost. 30 IN A 127.128.0.1", ""},
	{"db.acme.roost", "AAAA", fromAcme, nodata, ""},
	{"nosuch.acme.roost", "A", fromAcme, "SERVFAIL", "not every source has answered yet"},
	{"shop.acme.roost", "A", fromGlobex, "SERVFAIL", "exists, but tenant globex may not call it; not every source"},
	{"nosuch.roost", "A", fromAcme, "SERVFAIL", ""},
	{"99.0.128.127.in-addr.arpa", "PTR", fromAcme, "SERVFAIL", ""},
	{"roost", "SOA", fromNobody, "NOERROR\nroost. 30 IN SOA ns.roost. hostmaster.roost. 1 3600 600 86400 5", ""},
	{"1.0.64.100.in-addr.arpa", "PTR", fromAcme, forwarded, ""},
}

var nothingKnownTests = []answerTest{
	{"shop.acme.roost", "A", fromHost, "SERVFAIL", "nothing is known yet"},
	{"roost", "SOA", fromHost, "SERVFAIL", ""},
	{"1.0.128.127.in-addr.arpa", "PTR", fromHost, "SERVFAIL", ""},
}

var otherWorldTests = []answerTest{
	{"shop.acme.mesh.example.com", "A", fromAcme, "NOERROR\nshop.acme.mesh.example.com. 0 IN A 127.128.0.1", ""},
	{"_http._tcp.db.acme.mesh.example.com", "SRV", fromAcme, "NXDOMAIN\nauth mesh.example.com. 0 IN SOA ns.mesh.example.com. hostmaster.mesh.example.com. 1 3600 600 86400 0", ""},
	{"example.com", "A", fromAcme, forwarded, ""},
	{"shop.acme.roost", "A", fromAcme, forwarded, ""},
	{"shop.acme.mesh.example.com", "A", fromHost, "NXDOMAIN\nauth mesh.example.com. 0 IN SOA ns.mesh.example.com. hostmaster.mesh.example.com. 1 3600 600 86400 0", "nobody by: loopback: none"},
}

func TestAnswers(t *testing.T) {
	worlds := []struct {
		name  string
		snap  *lb.Snapshot
		tests []answerTest
	}{
		{"names", world(), forwardTests},
		{"reverse", world(), reverseTests},
		{"not ready", world(notReady), notReadyTests},
		{"nothing known", nil, nothingKnownTests},
		{"other domain, short TTL, loopback none", world(domain("mesh.example.com"), ttl(500*time.Millisecond), loopback(lb.LoopbackNone)), otherWorldTests},
	}
	for _, w := range worlds {
		t.Run(w.name, func(t *testing.T) {
			s := newServer(t, w.snap)
			for _, test := range w.tests {
				t.Run(test.name+" "+test.typ+" from "+test.from, func(t *testing.T) { test.run(t, s, w.snap) })
			}
		})
	}
}

func (test answerTest) run(t *testing.T, s *Server, snap *lb.Snapshot) {
	qtype, ok := dns.StringToType[test.typ]
	if !ok {
		qtype = 65399
	}
	c := client{from: parse(t, test.from), local: parse(t, localAddr)}
	m := ask(t, s, query(t, test.name, qtype), c)
	got := text(m)
	if test.want == forwarded {
		// No forwarder is configured, so the name is refused.
		if got != "REFUSED" {
			t.Errorf("handler answers\n%s\nwant it forwarded", got)
		}
	} else if diff := cmp.Diff(test.want, got); diff != "" {
		t.Errorf("handler (-want +got):\n%s", diff)
	}
	if m.Question[0].Name != dns.Fqdn(test.name) {
		t.Errorf("question %q is echoed as %q", test.name, m.Question[0].Name)
	}
	authoritative := test.want != forwarded && (m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError)
	if m.Authoritative != authoritative || !m.Response || m.RecursionAvailable || m.Truncated {
		t.Errorf("flags of %v", m.MsgHdr)
	}
	test.resolve(t, s, snap, qtype, m)
}

// resolve asks Resolve the same and compares.
func (test answerTest) resolve(t *testing.T, s *Server, snap *lb.Snapshot, qtype uint16, m *dns.Msg) {
	var caller lb.View
	if snap != nil {
		caller = s.who(snap, client{from: parse(t, test.from)})
	}
	got := Resolve(snap, caller, test.name, qtype)
	wantRcode, wantAnswers := rcodeName(m.Rcode), records(m.Answer)
	if test.want == forwarded {
		wantRcode = ""
	}
	if got.Rcode != wantRcode || got.View != caller.String() {
		t.Errorf("Resolve says %+v, want rcode %q and view %s", got, wantRcode, caller)
	}
	// Only the handler knows the address that a query came to.
	if !strings.HasPrefix(test.name, "ns.") {
		if diff := cmp.Diff(wantAnswers, got.Answers); diff != "" {
			t.Errorf("Resolve disagrees (-handler +Resolve):\n%s", diff)
		}
	}
	if !strings.Contains(got.Why, test.why) || got.Why == "" {
		t.Errorf("Why is %q, want %q in it", got.Why, test.why)
	}
}

// Hidden equals absent: what a caller is told of a hidden name differs from
// what it is told of one that does not exist in the name only.
func TestHiddenEqualsAbsent(t *testing.T) {
	s := newServer(t, world())
	pairs := []struct{ hidden, absent, from string }{
		{"shop.acme.roost", "shap.acme.roost", fromGlobex},
		{"vault.initech.roost", "vault.inetech.roost", fromAcme},
		{"initech.roost", "inetech.roost", fromAcme},
		{"_tcp.vault.initech.roost", "_tcp.vault.inetech.roost", fromAcme},
		{"_http._tcp.vault.initech.roost", "_http._tcp.vault.inetech.roost", fromAcme},
		{"shop.acme.roost", "shap.acme.roost", fromNobody},
		{"5.0.128.127.in-addr.arpa", "6.0.128.127.in-addr.arpa", fromAcme},
	}
	for _, p := range pairs {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeANY, dns.TypeSRV, dns.TypePTR, dns.TypeSOA} {
			c := client{from: parse(t, p.from), local: parse(t, localAddr)}
			sameID := func(m *dns.Msg) { m.Id = 7; m.SetEdns0(1232, true) }
			hidden, _ := s.handle(query(t, p.hidden, qtype, sameID), c, nil)
			absent, _ := s.handle(query(t, p.absent, qtype, sameID), c, nil)
			// Both names have the same length, so everything else lines up.
			copy(hidden[headerSize:headerSize+len(p.hidden)+2], absent[headerSize:])
			if string(hidden) != string(absent) {
				t.Errorf("%s and %s differ for type %d:\n%x\n%x", p.hidden, p.absent, qtype, hidden, absent)
			}
		}
	}
}

func TestResolveOddNames(t *testing.T) {
	for name, want := range map[string]string{"": "FORMERR", "a..b": "FORMERR", strings.Repeat("a", 64) + ".roost": "FORMERR", "shop.acme.roost.": "NOERROR"} {
		if got := Resolve(world(), lb.View{Kind: lb.ViewAll}, name, dns.TypeA); got.Rcode != want {
			t.Errorf("%q: %+v, want %s", name, got, want)
		}
	}
}

func TestResolveWritesNamesWithoutDot(t *testing.T) {
	got := Resolve(world(), lb.View{Kind: lb.ViewAll}, "_http._tcp.shop.acme.roost", dns.TypeSRV)
	want := []RR{{Name: "_http._tcp.shop.acme.roost", Type: "SRV", TTL: 30, Data: "0 0 80 shop.acme.roost"}}
	if diff := cmp.Diff(want, got.Answers); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
