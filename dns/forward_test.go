package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// startUpstream runs a DNS server of the codec's own kind until the test ends.
func startUpstream(t *testing.T, h dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	open, err := bind(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	t.Cleanup(done.Wait) // runs after both have been shut down
	for _, s := range []*dns.Server{{PacketConn: open.udp, Handler: h}, {Listener: open.tcp, Handler: h}} {
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		done.Go(func() { _ = s.ActivateAndServe() })
		<-ready
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			_ = s.ShutdownContext(ctx)
		})
	}
	return open.addr
}

func answerWith(m *dns.Msg, addresses ...string) *dns.Msg {
	out := new(dns.Msg).SetReply(m)
	for _, a := range addresses {
		out.Answer = append(out.Answer, &dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(a)})
	}
	return out
}

// fixed answers every question with one address.
func fixed(address string) dns.HandlerFunc {
	return func(w dns.ResponseWriter, m *dns.Msg) { _ = w.WriteMsg(answerWith(m, address)) }
}

func rcodeHandler(rcode int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, m *dns.Msg) { _ = w.WriteMsg(new(dns.Msg).SetRcode(m, rcode)) }
}

func forwardTo(f ...Forwarder) func(*Config) {
	return func(c *Config) { c.Listen, c.Forward = []Listen{loopbackListen("")}, f }
}

func to(a ...netip.AddrPort) []netip.AddrPort { return a }

func TestForwardByZone(t *testing.T) {
	other, consul, deep := startUpstream(t, fixed("192.0.2.1")), startUpstream(t, fixed("192.0.2.2")), startUpstream(t, fixed("192.0.2.3"))
	at := start(t, newServer(t, world(), forwardTo(
		Forwarder{To: to(other)}, Forwarder{Zone: "Consul", To: to(consul)}, Forwarder{Zone: "dc1.consul.", To: to(deep)}, Forwarder{Zone: "roost", To: to(other)})))[0]
	for name, want := range map[string]string{
		"example.com.": "192.0.2.1", "notconsul.": "192.0.2.1", ".": "192.0.2.1", "WEB.service.CONSUL.": "192.0.2.2", "consul.": "192.0.2.2",
		"web.dc1.consul.": "192.0.2.3", `a\.dc1.consul.`: "192.0.2.2",
	} {
		for _, network := range []string{"udp", "tcp"} {
			reply := exchange(t, network, at, new(dns.Msg).SetQuestion(name, dns.TypeA))
			if len(reply.Answer) != 1 || !strings.HasSuffix(reply.Answer[0].String(), want) || reply.Question[0].Name != name || !reply.RecursionAvailable {
				t.Errorf("%s %s: %v, want %s", network, name, reply, want)
			}
		}
	}
	// Our own names never leave, whatever the rules say.
	if got := exchange(t, "udp", at, new(dns.Msg).SetQuestion("nosuch.roost.", dns.TypeA)); got.Rcode != dns.RcodeNameError || !got.RecursionAvailable {
		t.Errorf("nosuch.roost: %v", got)
	}
	if got := exchange(t, "udp", at, new(dns.Msg).SetQuestion("9.9.128.127.in-addr.arpa.", dns.TypePTR)); got.Rcode != dns.RcodeNameError {
		t.Errorf("a reverse name of the pool: %v", got)
	}
}

func TestForwardOnlyOneZone(t *testing.T) {
	at := start(t, newServer(t, world(), forwardTo(Forwarder{Zone: "consul", To: to(startUpstream(t, fixed("192.0.2.2")))})))[0]
	if got := exchange(t, "udp", at, new(dns.Msg).SetQuestion("example.com.", dns.TypeA)); got.Rcode != dns.RcodeRefused {
		t.Errorf("a name of no zone: %v", got)
	}
}

// many is more addresses than fit into one UDP reply.
func many() []string {
	out := make([]string, 200)
	for i := range out {
		out[i] = fmt.Sprintf("192.0.2.%d", i)
	}
	return out
}

func TestForwardTruncation(t *testing.T) {
	var overTCP atomic.Int32
	up := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		reply := answerWith(m, many()...)
		if opt := m.IsEdns0(); opt != nil {
			reply.SetEdns0(4096, opt.Do())
		}
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			reply.Truncate(512)
		} else {
			overTCP.Add(1)
		}
		_ = w.WriteMsg(reply)
	})
	at := start(t, newServer(t, world(), forwardTo(Forwarder{To: to(up)})))[0]
	tests := []struct {
		network string
		edns    uint16
		whole   bool
	}{{"udp", 0, false}, {"udp", 1232, false}, {"udp", 8192, true}, {"tcp", 0, true}, {"tcp", 1232, true}}
	for _, test := range tests {
		m := new(dns.Msg).SetQuestion("many.example.", dns.TypeA)
		if test.edns > 0 {
			m.SetEdns0(test.edns, true)
		}
		reply := exchange(t, test.network, at, m)
		if reply.Truncated == test.whole || (len(reply.Answer) == 200) != test.whole || len(reply.Answer) == 0 {
			t.Errorf("%+v: TC %v, %d answers", test, reply.Truncated, len(reply.Answer))
		}
		if opt := reply.IsEdns0(); test.edns > 0 && (opt == nil || opt.UDPSize() != udpSize || !opt.Do()) || test.edns == 0 && opt != nil {
			t.Errorf("%+v: OPT %v", test, opt)
		}
	}
	if got := overTCP.Load(); got != int32(len(tests)) {
		t.Errorf("asked %d times over TCP, want %d", got, len(tests))
	}
}

func TestForwardFailover(t *testing.T) {
	silent, err := net.ListenPacket("udp4", "127.0.0.1:0") // never answers
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	closed := netip.MustParseAddrPort("127.0.0.1:1")
	good := startUpstream(t, fixed("192.0.2.1"))
	s := newServer(t, world(), forwardTo(
		Forwarder{Zone: "refusing", To: to(startUpstream(t, rcodeHandler(dns.RcodeServerFailure)), closed, good)},
		Forwarder{Zone: "silent", To: to(silent.LocalAddr().(*net.UDPAddr).AddrPort(), good)},
		Forwarder{Zone: "hopeless", To: to(closed)},
		Forwarder{Zone: "nxdomain", To: to(startUpstream(t, rcodeHandler(dns.RcodeNameError)), good)},
		Forwarder{Zone: "refused", To: to(startUpstream(t, rcodeHandler(dns.RcodeRefused)), closed)},
	))
	at := start(t, s)[0]
	for zone, want := range map[string]int{"refusing": dns.RcodeSuccess, "silent": dns.RcodeSuccess, "hopeless": dns.RcodeServerFailure,
		"nxdomain": dns.RcodeNameError, "refused": dns.RcodeRefused} {
		if got := exchange(t, "udp", at, new(dns.Msg).SetQuestion("a."+zone+".", dns.TypeA)); got.Rcode != want {
			t.Errorf("%s: %s, want %s", zone, rcodeName(got.Rcode), rcodeName(want))
		}
	}
	r, _ := s.forward.routeFor("b.silent.")
	if order := r.inOrder(time.Now()); order[0].addr != good {
		t.Error("a server that did not answer is still asked first")
	}
	if order := r.inOrder(time.Now().Add(2 * failureMemory)); order[0].addr == good {
		t.Error("a failure is remembered for ever")
	}
}

func TestForwardTrustsOnlyTheReply(t *testing.T) {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- impostor(conn) }()
	u := &upstream{addr: conn.LocalAddr().(*net.UDPAddr).AddrPort()}
	reply, err := u.ask(t.Context(), new(dns.Msg).SetQuestion("Example.COM.", dns.TypeA), nil)
	_ = conn.Close()
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	var m dns.Msg
	if err := m.Unpack(reply); err != nil || len(m.Answer) != 1 || !strings.HasSuffix(m.Answer[0].String(), "192.0.2.1") || m.Question[0].Name != "Example.COM." {
		t.Errorf("reply %v, error %v", &m, err)
	}
}

// impostor answers one question wrongly in several ways, and then rightly but
// for the case of its letters.
func impostor(conn net.PacketConn) error {
	buf := make([]byte, 4096)
	n, from, err := conn.ReadFrom(buf)
	if err != nil {
		return err
	}
	var q dns.Msg
	if err := q.Unpack(buf[:n]); err != nil {
		return err
	}
	wrong := []func(*dns.Msg){
		func(m *dns.Msg) { m.Id++ },
		func(m *dns.Msg) { m.Response = false },
		func(m *dns.Msg) { m.Question[0].Name = "example.org." },
		func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
		func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		func(m *dns.Msg) { m.Question = nil },
	}
	right := func(m *dns.Msg) { m.Question[0].Name = "eXAMPLE.com."; m.Answer[0].(*dns.A).A = net.IPv4(192, 0, 2, 1) }
	for _, change := range append(wrong, right) {
		m := answerWith(q.Copy(), "192.0.2.66")
		change(m)
		out, err := m.Pack()
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(out, from); err != nil {
			return err
		}
	}
	return nil
}

func TestForwardLoop(t *testing.T) {
	s := newServer(t, world(), forwardTo(Forwarder{}))
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	at := s.Addrs()[0]
	s.forward.rules[0].To = to(at)
	s.forward.load(s.Addrs())
	got := s.Problems()
	if len(got) != 1 || got[0].Code != "forward_loop" || got[0].Object != "." || !strings.Contains(got[0].Message, at.String()) || got[0].Since.IsZero() {
		t.Fatalf("problems %+v", got)
	}
	since := got[0].Since
	s.forward.load(s.Addrs())
	if got := s.Problems(); len(got) != 1 || got[0].Since != since {
		t.Errorf("problems %+v, want the same since", got)
	}
	serve(t, s)
	if got := exchange(t, "udp", at, new(dns.Msg).SetQuestion("example.com.", dns.TypeA)); got.Rcode != dns.RcodeServerFailure {
		t.Errorf("reply %v", got)
	}
}

func TestOwnAddresses(t *testing.T) {
	at := netip.MustParseAddrPort
	mine := ownAddresses([]netip.AddrPort{at("0.0.0.0:53"), at("10.0.0.1:5353"), at("[::1]:5353")})
	for a, want := range map[string]bool{
		"127.0.0.1:53": true, "127.0.0.53:53": true, "127.0.0.1:54": false, "192.0.2.1:53": false, "[::1]:53": false,
		"10.0.0.1:5353": true, "10.0.0.2:5353": false, "[::1]:5353": true,
	} {
		if got := mine(at(a)); got != want {
			t.Errorf("%s: %v, want %v", a, got, want)
		}
	}
	if !mine(reachable(at("0.0.0.0:53"))) {
		t.Error("0.0.0.0 is not known as this host")
	}
}

func TestResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	s := newServer(t, world(), forwardTo(Forwarder{Files: []string{path}}))
	servers := func() string {
		s.forward.load(nil)
		r, _ := s.forward.routeFor("example.com.")
		var out []string
		for _, u := range r.servers {
			out = append(out, u.addr.String())
		}
		return strings.Join(out, " ")
	}
	problems := func() string {
		var out []string
		for _, p := range s.Problems() {
			out = append(out, p.Code)
		}
		return strings.Join(out, " ")
	}
	if got := servers(); got != "" || problems() != "forward_unreadable" {
		t.Errorf("no file: servers %q, problems %q", got, problems())
	}
	steps := []struct{ content, want, problems string }{
		{"# comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions edns0\n", "192.0.2.1:53 [2001:db8::1]:53", ""},
		{"nameserver 192.0.2.7\n", "192.0.2.7:53", ""},
		{"nothing\n", "192.0.2.7:53", "forward_unreadable"},
		{"nameserver 192.0.2.8\n", "192.0.2.8:53", ""},
	}
	for _, step := range steps {
		next := path + ".new"
		if err := os.WriteFile(next, []byte(step.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, path); err != nil {
			t.Fatal(err)
		}
		if got := servers(); got != step.want || problems() != step.problems {
			t.Errorf("%q: servers %q, problems %q", step.content, got, problems())
		}
	}
	first, _ := s.forward.routeFor("example.com.")
	first.servers[0].failedUntil.Store(1)
	s.forward.load(nil)
	if again, _ := s.forward.routeFor("example.com."); again.servers[0] != first.servers[0] {
		t.Error("a server's failure is forgotten when the files are looked at")
	}
}

func TestForwardOverflow(t *testing.T) {
	s := newServer(t, world(), forwardTo(Forwarder{To: to(netip.MustParseAddrPort("127.0.0.1:1"))}))
	for range maxForwards {
		s.forward.slots <- struct{}{}
	}
	at := start(t, s)[0]
	if got := exchange(t, "udp", at, new(dns.Msg).SetQuestion("example.com.", dns.TypeA)); got.Rcode != dns.RcodeServerFailure || got.Question[0].Name != "example.com." {
		t.Errorf("reply %v", got)
	}
}

func TestServerResolve(t *testing.T) {
	up := startUpstream(t, fixed("192.0.2.1"))
	s := newServer(t, world(), forwardTo(Forwarder{Zone: "com", To: to(up)}, Forwarder{Zone: "hopeless", To: to(netip.MustParseAddrPort("127.0.0.1:1"))}))
	for _, test := range []struct{ name, from, rcode, data, view, why string }{
		{"shop.acme.roost", fromAcme, "NOERROR", "127.128.0.1", "acme", "service acme/shop"},
		{"shop.acme.roost", fromNobody, "NXDOMAIN", "", "nobody", "may not call it"},
		{"example.com", fromNobody, "NOERROR", "192.0.2.1", "nobody", up.String()},
		{"example.org", fromAcme, "REFUSED", "", "acme", "dns.forward has no server"},
		{"a.hopeless", fromAcme, "SERVFAIL", "", "acme", "no upstream has answered: 127.0.0.1:1"},
		{"a..b", fromAcme, "FORMERR", "", "acme", "no domain name"},
	} {
		got := s.Resolve(t.Context(), parse(t, test.from), test.name, dns.TypeA)
		data := ""
		if len(got.Answers) > 0 {
			data = got.Answers[0].Data
		}
		if got.Rcode != test.rcode || data != test.data || got.View != test.view || !strings.Contains(got.Why, test.why) {
			t.Errorf("%s from %s: %+v", test.name, test.from, got)
		}
	}
	unknown := newServer(t, nil, forwardTo(Forwarder{To: to(up)}))
	if got := unknown.Resolve(t.Context(), parse(t, fromHost), "shop.acme.roost", dns.TypeA); got.Rcode != "SERVFAIL" {
		t.Errorf("nothing known: %+v", got)
	}
	if got := unknown.Resolve(t.Context(), parse(t, fromHost), "example.com", dns.TypeA); got.Rcode != "NOERROR" {
		t.Errorf("nothing known, foreign: %+v", got)
	}
}

// FuzzUpstream: whatever an upstream server sends, what reaches the caller is
// an answer to the caller's question that fits.
func FuzzUpstream(f *testing.F) {
	q := new(dns.Msg).SetQuestion("Example.com.", dns.TypeA)
	q.Id = 0xabcd
	wire, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	good, err := answerWith(q, many()...).Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:200])
	f.Add(wire)
	s := newServer(f, world())
	f.Fuzz(func(t *testing.T, pkt []byte) {
		end, ok := answers(pkt, wire, q.Question[0])
		if !ok || end == 0 {
			return
		}
		reply := append([]byte(nil), pkt...)
		patchOPT(reply)
		out := s.shorten(reply, &foreign{msg: q})
		if len(out) > dns.MinMsgSize || binary.BigEndian.Uint16(out) != q.Id {
			t.Fatalf("%d bytes: %x", len(out), out)
		}
	})
}
