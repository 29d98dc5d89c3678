package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxForwards bounds the questions that wait for upstream servers.
	maxForwards = 1024
	// upstreamTimeout is how long one server is waited for, by UDP and again
	// by TCP; forwardTimeout is for all together: then callers have given up.
	upstreamTimeout = 2 * time.Second
	forwardTimeout  = 5 * time.Second
	// failureMemory is how long a server that did not answer is asked last.
	failureMemory = 10 * time.Second
	// upstreamSize is more than any server may send by UDP after it was told
	// udpSize.
	upstreamSize = 4096
)

// errLong is a reply by UDP of which a part is lost.
var errLong = errors.New("the reply is longer than was asked for")

// later forwards a question in a goroutine of its own and hands the reply to
// write. With too many on their way the reply is SERVFAIL at once.
func (s *Server) later(ctx context.Context, children *sync.WaitGroup, f *foreign, write func([]byte)) {
	select {
	case s.forward.slots <- struct{}{}:
	default:
		s.metrics.overflow.Inc()
		write(s.reply(f, kindForwarded, verdict{rcode: dns.RcodeServerFailure}, nil, nil))
		return
	}
	children.Go(func() {
		reply := s.relay(ctx, f)
		<-s.forward.slots
		write(reply)
	})
}

// relay gives the reply to a question that is not ours.
func (s *Server) relay(ctx context.Context, f *foreign) []byte {
	reply, _, err := s.forward.exchange(ctx, f.route, f.msg, f.opt)
	if err != nil {
		s.metrics.failures.Inc()
		s.log.Debug("DNS question not answered upstream", "zone", f.route.zone, "error", err)
		return s.reply(f, kindForwarded, verdict{rcode: dns.RcodeServerFailure}, nil, nil)
	}
	binary.BigEndian.PutUint16(reply, f.msg.Id)
	flags := binary.BigEndian.Uint16(reply[2:]) | flagRA
	binary.BigEndian.PutUint16(reply[2:], flags)
	patchOPT(reply)
	if len(reply) > limit(f.opt, f.client) {
		reply = s.shorten(reply, f)
	}
	s.metrics.count(kindForwarded, int(flags&maskRcode))
	return reply
}

// shorten makes a reply fit by leaving out records, and sets TC.
func (s *Server) shorten(reply []byte, f *foreign) []byte {
	var m dns.Msg
	if err := m.Unpack(reply); err == nil {
		m.Truncate(limit(f.opt, f.client))
		if out, err := m.Pack(); err == nil && len(out) <= limit(f.opt, f.client) {
			return out
		}
	}
	// What the codec cannot take apart goes without any record.
	_, off, err := dns.UnpackDomainName(reply, headerSize)
	if err != nil {
		off = headerSize - 4
	}
	out := append([]byte(nil), reply[:off+4]...)
	binary.BigEndian.PutUint16(out[2:], binary.BigEndian.Uint16(out[2:])|flagTC)
	clear(out[6:headerSize])
	return out
}

// exchange asks the servers of a route in their order, those that failed
// lately last. The reply answers this very question, in the case in which it
// was asked; its id is not yet the caller's.
func (f *forwarding) exchange(ctx context.Context, r *route, q *dns.Msg, opt *dns.OPT) ([]byte, netip.AddrPort, error) {
	if len(r.servers) == 0 {
		return nil, netip.AddrPort{}, errors.New("no upstream server is known")
	}
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	var (
		second []byte // a reply that says only that the server cannot answer
		from   netip.AddrPort
		errs   []error
	)
	for _, u := range r.inOrder(time.Now()) {
		reply, err := u.ask(ctx, q, opt)
		if err != nil {
			if ctx.Err() == nil {
				u.failedUntil.Store(time.Now().Add(failureMemory).UnixNano())
			}
			errs = append(errs, fmt.Errorf("%s: %w", u.addr, err))
			continue
		}
		u.failedUntil.Store(0)
		switch binary.BigEndian.Uint16(reply[2:]) & maskRcode {
		case dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented:
			if second == nil {
				second, from = reply, u.addr
			}
			continue
		}
		return reply, u.addr, nil
	}
	if second != nil {
		return second, from, nil
	}
	return nil, netip.AddrPort{}, errors.Join(errs...)
}

func (r *route) inOrder(now time.Time) []*upstream {
	good, bad := make([]*upstream, 0, len(r.servers)), []*upstream(nil)
	for _, u := range r.servers {
		if u.failedUntil.Load() > now.UnixNano() {
			bad = append(bad, u)
		} else {
			good = append(good, u)
		}
	}
	return append(good, bad...)
}

// ask asks one server by UDP, and by TCP when the reply does not fit. Both go
// from a port that the system picks anew, with an id picked anew.
func (u *upstream) ask(ctx context.Context, q *dns.Msg, opt *dns.OPT) ([]byte, error) {
	reply, err := u.try(ctx, "udp", q, opt)
	if err != nil && !errors.Is(err, errLong) {
		return nil, err
	}
	if err == nil && binary.BigEndian.Uint16(reply[2:])&flagTC == 0 {
		return reply, nil
	}
	if full, failed := u.try(ctx, "tcp", q, opt); failed == nil {
		return full, nil
	}
	return reply, err
}

func (u *upstream) try(ctx context.Context, network string, q *dns.Msg, opt *dns.OPT) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	out := &dns.Msg{MsgHdr: dns.MsgHdr{Id: uint16(rand.Uint32()), RecursionDesired: q.RecursionDesired,
		AuthenticatedData: q.AuthenticatedData, CheckingDisabled: q.CheckingDisabled}, Question: q.Question}
	if opt != nil {
		out.Extra = []dns.RR{ourOPT(opt)}
	}
	wire, err := out.Pack()
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, u.addr.String())
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if network == "tcp" {
		err = writeMessage(conn, wire)
	} else {
		_, err = conn.Write(wire)
	}
	if err != nil {
		return nil, err
	}
	return await(conn, network, wire, q.Question[0])
}

// await reads until the reply to a question arrives. Whatever else arrives is
// somebody's guess, or a reply that came too late.
func await(conn net.Conn, network string, wire []byte, q dns.Question) ([]byte, error) {
	var buf []byte
	if network == "udp" {
		buf = make([]byte, upstreamSize)
	}
	for {
		pkt, err := receive(conn, network, buf)
		if err != nil {
			return nil, err
		}
		off, ok := answers(pkt, wire, q)
		switch {
		case !ok:
			continue
		case off == 0:
			return nil, fmt.Errorf("answers %s without the question", rcodeName(int(pkt[3]&maskRcode)))
		case len(pkt) == upstreamSize && network == "udp":
			return nil, errLong
		}
		// Both hold the name uncompressed, so they differ in case only.
		if off <= len(wire) {
			copy(pkt[headerSize:off], wire[headerSize:off])
		}
		return pkt, nil
	}
}

func receive(conn net.Conn, network string, buf []byte) ([]byte, error) {
	if network == "tcp" {
		return readMessage(conn, nil)
	}
	n, err := conn.Read(buf)
	return buf[:n], err
}

// answers tells whether a packet answers a question, whatever case the server
// has written it in, and where the question ends: 0 for a refusal that leaves
// it out.
func answers(pkt, wire []byte, q dns.Question) (end int, ok bool) {
	if len(pkt) < headerSize || pkt[0] != wire[0] || pkt[1] != wire[1] {
		return 0, false
	}
	flags := binary.BigEndian.Uint16(pkt[2:])
	if flags&flagQR == 0 || flags&maskOpcode != 0 {
		return 0, false
	}
	switch binary.BigEndian.Uint16(pkt[4:]) {
	case 0:
		return 0, flags&maskRcode != 0
	case 1:
	default:
		return 0, false
	}
	name, off, err := dns.UnpackDomainName(pkt, headerSize)
	if err != nil || off+4 > len(pkt) || !strings.EqualFold(name, q.Name) {
		return 0, false
	}
	return off + 4, binary.BigEndian.Uint16(pkt[off:]) == q.Qtype && binary.BigEndian.Uint16(pkt[off+2:]) == q.Qclass
}

// patchOPT writes our UDP size into a reply's OPT record: it holds for one hop
// (RFC 6891, section 6.2.3). A reply that cannot be walked stays as it is.
func patchOPT(reply []byte) {
	_, off, err := dns.UnpackDomainName(reply, headerSize)
	if err != nil {
		return
	}
	off += 4
	records := 0
	for at := 6; at < headerSize; at += 2 {
		records += int(binary.BigEndian.Uint16(reply[at:]))
	}
	for range records {
		if _, off, err = dns.UnpackDomainName(reply, off); err != nil || off+10 > len(reply) {
			return
		}
		if binary.BigEndian.Uint16(reply[off:]) == dns.TypeOPT {
			binary.BigEndian.PutUint16(reply[off+2:], udpSize)
			return
		}
		off += 10 + int(binary.BigEndian.Uint16(reply[off+8:]))
	}
}

// writeMessage writes one message of DNS over TCP.
func writeMessage(w io.Writer, msg []byte) error {
	out := make([]byte, 2, 2+len(msg))
	binary.BigEndian.PutUint16(out, uint16(len(msg)))
	_, err := w.Write(append(out, msg...))
	return err
}

// readMessage reads one message of DNS over TCP, into buf where there is room.
func readMessage(r io.Reader, buf []byte) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > len(buf) {
		buf = make([]byte, n)
	}
	_, err := io.ReadFull(r, buf[:n])
	return buf[:n], err
}
