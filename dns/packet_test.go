package dns

import (
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/lb"
)

// packetTest puts raw bytes to the handler. Packets are hex, spaces free.
type packetTest struct {
	name string
	pkt  string
	want string // the reply's header in hex, or "" for silence
}

const (
	shopQuestion = "0473686f70 0461636d65 05726f6f7374 00 0001 0001" // shop.acme.roost A IN
	emptyOPT     = "00 0029 0200 00000000 0000"
)

func TestPackets(t *testing.T) {
	tests := []packetTest{
		{"empty", "", ""},
		{"short header", "abcd 0100 0001 0000 0000", ""},
		{"a response", "abcd 8100 0001 0000 0000 0000" + shopQuestion, ""},
		{"header only, QDCOUNT 1", "abcd 0100 0001 0000 0000 0000", "abcd 8101 0000 0000 0000 0000"},
		{"no question", "abcd 0100 0000 0000 0000 0000", "abcd 8101 0000 0000 0000 0000"},
		{"two questions", "abcd 0000 0002 0000 0000 0000" + shopQuestion + shopQuestion, "abcd 8001 0000 0000 0000 0000"},
		{"cut question", "abcd 0100 0001 0000 0000 0000 0473686f70 04", "abcd 8101 0000 0000 0000 0000"},
		{"pointer to itself", "abcd 0100 0001 0000 0000 0000 c00c 0001 0001", "abcd 8101 0000 0000 0000 0000"},
		{"NOTIFY", "abcd 2100 0001 0000 0000 0000" + shopQuestion, "abcd a104 0000 0000 0000 0000"},
		{"UPDATE", "abcd 2800 0001 0000 0000 0000" + shopQuestion, "abcd a804 0000 0000 0000 0000"},
		{"bad additional record", "abcd 0100 0001 0000 0000 0001" + shopQuestion + "00 0001 0001 00000000 0004 01", "abcd 8101 0000 0000 0000 0000"},
		{"plain", "abcd 0100 0001 0000 0000 0000" + shopQuestion, "abcd 8500 0001 0001 0000 0000"},
		{"no RD, CD", "abcd 0010 0001 0000 0000 0000" + shopQuestion, "abcd 8410 0001 0001 0000 0000"},
		{"bytes behind the message", "abcd 0100 0001 0000 0000 0000" + shopQuestion + "ffff", "abcd 8500 0001 0001 0000 0000"},
		{"with OPT", "abcd 0100 0001 0000 0000 0001" + shopQuestion + emptyOPT, "abcd 8500 0001 0001 0000 0001"},
		{"two OPT", "abcd 0100 0001 0000 0000 0002" + shopQuestion + emptyOPT + emptyOPT, "abcd 8101 0001 0000 0000 0001"},
		{"EDNS version 1", "abcd 0100 0001 0000 0000 0001" + shopQuestion + "00 0029 0200 00010000 0000", "abcd 8100 0001 0000 0000 0001"},
		{"CH version.bind TXT", "abcd 0100 0001 0000 0000 0000 0776657273696f6e 0462696e64 00 0010 0003", "abcd 8105 0001 0000 0000 0000"},
		{"class ANY", "abcd 0100 0001 0000 0000 0000 0461636d65 05726f6f7374 00 0001 00ff", "abcd 8105 0001 0000 0000 0000"},
	}
	s := newServer(t, world())
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			pkt, err := hex.DecodeString(strings.ReplaceAll(test.pkt, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			reply, f := s.handle(pkt, client{from: parse(t, fromAcme)}, nil)
			if f != nil {
				t.Fatal("forwarded")
			}
			got := hex.EncodeToString(reply[:min(len(reply), headerSize)])
			if want := strings.ReplaceAll(test.want, " ", ""); got != want {
				t.Errorf("header %s, want %s", got, want)
			}
		})
	}
}

func TestEDNS(t *testing.T) {
	s := newServer(t, world())
	c := client{from: parse(t, fromAcme)}
	for _, do := range []bool{false, true} {
		opt := ask(t, s, query(t, "shop.acme.roost", dns.TypeA, withEDNS(4096, do)), c).IsEdns0()
		if opt == nil || opt.UDPSize() != udpSize || opt.Do() != do || opt.Version() != 0 || len(opt.Option) != 0 {
			t.Errorf("DO %v: OPT %v", do, opt)
		}
	}
	if opt := ask(t, s, query(t, "shop.acme.roost", dns.TypeA), c).IsEdns0(); opt != nil {
		t.Errorf("OPT without being asked: %v", opt)
	}
	m := ask(t, s, query(t, "shop.acme.roost", dns.TypeA, withEDNS(512, false), func(m *dns.Msg) { m.IsEdns0().SetVersion(1) }), c)
	if m.Rcode != dns.RcodeBadVers || m.IsEdns0().Version() != 0 || len(m.Answer) != 0 {
		t.Errorf("version 1: %v", m)
	}
}

func TestNotReadySaysSo(t *testing.T) {
	for name, snap := range map[string]*lb.Snapshot{"nothing known": nil, "not ready": world(notReady)} {
		m := ask(t, newServer(t, snap), query(t, "nosuch.acme.roost", dns.TypeA, withEDNS(1232, false)), client{from: parse(t, fromAcme)})
		opt := m.IsEdns0()
		if m.Rcode != dns.RcodeServerFailure || m.Authoritative || opt == nil || len(opt.Option) != 1 || opt.Option[0].(*dns.EDNS0_EDE).InfoCode != dns.ExtendedErrorCodeNotReady {
			t.Errorf("%s: %v", name, m)
		}
	}
}

func TestNothingKnownForwardsForeignNames(t *testing.T) {
	s := newServer(t, nil)
	if m := ask(t, s, query(t, "example.com", dns.TypeA), client{}); m.Rcode != dns.RcodeRefused {
		t.Errorf("example.com: %v, want it treated as foreign", m.MsgHdr)
	}
	s = newServer(t, nil, func(c *Config) { c.Domain = "" })
	if m := ask(t, s, query(t, "example.com", dns.TypeA), client{}); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("example.com with no domain known: %v, want SERVFAIL", m.MsgHdr)
	}
}

func TestBoundTenant(t *testing.T) {
	s := newServer(t, world())
	for from, c := range map[string]client{
		"nobody's address": {from: parse(t, fromNobody), tenant: "acme"},
		"the host":         {from: parse(t, fromHost), tenant: "acme"},
	} {
		if got := text(ask(t, s, query(t, "vault.initech.roost", dns.TypeA), c)); got != absent {
			t.Errorf("vault from %s: %s", from, got)
		}
		if got := text(ask(t, s, query(t, "db.acme.roost", dns.TypeA), c)); !strings.HasPrefix(got, "NOERROR") {
			t.Errorf("db from %s: %s", from, got)
		}
	}
	if got := s.Problems(); len(got) != 0 {
		t.Errorf("problems %v: a bound tenant is never unknown", got)
	}
}

// longWorld has a domain of 192 characters and last more.
func longWorld(last int) *lb.Snapshot {
	label := strings.Repeat("d", 63)
	return world(domain(label + "." + label + "." + label + "." + label[:last]))
}

func TestTruncation(t *testing.T) {
	const (
		whole = "1 answers, 2 additional, TC false"
		lean  = "1 answers, 0 additional, TC false"
		none  = "0 answers, 0 additional, TC true"
	)
	tests := []struct {
		name   string
		last   int // see longWorld
		client client
		edns   uint16
		want   string
	}{
		{"additional records do not fit", 12, client{}, 0, lean},
		{"EDNS below 512 is 512", 12, client{}, 100, lean},
		{"EDNS 1232", 12, client{}, 1232, whole},
		{"TCP", 12, client{tcp: true}, 0, whole},
		{"answer does not fit", 30, client{}, 0, none},
		{"answer does not fit with EDNS", 30, client{}, 512, none},
		{"long, EDNS 1232", 30, client{}, 1232, whole},
		{"long, TCP", 30, client{tcp: true}, 0, whole},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			snap := longWorld(test.last)
			test.client.from = parse(t, fromAcme)
			var change []func(*dns.Msg)
			if test.edns > 0 {
				change = append(change, withEDNS(test.edns, false))
			}
			pkt := query(t, "_http._tcp.shop.acme."+snap.Config.Domain, dns.TypeSRV, change...)
			s := newServer(t, snap)
			reply, _ := s.handle(pkt, test.client, nil)
			if most := limit(optOf(t, pkt), test.client); len(reply) > most {
				t.Errorf("%d bytes, limit %d", len(reply), most)
			}
			m := ask(t, s, pkt, test.client)
			more := len(m.Extra)
			if m.IsEdns0() != nil {
				more--
			}
			if (m.IsEdns0() != nil) != (test.edns > 0) {
				t.Errorf("OPT %v", m.IsEdns0())
			}
			if got := fmt.Sprintf("%d answers, %d additional, TC %v", len(m.Answer), more, m.Truncated); got != test.want {
				t.Errorf("%d bytes: %s, want %s", len(reply), got, test.want)
			}
		})
	}
}

func optOf(t *testing.T, pkt []byte) *dns.OPT {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(pkt); err != nil {
		t.Fatal(err)
	}
	return m.IsEdns0()
}

func TestPackTruncates(t *testing.T) {
	m := new(dns.Msg).SetQuestion("shop.acme.roost.", dns.TypeA)
	for i := range 40 {
		m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: "shop.acme.roost.", Rrtype: dns.TypeA, Class: dns.ClassINET}, A: []byte{10, 0, 0, byte(i)}})
	}
	opt := ourOPT(&dns.OPT{})
	m.Extra = append(m.Extra, opt)
	out, err := pack(m, opt, dns.MinMsgSize, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got dns.Msg
	if err := got.Unpack(out); err != nil || len(out) > dns.MinMsgSize || !got.Truncated || got.IsEdns0() == nil || len(got.Question) != 1 {
		t.Errorf("%d bytes, %v, error %v", len(out), got.MsgHdr, err)
	}
}

func TestMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	s := newServer(t, world(), func(c *Config) { c.Registerer = r })
	c := client{from: parse(t, fromAcme)}
	ask(t, s, query(t, "shop.acme.roost", dns.TypeA), c)
	ask(t, s, query(t, "nosuch.acme.roost", dns.TypeA), c)
	ask(t, s, query(t, "nosuch.acme.roost", dns.TypeA), c)
	ask(t, s, query(t, "example.com", dns.TypeA), c)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if v := m.GetCounter().GetValue(); v > 0 {
				var labels []string
				for _, l := range m.GetLabel() {
					labels = append(labels, l.GetValue())
				}
				got[f.GetName()+" "+strings.Join(labels, " ")] = v
			}
		}
	}
	want := map[string]float64{"roost_dns_queries_total ours NOERROR": 1, "roost_dns_queries_total ours NXDOMAIN": 2, "roost_dns_queries_total refused REFUSED": 1}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if _, err := New(Config{Snapshot: func() *lb.Snapshot { return nil }, Registerer: r}); err == nil {
		t.Error("a second server on one registry is no error")
	}
}

// hiddenAddresses are what an acme client may never see in an answer.
var hiddenAddresses = []string{"127.128.0.3", "127.128.0.5", "fd00:1::5", "100.64.0.1", "vault", "gate"}

func FuzzPacket(f *testing.F) {
	for _, tests := range [][]answerTest{forwardTests, reverseTests} {
		for _, test := range tests {
			f.Add(query(f, test.name, dns.StringToType[test.typ]))
			f.Add(query(f, test.name, dns.StringToType[test.typ], withEDNS(1232, true)))
		}
	}
	for _, pkt := range []string{"", "abcd01000001000000000000c00c00010001", "abcd2800000100000000000000"} {
		raw, _ := hex.DecodeString(pkt)
		f.Add(raw)
	}
	f.Add(query(f, "vault.initech.roost", dns.TypeA, func(m *dns.Msg) {
		m.SetEdns0(4096, false)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"}}
	}))
	f.Add(query(f, "1.0.128.127.in-addr.arpa", dns.TypePTR, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }))
	s := newServer(f, world())
	c := client{from: parse(f, fromAcme), local: parse(f, localAddr)}
	f.Fuzz(func(t *testing.T, pkt []byte) {
		reply, fwd := s.handle(pkt, c, nil)
		if fwd != nil {
			t.Fatal("forwarded although nothing is configured")
		}
		if reply == nil {
			if len(pkt) >= headerSize && pkt[2]&0x80 == 0 {
				t.Fatal("silence to a query")
			}
			return
		}
		if len(reply) < headerSize || reply[0] != pkt[0] || reply[1] != pkt[1] || reply[2]&0x80 == 0 {
			t.Fatalf("reply %x to %x", reply, pkt)
		}
		var m dns.Msg
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("reply %x: %v", reply, err)
		}
		answers := text(&dns.Msg{Answer: m.Answer, Extra: m.Extra})
		for _, secret := range hiddenAddresses {
			if strings.Contains(answers, secret) {
				t.Fatalf("reply shows %s:\n%s", secret, answers)
			}
		}
	})
}

func BenchmarkAnswerA(b *testing.B) {
	s := newServer(b, world())
	pkt := query(b, "shop.acme.roost", dns.TypeA)
	c := client{from: parse(b, fromAcme), local: parse(b, localAddr)}
	buf := make([]byte, replySize)
	b.ReportAllocs()
	for b.Loop() {
		if reply, _ := s.handle(pkt, c, buf); reply == nil {
			b.Fatal("no reply")
		}
	}
}
