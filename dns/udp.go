package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

const (
	// maxReaders bounds the goroutines that read one UDP socket.
	maxReaders = 4
	// querySize is longer than any query that makes sense.
	querySize   = 4096
	controlSize = 128
	// readPause follows a read error that is not the socket's end.
	readPause = 100 * time.Millisecond
)

// serveEndpoint starts what reads an endpoint's sockets.
func (s *Server) serveEndpoint(ctx context.Context, children *sync.WaitGroup, e *endpoint, open *sockets) {
	socket := newUDPSocket(open)
	for range min(runtime.GOMAXPROCS(0), maxReaders) {
		children.Go(func() { s.readUDP(ctx, children, socket, e.want.Tenant) })
	}
	children.Go(func() { s.acceptTCP(ctx, open, e.want.Tenant) })
}

// readUDP answers packets until the socket is closed.
func (s *Server) readUDP(ctx context.Context, children *sync.WaitGroup, socket *udpSocket, tenant string) {
	in, out, control := make([]byte, querySize), make([]byte, replySize), make([]byte, controlSize)
	for {
		n, from, local, back, err := socket.read(in, control)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Warn("DNS over UDP: read failed", "address", socket.addr, "error", err)
			if !pause(ctx, readPause) {
				return
			}
			continue
		}
		reply, f := s.handle(in[:n], client{from: from.Addr(), local: local, tenant: tenant}, out)
		if f != nil {
			s.later(ctx, children, f, func(reply []byte) { s.writeUDP(socket, reply, back, from) })
			continue
		}
		if reply != nil {
			s.writeUDP(socket, reply, back, from)
		}
	}
}

func (s *Server) writeUDP(socket *udpSocket, reply, back []byte, to netip.AddrPort) {
	if _, _, err := socket.conn.WriteMsgUDPAddrPort(reply, back, to); err != nil && !errors.Is(err, net.ErrClosed) {
		s.log.Debug("DNS over UDP: reply not sent", "to", to, "error", err)
	}
}

// pause waits; false says that ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// udpSocket knows which of the host's addresses a packet came to, and answers
// from there: a client drops a reply from any other. It is immutable.
type udpSocket struct {
	conn     *net.UDPConn
	addr     netip.AddrPort
	wildcard bool // the address is in each packet's control data
}

func newUDPSocket(open *sockets) *udpSocket {
	u := &udpSocket{conn: open.udp, addr: open.addr}
	if !open.addr.Addr().IsUnspecified() {
		return u
	}
	var err error
	if open.addr.Addr().Is4() {
		err = ipv4.NewPacketConn(open.udp).SetControlMessage(ipv4.FlagDst, true)
	} else {
		err = ipv6.NewPacketConn(open.udp).SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true)
	}
	// Without it the system picks the reply's source, which is right on hosts
	// with one address.
	u.wildcard = err == nil
	return u
}

// read reads one packet. back is the control data of the reply.
func (u *udpSocket) read(in, control []byte) (n int, from netip.AddrPort, local netip.Addr, back []byte, err error) {
	if !u.wildcard {
		n, from, err = u.conn.ReadFromUDPAddrPort(in)
		return n, from, u.addr.Addr(), nil, err
	}
	n, length, _, from, err := u.conn.ReadMsgUDPAddrPort(in, control)
	if err != nil {
		return 0, from, local, nil, err
	}
	if u.addr.Addr().Is4() {
		var cm ipv4.ControlMessage
		if cm.Parse(control[:length]) == nil && cm.Dst != nil {
			local, _ = netip.AddrFromSlice(cm.Dst.To4())
			back = (&ipv4.ControlMessage{Src: cm.Dst}).Marshal()
		}
		return n, from, local, back, nil
	}
	var cm ipv6.ControlMessage
	if cm.Parse(control[:length]) == nil && cm.Dst != nil {
		local, _ = netip.AddrFromSlice(cm.Dst)
		back = (&ipv6.ControlMessage{Src: cm.Dst, IfIndex: cm.IfIndex}).Marshal()
	}
	return n, from, local, back, nil
}
