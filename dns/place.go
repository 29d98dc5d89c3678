package dns

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/miekg/dns"

	"github.com/roostmesh/roost/lb"
)

// area says in which part of the name space a name lies.
type area uint8

const (
	areaForeign   area = iota // not ours: forwarded
	areaDomain                // in the zone of service names
	areaReverse               // the reverse name of one address
	areaReverseUp             // above reverse names, inside a pool
	areaReverseNo             // below a reverse name, or not a number: never exists
)

// maxLabels is the depth of the deepest name that exists: _http._tcp.shop.acme.
const maxLabels = 4

// place is where a name lies. It depends on the configuration and on which
// addresses are bound, never on the caller.
type place struct {
	area   area
	zone   string            // apex of the zone, with the dot at its end; lower case, as its SOA is written
	apex   bool              // the name is the apex
	labels [maxLabels]string // areaDomain: below the apex, from the left, lower case
	depth  int               // of labels; more than maxLabels never exists
	addr   netip.Addr        // areaReverse
	inPool bool              // areaReverse: never forwarded, whoever asks
}

// locate finds the place of a name in presentation form, in any case, with the
// dot at its end.
func locate(s *lb.Snapshot, name string) place {
	name = lower(name)
	name = name[:len(name)-1]
	if rest, ok := below(name, s.Config.Domain); ok {
		p := place{area: areaDomain, apex: rest == "", zone: s.Config.Domain + "."}
		p.split(rest)
		return p
	}
	if rest, ok := below(name, "in-addr.arpa"); ok {
		return reverse(s, name, rest, 32, 8, 10)
	}
	if rest, ok := below(name, "ip6.arpa"); ok {
		return reverse(s, name, rest, 128, 4, 16)
	}
	return place{}
}

// split fills labels from a name below the apex. What has an escaped character
// in it is no name of ours.
func (p *place) split(rest string) {
	if rest == "" {
		return
	}
	p.depth = strings.Count(rest, ".") + 1
	if p.depth > maxLabels || strings.IndexByte(rest, '\\') >= 0 {
		p.depth = maxLabels + 1
		return
	}
	for i := range p.depth {
		p.labels[i], rest, _ = strings.Cut(rest, ".")
	}
}

// reverse finds the place of a name under in-addr.arpa or ip6.arpa. Its labels
// are numbers of width bits in that base, of an address of that many bits.
func reverse(s *lb.Snapshot, name, rest string, bits, width, base int) place {
	var raw [16]byte
	known := 0 // bits of the address, from the front
	for rest != "" && known < bits {
		cut := strings.LastIndexByte(rest, '.')
		n, err := strconv.ParseUint(rest[cut+1:], base, width)
		if err != nil || len(rest)-cut-1 > 1 && rest[cut+1] == '0' {
			break
		}
		raw[known/8] |= byte(n << (8 - width - known%8))
		known += width
		rest = rest[:max(cut, 0)]
	}
	addr := netip.AddrFrom16(raw)
	if bits == 32 {
		addr = netip.AddrFrom4([4]byte(raw[:4]))
	}
	p := place{addr: addr}
	pool, ok := poolOf(s.Config, netip.PrefixFrom(addr, known))
	switch {
	case ok:
		p.inPool = true
		p.zone = tail(name, (pool.Bits()+width-1)/width+2) + "."
	case known == bits && rest == "" && s.ByAddress[addr] != nil:
		p.zone = name + "."
	default:
		return place{}
	}
	p.apex = len(p.zone) == len(name)+1
	switch {
	case rest != "":
		p.area = areaReverseNo
	case known < bits:
		p.area = areaReverseUp
	default:
		p.area = areaReverse
	}
	return p
}

// poolOf is the pool that a prefix lies wholly in.
func poolOf(c *lb.Config, p netip.Prefix) (netip.Prefix, bool) {
	in := func(pool netip.Prefix) bool { return p.Bits() >= pool.Bits() && pool.Contains(p.Addr()) }
	for _, pool := range c.InternalPools {
		if in(pool) {
			return pool, true
		}
	}
	for _, pool := range c.DedicatedPools {
		if in(pool.Prefix) {
			return pool.Prefix, true
		}
	}
	return netip.Prefix{}, false
}

// tail is the last n labels of a name without the dot at its end.
func tail(name string, n int) string {
	at := len(name)
	for ; n > 0 && at >= 0; n-- {
		at = strings.LastIndexByte(name[:at], '.')
	}
	return name[at+1:]
}

// below tells whether a name is zone or below it, and gives the part below.
// Neither has the dot at its end. The name is in presentation form: an escaped
// dot separates nothing.
func below(name, zone string) (rest string, ok bool) {
	cut := len(name) - len(zone)
	if zone == "" || cut < 0 || !strings.EqualFold(name[cut:], zone) {
		return "", false
	}
	if cut == 0 {
		return "", true
	}
	if name[cut-1] != '.' || escaped(name, cut-1) {
		return "", false
	}
	return name[:cut-1], true
}

// escaped tells whether the character at i has an odd number of backslashes
// before it.
func escaped(name string, i int) bool {
	n := 0
	for i--; i >= 0 && name[i] == '\\'; i-- {
		n++
	}
	return n%2 == 1
}

// lower gives ASCII letters in lower case; a name that has no others is
// returned as it is.
func lower(name string) string {
	for i := range len(name) {
		if c := name[i]; 'A' <= c && c <= 'Z' {
			return dns.CanonicalName(name)
		}
	}
	return name
}
