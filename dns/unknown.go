package dns

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/roostmesh/roost/lb"
)

const (
	// maxUnknown bounds the networks that are remembered; who forges source
	// addresses fills them and nothing else.
	maxUnknown = 100
	// unknownFor is how long a network is remembered after its last question.
	unknownFor = 10 * time.Minute
	// Networks are what one `clients` line would name.
	unknownBits4 = 24
	unknownBits6 = 64
)

// unknownCallers counts the questions about our zone from callers that are
// nobody, by network.
type unknownCallers struct {
	node string // fixed at construction

	mu       sync.Mutex // guards what follows
	networks map[netip.Prefix]*unknownNetwork
}

type unknownNetwork struct {
	questions   uint64
	first, last time.Time
	from        netip.Addr // of the last question
	why         string
}

func newUnknownCallers(node string) *unknownCallers {
	return &unknownCallers{node: node, networks: map[netip.Prefix]*unknownNetwork{}}
}

// note counts one question.
func (u *unknownCallers) note(now time.Time, from netip.Addr, why string) {
	from = from.Unmap().WithZone("")
	bits := unknownBits6
	if from.Is4() {
		bits = unknownBits4
	}
	network, err := from.Prefix(bits)
	if err != nil {
		return // an invalid address is nobody's network
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	n := u.networks[network]
	if n == nil || now.Sub(n.last) > unknownFor {
		if n == nil && len(u.networks) >= maxUnknown {
			if u.expire(now); len(u.networks) >= maxUnknown {
				return
			}
		}
		n = &unknownNetwork{first: now}
		u.networks[network] = n
	}
	n.questions++
	n.last, n.from, n.why = now, from, why
}

// expire is called with mu held.
func (u *unknownCallers) expire(now time.Time) {
	for p, n := range u.networks {
		if now.Sub(n.last) > unknownFor {
			delete(u.networks, p)
		}
	}
}

func (u *unknownCallers) problems(now time.Time) []lb.Problem {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.expire(now)
	var out []lb.Problem
	for p, n := range u.networks {
		out = append(out, lb.Problem{
			Code: "caller_unknown", Severity: lb.SeverityWarning, Object: p.String(), Place: "dns on node " + u.node, Since: n.first,
			Message: fmt.Sprintf("has asked %d times about names of ours, last from %s, and was told that they do not exist: it is nobody on node %s (%s)",
				n.questions, n.from, u.node, n.why),
			Fix: fmt.Sprintf("say whose network it is: `tenants: {TENANT: {clients: [%s]}}`", p),
		})
	}
	return out
}
