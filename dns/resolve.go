package dns

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

// Answer is what DNS answers to one caller, and why. Why is for operators: it
// speaks of what the caller may not see.
type Answer struct {
	Rcode   string `json:"rcode"` // NOERROR, NXDOMAIN, ...; "" from Resolve for a name that is not ours
	Answers []RR   `json:"answers"`
	View    string `json:"view"` // a tenant, all or nobody
	Why     string `json:"why"`
}

// RR is one record of the answer section. Names have no dot at their end.
type RR struct {
	Name string `json:"name"`
	Type string `json:"type"`
	TTL  uint32 `json:"ttl"` // seconds
	Data string `json:"data"`
}

// Resolve says what our zones answer to a caller, from the same core as the
// server. It is pure; snap may be nil. A name that is not ours is not looked
// up: its Rcode is empty. See Server.Resolve for one that is.
func Resolve(snap *lb.Snapshot, caller lb.View, name string, qtype uint16) Answer {
	out := Answer{Answers: []RR{}, View: caller.String()}
	if _, ok := dns.IsDomainName(name); !ok {
		out.Rcode, out.Why = rcodeName(dns.RcodeFormatError), fmt.Sprintf("%q is no domain name", name)
		return out
	}
	if refusedType(qtype) {
		out.Rcode, out.Why = rcodeName(dns.RcodeRefused), "nobody may copy a zone"
		return out
	}
	if snap == nil {
		out.Rcode, out.Why = rcodeName(dns.RcodeServerFailure), "nothing is known yet"
		return out
	}
	q := question{name: dns.Fqdn(name), qtype: qtype}
	p := locate(snap, q.name)
	if p.area == areaForeign {
		out.Why = "the name is not ours: it is forwarded"
		return out
	}
	v := answer(snap, caller, p, q)
	if v.foreign {
		out.Why = fmt.Sprintf("the address is %s's, which %s may not see, and in no pool: it is forwarded", v.service.Key, describe(caller))
		return out
	}
	out.Rcode, out.Answers = rcodeName(v.rcode), records(v.answer)
	out.Why = v.explain(caller, p, qtype)
	if caller.Why != "" {
		out.Why += "; the view is " + caller.String() + " by: " + caller.Why
	}
	return out
}

// Resolve says what this server answers to a caller at an address, looking up
// names of others at the upstream servers.
func (s *Server) Resolve(ctx context.Context, from netip.Addr, name string, qtype uint16) Answer {
	snap := s.cfg.Snapshot()
	var caller lb.View
	if snap != nil {
		caller = s.who(snap, client{from: from})
	}
	out := Resolve(snap, caller, name, qtype)
	fqdn := dns.Fqdn(name)
	if out.Rcode != "" && (snap != nil || s.maybeOurs(fqdn)) {
		return out
	}
	if _, ok := dns.IsDomainName(name); !ok || refusedType(qtype) {
		return out
	}
	r, configured := s.forward.routeFor(fqdn)
	if !configured {
		out.Rcode, out.Why = rcodeName(dns.RcodeRefused), "the name is not ours, and dns.forward has no server for it"
		return out
	}
	msg := new(dns.Msg).SetQuestion(fqdn, qtype)
	reply, upstream, err := s.forward.exchange(ctx, r, msg, nil)
	if err == nil {
		err = msg.Unpack(reply)
	}
	if err != nil {
		out.Rcode, out.Why = rcodeName(dns.RcodeServerFailure), fmt.Sprintf("the name is not ours, and no upstream has answered: %v", err)
		return out
	}
	out.Rcode, out.Answers = rcodeName(msg.Rcode), records(msg.Answer)
	out.Why = fmt.Sprintf("the name is not ours; %s has answered", upstream)
	return out
}

func records(rrs []dns.RR) []RR {
	out := make([]RR, 0, len(rrs))
	for _, rr := range rrs {
		h := rr.Header()
		data := strings.TrimPrefix(rr.String(), h.String())
		switch h.Rrtype {
		case dns.TypeCNAME, dns.TypeDNAME, dns.TypeMX, dns.TypeNS, dns.TypePTR, dns.TypeSRV:
			data = strings.TrimSuffix(data, ".")
		}
		out = append(out, RR{Name: strings.TrimSuffix(h.Name, "."), Type: dns.TypeToString[h.Rrtype], TTL: h.Ttl, Data: data})
	}
	return out
}

func describe(v lb.View) string {
	switch v.Kind {
	case lb.ViewAll:
		return "the host itself"
	case lb.ViewTenant:
		if v.Service != "" {
			return "service " + v.Tenant + "/" + v.Service
		}
		return "tenant " + v.Tenant
	}
	return "a caller that is nobody"
}

// explain puts a verdict into words.
func (v verdict) explain(caller lb.View, p place, qtype uint16) string {
	out := v.words(caller, p)
	if v.rcode == dns.RcodeSuccess && len(v.answer) == 0 {
		out += ", and has no record of type " + dns.Type(qtype).String()
	}
	if v.notReady {
		out += "; not every source has answered yet, so it may turn out to exist"
	}
	return out
}

func (v verdict) words(caller lb.View, p place) string {
	switch v.reason {
	case reasonService:
		return fmt.Sprintf("service %s exists, with %d of %d instances taking traffic", v.service.Key, v.service.Healthy(), v.service.Total())
	case reasonHidden:
		return fmt.Sprintf("service %s exists, but %s may not call it", v.service.Key, describe(caller))
	case reasonNoService:
		if p.depth < 2 {
			return fmt.Sprintf("tenant %s has no service that %s may call", p.labels[0], describe(caller))
		}
		at := p.depth - 2
		if p.labels[p.depth-1] == labelDedicated {
			at = 0
		}
		return fmt.Sprintf("tenant %s has no service %s", p.labels[at+1], p.labels[at])
	case reasonNoPort:
		return fmt.Sprintf("service %s has no such port; it has %s", v.service.Key, portNames(v.service))
	case reasonNoDedicated:
		if v.service == nil {
			return fmt.Sprintf("no service of tenant %s has a dedicated IP", p.labels[0])
		}
		return fmt.Sprintf("service %s has no dedicated IP", v.service.Key)
	case reasonApex:
		return "the name belongs to the zone itself"
	case reasonInner:
		return "the name exists because names below it do"
	case reasonAddress:
		return "the address is bound to service " + v.service.Key.String()
	case reasonNoAddress:
		return fmt.Sprintf("address %s is bound to no service", p.addr)
	}
	return "names of this form do not exist"
}

func portNames(s *lb.Service) string {
	if len(s.Ports) == 0 {
		return "none"
	}
	names := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		names[i] = "_" + p.Name + "." + protocolLabel(p.Protocol)
	}
	return strings.Join(names, ", ")
}
