package dns

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

// Names and numbers of our zones.
const (
	labelDedicated = "dedicated"
	labelNS        = "ns"
	labelTCP       = "_tcp"
	labelUDP       = "_udp"

	// negativeTTL bounds how long "no such name" is kept, so that a service
	// that was just created is found soon (RFC 2308, section 5).
	negativeTTL = 5 * time.Second
	// soaSerial never changes: nobody transfers the zone, and a serial that
	// moved would show what goes on in tenants that the caller may not see.
	soaSerial  = 1
	soaRefresh = 3600
	soaRetry   = 600
	soaExpire  = 86400
)

// question is what the answering core is asked.
type question struct {
	name  string // presentation form, the case as asked, with the dot at its end
	qtype uint16
	local netip.Addr // the address it came to, for ns.DOMAIN; invalid when unknown
}

// verdict is what our zones say to a question.
type verdict struct {
	rcode    int
	answer   []dns.RR
	extra    []dns.RR
	soa      string // zone whose SOA goes into authority; "" is none
	foreign  bool   // not for this caller to know that it is ours: forward it
	notReady bool   // the name may turn out to exist
	reason   reason
	service  *lb.Service // that reason speaks of
}

// reason is why a verdict came out as it did; Resolve puts it into words.
type reason uint8

const (
	reasonNone        reason = iota
	reasonService            // service exists and is visible
	reasonHidden             // service exists; this caller may not see it
	reasonNoService          // no such service
	reasonNoPort             // service has no such port
	reasonNoDedicated        // service has no dedicated IP
	reasonApex               // name of the zone itself
	reasonInner              // only names below it exist
	reasonNoName             // nothing has such a name
	reasonAddress            // address is bound to service
	reasonNoAddress          // address is bound to nothing
)

// asking is one question to our zones.
type asking struct {
	snap   *lb.Snapshot
	caller lb.View
	place  place
	question
}

// refusedType tells whether a type is never answered: nobody may copy a zone.
func refusedType(qtype uint16) bool { return qtype == dns.TypeAXFR || qtype == dns.TypeIXFR }

// answer is the answering core: what the caller gets for a name that lies at
// place, which is not areaForeign. It is pure.
func answer(snap *lb.Snapshot, caller lb.View, p place, q question) verdict {
	a := &asking{snap: snap, caller: caller, place: p, question: q}
	var v verdict
	switch p.area {
	case areaDomain:
		v = a.domain()
	case areaReverse:
		v = a.reverse()
	case areaReverseUp:
		// Always there, whatever is below it: absence would tell resolvers
		// that nothing is, and presence would tell callers what they may not see.
		v = a.inner()
	default:
		v = a.absent(reasonNoName, nil)
	}
	if v.rcode == dns.RcodeNameError && !v.foreign && snap.Catalog != nil && !snap.Catalog.Ready {
		v.rcode, v.soa, v.notReady = dns.RcodeServerFailure, "", true
	}
	return v
}

func (a *asking) domain() verdict {
	p := &a.place
	last := ""
	if p.depth > 0 && p.depth <= maxLabels {
		last = p.labels[p.depth-1]
	}
	switch {
	case p.depth == 0:
		return a.apex()
	case p.depth > maxLabels:
		return a.absent(reasonNoName, nil)
	case last == labelDedicated:
		return a.dedicated()
	case p.depth == 1 && last == labelNS:
		return a.nameServer()
	case p.depth == 1:
		return a.tenant(last)
	}
	svc, why := a.service(p.labels[p.depth-2], last)
	if why != reasonService {
		return a.absent(why, svc)
	}
	switch p.depth {
	case 2:
		return a.addresses(svc, svc.Address, svc.Address6)
	case 3:
		if hasProtocol(svc, p.labels[0]) {
			return a.inner()
		}
		return a.absent(reasonNoPort, svc)
	default:
		return a.port(svc, p.labels[0], p.labels[1])
	}
}

// service looks a service up for the caller.
func (a *asking) service(name, tenant string) (*lb.Service, reason) {
	svc := a.snap.Services.Get(lb.Key{Tenant: tenant, Service: name})
	switch {
	case svc == nil:
		return nil, reasonNoService
	case !a.caller.Sees(svc):
		return svc, reasonHidden
	}
	return svc, reasonService
}

func (a *asking) addresses(svc *lb.Service, v4, v6 netip.Addr) verdict {
	v := verdict{reason: reasonService, service: svc}
	switch {
	case a.qtype == dns.TypeA && v4.IsValid():
		v.answer = []dns.RR{a.address(a.name, v4)}
	case a.qtype == dns.TypeAAAA && v6.IsValid():
		v.answer = []dns.RR{a.address(a.name, v6)}
	case a.qtype == dns.TypeANY && (v4.IsValid() || v6.IsValid()):
		v.answer = a.any()
	default:
		v.soa = a.place.zone
	}
	return v
}

// port answers _NAME._tcp and _NAME._udp (RFC 2782).
func (a *asking) port(svc *lb.Service, name, protocol string) verdict {
	i := slices.IndexFunc(svc.Ports, func(p lb.Port) bool {
		return protocolLabel(p.Protocol) == protocol && len(name) > 1 && name[0] == '_' && strings.EqualFold(p.Name, name[1:])
	})
	if i < 0 {
		return a.absent(reasonNoPort, svc)
	}
	v := verdict{reason: reasonService, service: svc}
	switch a.qtype {
	case dns.TypeSRV:
		target := svc.Domain + "."
		v.answer = []dns.RR{&dns.SRV{Hdr: a.header(a.name, dns.TypeSRV), Port: svc.Ports[i].Port, Target: target}}
		for _, addr := range []netip.Addr{svc.Address, svc.Address6} {
			if addr.IsValid() {
				v.extra = append(v.extra, a.address(target, addr))
			}
		}
	case dns.TypeANY:
		v.answer = a.any()
	default:
		v.soa = a.place.zone
	}
	return v
}

func protocolLabel(protocol string) string {
	if protocol == lb.UDP {
		return labelUDP
	}
	return labelTCP
}

func hasProtocol(svc *lb.Service, label string) bool {
	return slices.ContainsFunc(svc.Ports, func(p lb.Port) bool { return protocolLabel(p.Protocol) == label })
}

// dedicated answers dedicated.DOMAIN and what is below it, to everybody alike.
func (a *asking) dedicated() verdict {
	p := &a.place
	switch p.depth {
	case 1:
		return a.inner()
	case 2:
		if a.inTenant(p.labels[0], func(s *lb.Service) bool { return s.Dedicated.IsValid() }) {
			return a.inner()
		}
		return a.absent(reasonNoDedicated, nil)
	case 3:
		svc := a.snap.Services.Get(lb.Key{Tenant: p.labels[1], Service: p.labels[0]})
		if svc == nil {
			return a.absent(reasonNoService, nil)
		}
		if !svc.Dedicated.IsValid() {
			return a.absent(reasonNoDedicated, svc)
		}
		v4, v6 := svc.Dedicated, netip.Addr{}
		if v4.Is6() {
			v4, v6 = v6, v4
		}
		return a.addresses(svc, v4, v6)
	}
	return a.absent(reasonNoName, nil)
}

// tenant answers TENANT.DOMAIN, which exists while the caller sees a service
// in it.
func (a *asking) tenant(name string) verdict {
	if a.inTenant(name, a.caller.Sees) {
		return a.inner()
	}
	return a.absent(reasonNoService, nil)
}

// inTenant tells whether a service of a tenant is such. It walks the tenant's
// services only, and those of the caller's own tenant end it at once.
func (a *asking) inTenant(tenant string, such func(*lb.Service) bool) bool {
	order := a.snap.Order
	at, _ := slices.BinarySearchFunc(order, lb.Key{Tenant: tenant}, func(s *lb.Service, k lb.Key) int { return s.Key.Compare(k) })
	for ; at < len(order) && order[at].Key.Tenant == tenant; at++ {
		if such(order[at]) {
			return true
		}
	}
	return false
}

// apex answers the name of a zone.
func (a *asking) apex() verdict {
	v := verdict{reason: reasonApex}
	switch a.qtype {
	case dns.TypeSOA:
		v.answer = []dns.RR{a.soa(a.name, a.ttl())}
	case dns.TypeNS:
		ns := a.nsName()
		v.answer = []dns.RR{&dns.NS{Hdr: a.header(a.name, dns.TypeNS), Ns: ns}}
		if usable(a.local) {
			v.extra = []dns.RR{a.address(ns, a.local.Unmap())}
		}
	case dns.TypeANY:
		v.answer = a.any()
	default:
		v.soa = a.place.zone
	}
	return v
}

// nameServer answers ns.DOMAIN: the address that this very query came to.
func (a *asking) nameServer() verdict {
	v4, v6 := netip.Addr{}, netip.Addr{}
	if usable(a.local) {
		if local := a.local.Unmap().WithZone(""); local.Is4() {
			v4 = local
		} else {
			v6 = local
		}
	}
	v := a.addresses(nil, v4, v6)
	v.reason = reasonApex
	return v
}

func usable(local netip.Addr) bool { return local.IsValid() && !local.IsUnspecified() }

func (a *asking) reverse() verdict {
	svc, bound := a.snap.ServiceAt(a.place.addr)
	target := ""
	v := verdict{reason: reasonAddress, service: svc}
	switch {
	case bound && svc.Dedicated == a.place.addr:
		target = svc.Key.Service + "." + svc.Key.Tenant + "." + labelDedicated + "." + a.snap.Config.Domain + "."
	case bound && a.caller.Sees(svc):
		target = svc.Domain + "."
	case !a.place.inPool:
		return verdict{foreign: true, reason: reasonHidden, service: svc}
	case bound:
		v = a.absent(reasonHidden, svc)
	default:
		v = a.absent(reasonNoAddress, nil)
	}
	switch {
	case target == "":
	case a.qtype == dns.TypePTR:
		v.answer = []dns.RR{&dns.PTR{Hdr: a.header(a.name, dns.TypePTR), Ptr: target}}
	case a.qtype == dns.TypeANY:
		v.answer = a.any()
	default:
		v.soa = a.place.zone
	}
	return v
}

// inner is a name that exists only because names below it do: it has no record
// (RFC 8020).
func (a *asking) inner() verdict {
	if a.place.apex {
		return a.apex()
	}
	return verdict{reason: reasonInner, soa: a.place.zone}
}

// absent is the answer for a name that does not exist and, the same to the
// byte, for one that the caller may not see.
func (a *asking) absent(why reason, svc *lb.Service) verdict {
	return verdict{rcode: dns.RcodeNameError, soa: a.place.zone, reason: why, service: svc}
}

// any is the short answer to ANY (RFC 8482, section 4.2).
func (a *asking) any() []dns.RR {
	return []dns.RR{&dns.HINFO{Hdr: a.header(a.name, dns.TypeHINFO), Cpu: "RFC8482"}}
}

func (a *asking) address(name string, addr netip.Addr) dns.RR {
	if addr.Is4() {
		return &dns.A{Hdr: a.header(name, dns.TypeA), A: addr.AsSlice()}
	}
	return &dns.AAAA{Hdr: a.header(name, dns.TypeAAAA), AAAA: addr.AsSlice()}
}

func (a *asking) header(name string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: a.ttl()}
}

func (a *asking) ttl() uint32 { return seconds(a.snap.Config.TTL) }

func (a *asking) nsName() string { return labelNS + "." + a.snap.Config.Domain + "." }

func (a *asking) soa(owner string, ttl uint32) dns.RR { return soa(a.snap.Config, owner, ttl) }

// soa is a zone's SOA record; owner is its apex.
func soa(c *lb.Config, owner string, ttl uint32) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl},
		Ns:  labelNS + "." + c.Domain + ".", Mbox: "hostmaster." + c.Domain + ".",
		Serial: soaSerial, Refresh: soaRefresh, Retry: soaRetry, Expire: soaExpire, Minttl: negative(c),
	}
}

// negative is the TTL of absence, in seconds.
func negative(c *lb.Config) uint32 { return seconds(min(c.TTL, negativeTTL)) }

// seconds rounds down: nobody keeps an answer longer than was asked for.
func seconds(d time.Duration) uint32 { return uint32(max(0, min(d/time.Second, 1<<31-1))) }
