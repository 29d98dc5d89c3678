package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

const testTimeout = 20 * time.Second

func loopbackListen(tenant string) Listen {
	return Listen{Addr: netip.MustParseAddrPort("127.0.0.1:0"), Tenant: tenant}
}

// start opens a Server's sockets and runs it until the test ends.
func start(t *testing.T, s *Server) []netip.AddrPort {
	t.Helper()
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	return s.Addrs()
}

func serve(t *testing.T, s *Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(testTimeout):
			t.Error("Serve does not return")
		}
	})
}

func exchange(t *testing.T, network string, at netip.AddrPort, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := &dns.Client{Net: network, Timeout: testTimeout, UDPSize: dns.MaxMsgSize}
	reply, _, err := c.Exchange(m, at.String())
	if err != nil {
		t.Fatalf("%s %v: %v", network, m.Question, err)
	}
	return reply
}

func TestServeUDPAndTCP(t *testing.T) {
	s := newServer(t, world(), func(c *Config) {
		c.Listen = []Listen{loopbackListen(""), loopbackListen("globex"), {Addr: netip.MustParseAddrPort("0.0.0.0:0")}}
	})
	addrs := start(t, s)
	everything, bound, wildcard := addrs[0], addrs[1], netip.AddrPortFrom(parse(t, "127.0.0.77"), addrs[2].Port())
	tests := []struct {
		at         netip.AddrPort
		name, want string
		typ        uint16
	}{
		{everything, "VAULT.initech.ROOST.", "NOERROR\nVAULT.initech.ROOST. 30 IN A 127.128.0.5", dns.TypeA},
		{everything, "ns.roost.", "NOERROR\nns.roost. 30 IN A 127.0.0.1", dns.TypeA},
		{bound, "vault.initech.roost.", absent, dns.TypeA},
		{bound, "api.globex.roost.", "NOERROR\napi.globex.roost. 30 IN A 127.128.0.4", dns.TypeA},
		{wildcard, "ns.roost.", "NOERROR\nns.roost. 30 IN A 127.0.0.77", dns.TypeA},
		{everything, "example.com.", "REFUSED", dns.TypeA},
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, test := range tests {
			m := new(dns.Msg).SetQuestion(test.name, test.typ)
			reply := exchange(t, network, test.at, m)
			if got := text(reply); got != test.want || reply.Question[0].Name != test.name {
				t.Errorf("%s %s at %s:\n%s\nwant\n%s", network, test.name, test.at, got, test.want)
			}
		}
	}
}

func TestGarbageOverUDP(t *testing.T) {
	addrs := start(t, newServer(t, world(), func(c *Config) { c.Listen = []Listen{loopbackListen("")} }))
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addrs[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(testTimeout))
	// The first three are met with silence, so the first reply is to the last.
	for _, pkt := range []string{"x", "\x00\x01\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00", "", "\xab\xcd\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xff\xff"} {
		if _, err := conn.Write([]byte(pkt)); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 512)
	n, err := conn.Read(buf)
	if err != nil || string(buf[:n]) != "\xab\xcd\x81\x01\x00\x00\x00\x00\x00\x00\x00\x00" {
		t.Errorf("reply %x, error %v", buf[:n], err)
	}
}

func TestTCPPipelining(t *testing.T) {
	hold := make(chan struct{})
	up := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		if m.Question[0].Name == "slow.example." {
			<-hold
		}
		_ = w.WriteMsg(answerWith(m, "192.0.2.1"))
	})
	addrs := start(t, newServer(t, world(), func(c *Config) {
		c.Listen = []Listen{loopbackListen("")}
		c.Forward = []Forwarder{{To: []netip.AddrPort{up}}}
	}))
	conn, err := net.Dial("tcp", addrs[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(testTimeout))
	names := []string{"slow.example.", "fast.example.", "shop.acme.roost."}
	for i, name := range names {
		if err := writeMessage(conn, query(t, name, dns.TypeA, func(m *dns.Msg) { m.Id = uint16(i) })); err != nil {
			t.Fatal(err)
		}
	}
	// Half-closed: what was asked is still answered.
	_ = conn.(*net.TCPConn).CloseWrite()
	var order []string
	for range names {
		raw, err := readMessage(conn, nil)
		if err != nil {
			t.Fatal(err)
		}
		var m dns.Msg
		if err := m.Unpack(raw); err != nil || m.Rcode != dns.RcodeSuccess || m.Question[0].Name != names[m.Id] {
			t.Fatalf("%v, error %v", m, err)
		}
		if order = append(order, names[m.Id]); len(order) == 2 {
			close(hold)
		}
	}
	if order[2] != "slow.example." {
		t.Errorf("answered in the order %v: the slow one held up the others", order)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v, want EOF", err)
	}
}

func TestTCPGarbageEndsTheConnection(t *testing.T) {
	addrs := start(t, newServer(t, world(), func(c *Config) { c.Listen = []Listen{loopbackListen("")} }))
	conn, err := net.Dial("tcp", addrs[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(testTimeout))
	if err := writeMessage(conn, []byte("short")); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read %d, %v; want the connection closed", n, err)
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	c := newConnections()
	one := netip.MustParseAddr("10.0.0.1")
	for range maxPerSource {
		if !c.add(one) {
			t.Fatal("refused below the limit of one source")
		}
	}
	if c.add(one) {
		t.Error("one source exceeds its limit")
	}
	for i := range maxConnections - maxPerSource {
		if !c.add(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})) {
			t.Fatal("refused below the limit of all")
		}
	}
	other := netip.MustParseAddr("10.2.0.1")
	if c.add(other) {
		t.Error("all exceed their limit")
	}
	c.remove(one)
	if !c.add(other) {
		t.Error("a freed place is not given again")
	}
}

func TestBusyPortFailsTheStart(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		t.Run(network, func(t *testing.T) {
			var at netip.AddrPort
			if network == "udp" {
				c, err := net.ListenPacket("udp4", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				at = c.LocalAddr().(*net.UDPAddr).AddrPort()
			} else {
				l, err := net.Listen("tcp4", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				at = l.Addr().(*net.TCPAddr).AddrPort()
			}
			s := newServer(t, world(), func(c *Config) { c.Listen = []Listen{loopbackListen(""), {Addr: at}} })
			err := s.Listen(t.Context())
			want := fmt.Sprintf("dns.addresses: %s: address already in use", at)
			if err == nil || err.Error() != want || !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("error %v, want %s", err, want)
			}
			// The first address is free again.
			l, err := net.Listen("tcp4", s.Addrs()[0].String())
			if err != nil {
				t.Fatalf("a failed start keeps its sockets: %v", err)
			}
			_ = l.Close()
		})
	}
}

func TestAddressNotOnThisHost(t *testing.T) {
	s := newServer(t, world(), func(c *Config) {
		c.Listen = []Listen{{Addr: netip.MustParseAddrPort("192.0.2.53:0")}, loopbackListen("")}
	})
	start(t, s)
	got := s.Problems()
	if len(got) != 1 || got[0].Code != "dns_address_unavailable" || got[0].Object != "192.0.2.53:0" || got[0].Place != "dns.addresses" {
		t.Errorf("problems %+v", got)
	}
}

// An address that could not be bound at the start is served once it can be.
func TestAddressAppears(t *testing.T) {
	s := newServer(t, world(), func(c *Config) { c.Listen = []Listen{loopbackListen("")} })
	e := s.endpoints[0]
	e.fault(syscall.EADDRNOTAVAIL)
	if got := s.Problems(); len(got) != 1 || !strings.Contains(got[0].Message, "is not served: cannot assign requested address") {
		t.Errorf("problems %+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var children sync.WaitGroup
	defer children.Wait()
	defer s.Close()
	defer cancel()
	s.retry(ctx, &children, e)
	if got := s.Problems(); len(got) != 0 {
		t.Errorf("problems %+v", got)
	}
	reply := exchange(t, "udp", s.Addrs()[0], new(dns.Msg).SetQuestion("shop.acme.roost.", dns.TypeA))
	if reply.Rcode != dns.RcodeSuccess {
		t.Errorf("reply %v", reply)
	}
	// One that was bound in advance is no Problem once the host has it.
	e.fault(syscall.EADDRNOTAVAIL)
	s.retry(ctx, &children, e)
	if got := s.Problems(); len(got) != 0 {
		t.Errorf("problems %+v", got)
	}
}

func TestServerFollowsTheSnapshot(t *testing.T) {
	var mu sync.Mutex
	var now *lb.Snapshot
	s := newServer(t, nil, func(c *Config) {
		c.Listen = []Listen{loopbackListen("")}
		c.Snapshot = func() *lb.Snapshot { mu.Lock(); defer mu.Unlock(); return now }
	})
	at := start(t, s)[0]
	q := new(dns.Msg).SetQuestion("shop.acme.roost.", dns.TypeA)
	if got := exchange(t, "udp", at, q); got.Rcode != dns.RcodeServerFailure {
		t.Errorf("before the first snapshot: %v", got)
	}
	mu.Lock()
	now = world()
	mu.Unlock()
	if got := exchange(t, "udp", at, q); got.Rcode != dns.RcodeSuccess {
		t.Errorf("after it: %v", got)
	}
}

// TestOptionalAddressIsNoFailedStart: an address that nobody has asked for may
// be taken; it is a Problem.
func TestOptionalAddressIsNoFailedStart(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Close() }()
	at := busy.Addr().(*net.TCPAddr).AddrPort()
	s := newServer(t, world(), func(c *Config) { c.Listen = []Listen{{Addr: at, Optional: true}, loopbackListen("")} })
	start(t, s)
	if p := s.Problems(); len(p) != 1 || p[0].Code != "dns_address_unavailable" || !strings.Contains(p[0].Message, "address already in use") {
		t.Errorf("problems %+v", p)
	}
}
