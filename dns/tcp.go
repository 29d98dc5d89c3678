package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// maxConnections bounds TCP connections, maxPerSource those from one
	// address; more are closed at once.
	maxConnections = 1024
	maxPerSource   = 256
	// maxPipelined bounds the questions of one connection that are being
	// forwarded; further ones wait unread.
	maxPipelined = 32
	// tcpIdle is how long the next message may take to arrive in full
	// (RFC 7766, section 6.2.3), tcpWrite how long a client may take to read.
	tcpIdle  = 10 * time.Second
	tcpWrite = 5 * time.Second
)

// connections counts what is open.
type connections struct {
	mu    sync.Mutex // guards what follows
	total int
	from  map[netip.Addr]int
}

func newConnections() *connections { return &connections{from: map[netip.Addr]int{}} }

func (c *connections) add(a netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total >= maxConnections || c.from[a] >= maxPerSource {
		return false
	}
	c.total++
	c.from[a]++
	return true
}

func (c *connections) remove(a netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total--
	if c.from[a]--; c.from[a] == 0 {
		delete(c.from, a)
	}
}

// acceptTCP serves connections until the socket is closed, then waits for
// them.
func (s *Server) acceptTCP(ctx context.Context, open *sockets, tenant string) {
	var children sync.WaitGroup
	defer children.Wait()
	for {
		conn, err := open.tcp.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Warn("DNS over TCP: accept failed", "address", open.addr, "error", err)
			if !pause(ctx, readPause) {
				return
			}
			continue
		}
		from := address(conn.RemoteAddr())
		if !s.conns.add(from) {
			s.metrics.refused.Inc()
			_ = conn.Close()
			continue
		}
		children.Go(func() {
			defer s.conns.remove(from)
			s.serveConn(ctx, conn, client{from: from, local: address(conn.LocalAddr()), tenant: tenant, tcp: true})
		})
	}
}

func address(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// serveConn answers the messages of one connection until it is idle, broken or
// at its end. Forwarded questions are answered as their replies arrive, in any
// order (RFC 7766, section 7).
func (s *Server) serveConn(ctx context.Context, conn *net.TCPConn, c client) {
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	var (
		children sync.WaitGroup
		writing  sync.Mutex
		slots    = make(chan struct{}, maxPipelined)
	)
	defer children.Wait()
	write := func(reply []byte) {
		writing.Lock()
		defer writing.Unlock()
		_ = conn.SetWriteDeadline(time.Now().Add(tcpWrite))
		if writeMessage(conn, reply) != nil {
			_ = conn.Close() // a half-written message cannot be mended; ends the reader, too
		}
	}
	in, out := make([]byte, querySize), make([]byte, replySize)
	for {
		_ = conn.SetReadDeadline(time.Now().Add(tcpIdle))
		pkt, err := readMessage(conn, in)
		if err != nil {
			return
		}
		reply, f := s.handle(pkt, c, out)
		switch {
		case f != nil:
			slots <- struct{}{}
			s.later(ctx, &children, f, func(reply []byte) {
				write(reply)
				<-slots
			})
		case reply != nil:
			write(reply)
		default:
			return // what deserves silence over UDP ends a connection
		}
	}
}
