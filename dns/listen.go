package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/roostmesh/roost/lb"
)

const (
	// portTries is how often a port that TCP has chosen may turn out to be
	// taken for UDP.
	portTries = 20
	// udpReadBuffer asks for room for a burst of some thousand queries.
	udpReadBuffer = 1 << 20
)

// endpoint is one address of Config.Listen. Only Listen and then the goroutine
// of Serve change it.
type endpoint struct {
	want    Listen                    // fixed at construction
	open    atomic.Pointer[sockets]   // nil: not bound
	missing atomic.Pointer[notOnHost] // nil: the host has the address
}

// sockets are an endpoint's open sockets. It is immutable.
type sockets struct {
	udp  *net.UDPConn
	tcp  *net.TCPListener
	addr netip.AddrPort // with the bound port
}

func (o *sockets) close() {
	_ = o.udp.Close()
	_ = o.tcp.Close()
}

// notOnHost says since when an address is missing, and what else stands in
// the way of binding it.
type notOnHost struct {
	since time.Time
	err   error
}

// listen binds the endpoint's address: plainly, else as one that the host does
// not have yet. It leaves the endpoint unbound and missing, without an error,
// when the system allows neither.
func (e *endpoint) listen(ctx context.Context) error {
	open, err := bind(ctx, e.want.Addr, nil)
	if err == nil {
		e.open.Store(open)
		e.missing.Store(nil)
		return nil
	}
	if !errors.Is(err, syscall.EADDRNOTAVAIL) {
		return err
	}
	open, free := bind(ctx, e.want.Addr, freebind)
	switch {
	case free == nil:
		e.open.Store(open)
	case errors.Is(free, syscall.EADDRINUSE):
		return free
	}
	e.fault(err)
	return nil
}

// fault records why the endpoint's address is not served as it should be.
func (e *endpoint) fault(err error) {
	since := time.Now()
	if before := e.missing.Load(); before != nil {
		since = before.since
	}
	e.missing.Store(&notOnHost{since: since, err: cause(err)})
}

func (e *endpoint) problem() (lb.Problem, bool) {
	m := e.missing.Load()
	if m == nil {
		return lb.Problem{}, false
	}
	fix := fmt.Sprintf("give the host the address (`ip address add %s/%d dev lo`, or the route of its pool), or take it out of dns.addresses", e.want.Addr.Addr(), e.want.Addr.Addr().BitLen())
	if errors.Is(m.err, syscall.EACCES) {
		fix = fmt.Sprintf("`sysctl -w net.ipv4.ip_unprivileged_port_start=%d`, or run roost with AmbientCapabilities=CAP_NET_BIND_SERVICE", e.want.Addr.Port())
	}
	message := fmt.Sprintf("is not served: %v; it is tried again every %s", m.err, watchEvery)
	if e.open.Load() != nil {
		message = "is not on this host yet; it is bound already and answers as soon as the address is there"
	}
	return lb.Problem{
		Code: "dns_address_unavailable", Severity: lb.SeverityWarning, Object: e.want.Addr.String(), Place: "dns.addresses",
		Message: message, Since: m.since, Fix: fix,
	}, true
}

// bind opens UDP and TCP on one port. control may be nil.
func bind(ctx context.Context, at netip.AddrPort, control func(string, string, syscall.RawConn) error) (*sockets, error) {
	lc := net.ListenConfig{Control: control}
	family := "6"
	if at.Addr().Unmap().Is4() {
		family = "4"
	}
	var last error
	for range portTries {
		l, err := lc.Listen(ctx, "tcp"+family, at.String())
		if err != nil {
			return nil, err
		}
		tcp := l.(*net.TCPListener)
		bound := netip.AddrPortFrom(at.Addr(), tcp.Addr().(*net.TCPAddr).AddrPort().Port())
		p, err := lc.ListenPacket(ctx, "udp"+family, bound.String())
		if err != nil {
			_ = tcp.Close()
			if last = err; at.Port() == 0 && errors.Is(err, syscall.EADDRINUSE) {
				continue
			}
			return nil, err
		}
		udp := p.(*net.UDPConn)
		// The system may give less; queries are lost only in a longer burst.
		_ = udp.SetReadBuffer(udpReadBuffer)
		return &sockets{udp: udp, tcp: tcp, addr: bound}, nil
	}
	return nil, last
}

// onThisHost tells whether an address can be bound without further ado.
func onThisHost(ctx context.Context, a netip.Addr) bool {
	var lc net.ListenConfig
	p, err := lc.ListenPacket(ctx, "udp", netip.AddrPortFrom(a, 0).String())
	if err != nil {
		return false
	}
	_ = p.Close()
	return true
}

// cause is the system's own word for an error, without the address that net
// puts before it.
func cause(err error) error {
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		return sys.Err
	}
	return err
}
