package dns

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

const (
	headerSize = 12
	// udpSize is what we take over UDP, and what we tell others: it passes
	// every path without fragments (DNS flag day 2020).
	udpSize = 1232
	// replySize holds every answer of ours.
	replySize = 4096

	flagQR     = 1 << 15
	flagTC     = 1 << 9
	flagRD     = 1 << 8
	flagRA     = 1 << 7
	maskOpcode = 0xF << 11
	maskRcode  = 0xF
)

// client is who sent a packet, and where to.
type client struct {
	from   netip.Addr
	local  netip.Addr // invalid when unknown
	tenant string     // bound by the listen address; "" asks lb.Callers
	tcp    bool
}

// foreign is a question that is to be forwarded.
type foreign struct {
	msg    *dns.Msg
	opt    *dns.OPT // of msg; nil without EDNS
	route  *route
	client client
}

// limit is how long a reply may be.
func limit(opt *dns.OPT, c client) int {
	switch {
	case c.tcp:
		return dns.MaxMsgSize
	case opt == nil:
		return dns.MinMsgSize
	}
	return max(dns.MinMsgSize, int(opt.UDPSize()))
}

// handle answers one packet, into buf where there is room. It returns neither
// a reply nor a question for what deserves silence. buf may be nil.
func (s *Server) handle(pkt []byte, c client, buf []byte) ([]byte, *foreign) {
	if len(pkt) < headerSize {
		return nil, nil
	}
	flags := binary.BigEndian.Uint16(pkt[2:])
	if flags&flagQR != 0 {
		return nil, nil
	}
	if flags&maskOpcode != 0 {
		return s.bare(pkt, dns.RcodeNotImplemented), nil
	}
	if binary.BigEndian.Uint16(pkt[4:]) != 1 {
		return s.bare(pkt, dns.RcodeFormatError), nil
	}
	msg := new(dns.Msg)
	if err := msg.Unpack(pkt); err != nil || len(msg.Question) != 1 {
		return s.bare(pkt, dns.RcodeFormatError), nil
	}
	opt, sound := edns(msg)
	f := &foreign{msg: msg, opt: opt, client: c}
	q := msg.Question[0]
	switch {
	case !sound:
		return s.reply(f, kindRefused, verdict{rcode: dns.RcodeFormatError}, nil, buf), nil
	case opt != nil && opt.Version() > 0:
		return s.reply(f, kindRefused, verdict{rcode: dns.RcodeBadVers}, nil, buf), nil
	case q.Qclass != dns.ClassINET || refusedType(q.Qtype):
		return s.reply(f, kindRefused, verdict{rcode: dns.RcodeRefused}, nil, buf), nil
	}
	snap := s.cfg.Snapshot()
	if v, ours := s.own(snap, q, c); ours {
		return s.reply(f, kindOurs, v, snap, buf), nil
	}
	var configured bool
	if f.route, configured = s.forward.routeFor(q.Name); !configured {
		return s.reply(f, kindRefused, verdict{rcode: dns.RcodeRefused}, nil, buf), nil
	}
	return nil, f
}

// own answers a question about our zones; false says that it is not ours.
func (s *Server) own(snap *lb.Snapshot, q dns.Question, c client) (verdict, bool) {
	if snap == nil {
		return verdict{rcode: dns.RcodeServerFailure, notReady: true}, s.maybeOurs(q.Name)
	}
	p := locate(snap, q.Name)
	if p.area == areaForeign {
		return verdict{}, false
	}
	caller := s.who(snap, c)
	v := answer(snap, caller, p, question{name: q.Name, qtype: q.Qtype, local: c.local})
	if !v.notReady && caller.Kind == lb.ViewNobody && c.tenant == "" && !c.from.IsLoopback() && private(p) {
		s.unknown.note(time.Now(), c.from, caller.Why)
	}
	return v, !v.foreign
}

// maybeOurs tells whether a name may be ours while there is no Snapshot: the
// pools are not known then, so every reverse name may.
func (s *Server) maybeOurs(name string) bool {
	name = lower(name)
	name = name[:len(name)-1]
	if s.cfg.Domain == "" {
		return true
	}
	for _, zone := range [...]string{s.cfg.Domain, "in-addr.arpa", "ip6.arpa"} {
		if _, ok := below(name, zone); ok {
			return true
		}
	}
	return false
}

func (s *Server) who(snap *lb.Snapshot, c client) lb.View {
	if c.tenant != "" {
		return lb.View{Kind: lb.ViewTenant, Tenant: c.tenant, Why: "the listen address is bound to tenant " + c.tenant}
	}
	if !c.from.IsValid() {
		return lb.View{Why: "the caller's address is not known"}
	}
	return snap.Callers.Who(s.cfg.Node, c.from)
}

// private tells whether a place holds names that not everybody may see.
func private(p place) bool {
	if p.area != areaDomain || p.depth == 0 || p.depth > maxLabels {
		return false
	}
	last := p.labels[p.depth-1]
	return last != labelDedicated && (p.depth > 1 || last != labelNS)
}

// edns finds the one OPT record that a query may have (RFC 6891, section
// 6.1.1); sound is false when there are more.
func edns(msg *dns.Msg) (opt *dns.OPT, sound bool) {
	for _, rr := range msg.Extra {
		o, ok := rr.(*dns.OPT)
		if !ok {
			continue
		}
		if opt != nil {
			return opt, false
		}
		opt = o
	}
	return opt, true
}

// bare is a reply that is a header only: to what could not be read further.
func (s *Server) bare(pkt []byte, rcode int) []byte {
	s.metrics.count(kindRefused, rcode)
	out := make([]byte, headerSize)
	copy(out, pkt[:2])
	flags := binary.BigEndian.Uint16(pkt[2:])&(maskOpcode|flagRD) | flagQR | uint16(rcode)
	if s.forward.possible() {
		flags |= flagRA
	}
	binary.BigEndian.PutUint16(out[2:], flags)
	return out
}

// reply packs a verdict, into buf where there is room. snap is needed for a
// verdict with SOA only.
func (s *Server) reply(f *foreign, k kind, v verdict, snap *lb.Snapshot, buf []byte) []byte {
	s.metrics.count(k, v.rcode)
	out := &dns.Msg{
		MsgHdr: dns.MsgHdr{
			Id: f.msg.Id, Response: true, Rcode: v.rcode,
			Authoritative:    k == kindOurs && (v.rcode == dns.RcodeSuccess || v.rcode == dns.RcodeNameError),
			RecursionDesired: f.msg.RecursionDesired, RecursionAvailable: s.forward.possible(), CheckingDisabled: f.msg.CheckingDisabled,
		},
		Question: f.msg.Question, Answer: v.answer, Extra: v.extra,
	}
	if v.soa != "" {
		out.Ns = []dns.RR{soa(snap.Config, v.soa, negative(snap.Config))}
	}
	var opt *dns.OPT
	if f.opt != nil {
		opt = ourOPT(f.opt)
		if v.notReady {
			opt.Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeNotReady}}
		}
		out.Extra = append(out.Extra, opt)
	}
	packed, err := pack(out, opt, limit(f.opt, f.client), buf)
	if err != nil {
		s.log.Error("DNS reply cannot be packed; the caller gets SERVFAIL", "name", f.msg.Question[0].Name, "error", err)
		out.Answer, out.Ns, out.Extra, out.Rcode, out.Question = nil, nil, nil, dns.RcodeServerFailure, nil
		packed, _ = out.Pack()
	}
	return packed
}

// ourOPT answers a client's OPT record.
func ourOPT(theirs *dns.OPT) *dns.OPT {
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.SetUDPSize(udpSize)
	if theirs.Do() {
		opt.SetDo()
	}
	return opt
}

// pack makes a message fit: it is compressed when it is long, then goes
// without the additional records, which nobody needs, and only then without
// the rest and with TC. opt is the one that is in Extra, or nil.
func pack(m *dns.Msg, opt *dns.OPT, limit int, buf []byte) ([]byte, error) {
	out, err := m.PackBuffer(buf)
	if err != nil || len(out) <= dns.MinMsgSize {
		return out, err
	}
	m.Compress = true
	if out, err = m.PackBuffer(buf); err != nil || len(out) <= limit {
		return out, err
	}
	m.Extra = nil
	if opt != nil {
		m.Extra = []dns.RR{opt}
	}
	if out, err = m.PackBuffer(buf); err != nil || len(out) <= limit {
		return out, err
	}
	m.Answer, m.Ns, m.Truncated = nil, nil, true
	return m.PackBuffer(buf)
}
