package daemon

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// firstRequest is how long the xDS server waits for a proxy to say what it has.
const firstRequest = 15 * time.Second

// proxy is an Envoy. What it really holds and what Roost's xDS server knows of
// it are two things: the link between them loses and delays.
type proxy struct {
	id    string
	who   lb.Identity
	holds map[envoy.Name]*envoy.Resource
	index *reachable // of holds; nil has to be made again

	linked bool      // what the server sends arrives
	lost   bool      // for ever
	stuck  bool      // removals do not arrive
	ends   time.Time // where it is not linked: it is forgotten then, and serves no more; zero is not known yet
	conn   *conn     // at the server; nil after a restart of Roost
}

// conn is a stream as the server knows it, as xds.Server and its state do.
type conn struct {
	connected, started bool
	resumed            bool // it goes on with what it had from another stream
	since              time.Time
	known, earlier     map[envoy.Name]*envoy.Resource
	flight             map[envoy.Name]*flying
}

// flying is on its way: a resource, or the removal of one.
type flying struct {
	resource *envoy.Resource
	applied  bool // by the proxy, whose ACK has not come yet
}

// arrive starts a proxy that holds nothing.
func (w *world) arrive(role lb.Role) {
	w.named++
	p := &proxy{holds: map[envoy.Name]*envoy.Resource{}}
	switch n := fmt.Sprint(w.named); role {
	case lb.Node:
		p.who = lb.Identity{Role: role, Node: "h" + n}
	case lb.Gateway:
		p.who = lb.Identity{Role: role, Group: "edge", Member: n}
	default:
		p.who = lb.Identity{Role: role, Tenant: oracleTenants[w.named%len(oracleTenants)], Service: "s0", Instance: n}
	}
	p.id = fmt.Sprintf("%s~%d", role, w.named)
	w.proxies = append(w.proxies, p)
	p.ends = w.now.Add(w.quarantine)
	p.link(w)
}

// link connects a proxy that is not; the server does not know yet what it has.
func (p *proxy) link(w *world) {
	past := p.conn
	p.conn = &conn{connected: true, resumed: len(p.holds) > 0, since: w.now, known: map[envoy.Name]*envoy.Resource{}, flight: map[envoy.Name]*flying{}}
	if past != nil {
		p.conn.earlier = past.mayHave()
	}
	p.linked, p.ends = true, time.Time{}
}

// mayHave is what the server thinks that the proxy may be left with.
func (c *conn) mayHave() map[envoy.Name]*envoy.Resource {
	if !c.started {
		return c.earlier
	}
	all := maps.Clone(c.known)
	for n, f := range c.flight {
		if all[n] == nil && f.resource != nil {
			all[n] = f.resource
		}
	}
	return all
}

// say is the proxy's first request of its listeners.
func (p *proxy) say() {
	p.conn.started, p.conn.known, p.conn.earlier = true, maps.Clone(p.holds), nil
}

// cut ends the link: what was on its way has arrived or has not.
func (p *proxy) cut(w *world) {
	if !p.linked {
		return
	}
	p.linked = false
	for _, n := range p.inFlight(false) {
		if rapid.Bool().Draw(w.chance, "arrived") {
			p.apply(n)
		}
	}
}

// noticed is when the server, or its death, ends the stream: the forget time
// counts from here.
func (p *proxy) noticed(w *world) {
	if p.conn != nil && p.conn.connected {
		p.conn.connected, p.conn.since = false, w.now
		p.ends = w.now.Add(w.quarantine)
	}
}

func (p *proxy) apply(n envoy.Name) {
	f := p.conn.flight[n]
	f.applied = true
	p.index = nil
	if f.resource == nil {
		delete(p.holds, n)
	} else {
		p.holds[n] = f.resource
	}
}

// settle takes the proxy's answer to what it has applied.
func (p *proxy) settle(n envoy.Name) {
	f := p.conn.flight[n]
	delete(p.conn.flight, n)
	if f.resource == nil {
		delete(p.conn.known, n)
	} else {
		p.conn.known[n] = f.resource
	}
}

func (p *proxy) inFlight(applied bool) []envoy.Name {
	var out []envoy.Name
	if p.conn == nil {
		return nil
	}
	for n, f := range p.conn.flight {
		if f.applied == applied {
			out = append(out, n)
		}
	}
	return sorted(out)
}

func sorted(names []envoy.Name) []envoy.Name {
	slices.SortFunc(names, func(a, b envoy.Name) int {
		if a.Type != b.Type {
			return int(a.Type) - int(b.Type)
		}
		return strings.Compare(a.Name, b.Name)
	})
	return names
}

// owed lists what the server could send now, in no order that protects anybody:
// all that differs from what the proxy will have.
func (p *proxy) owed(w *world) (names []envoy.Name, wants map[envoy.Name]*envoy.Resource) {
	if p.conn == nil || !p.conn.connected || !p.conn.started || w.r == nil || !w.r.served {
		return nil, nil
	}
	wants = map[envoy.Name]*envoy.Resource{}
	for r := range w.r.world.Everything(p.who) {
		wants[r.Name] = r
		if old := p.conn.known[r.Name]; p.conn.flight[r.Name] == nil && (old == nil || old.Version != r.Version) {
			names = append(names, r.Name)
		}
	}
	for n := range p.conn.known {
		if wants[n] == nil && p.conn.flight[n] == nil {
			names = append(names, n)
		}
	}
	return sorted(names), wants
}

// some draws a part of a list; most often nearly all.
func some[T any](t *rapid.T, list []T, label string) []T {
	if len(list) == 0 {
		return nil
	}
	skip := rapid.SampledFrom([]int{0, 0, 2, 3, 5}).Draw(t, label)
	if skip == 0 {
		return list
	}
	from := rapid.IntRange(0, skip-1).Draw(t, label)
	var out []T
	for n, item := range list {
		if n%skip == from {
			out = append(out, item)
		}
	}
	return out
}

// send puts a part of what is owed on its way.
func (p *proxy) send(w *world, all bool) {
	names, wants := p.owed(w)
	if !all {
		names = some(w.chance, names, "sent")
	}
	for _, n := range names {
		if p.stuck && wants[n] == nil {
			continue
		}
		p.conn.flight[n] = &flying{resource: wants[n]}
	}
}

// deliver lets a part of what is on its way arrive and be answered.
func (p *proxy) deliver(w *world, all bool) {
	if !p.linked {
		return
	}
	arriving, answering := p.inFlight(false), p.inFlight(true)
	if !all {
		arriving, answering = some(w.chance, arriving, "arriving"), some(w.chance, answering, "answering")
	}
	for _, n := range arriving {
		p.apply(n)
	}
	for _, n := range answering {
		p.settle(n)
	}
}

// catchUp brings a proxy to the World of now, and the server to know it.
func (p *proxy) catchUp(w *world) {
	if !p.conn.started {
		p.say()
	}
	for range 3 {
		p.send(w, true)
		p.deliver(w, true)
	}
}

// refuse is a NACK of one resource.
func (p *proxy) refuse(w *world) {
	if names := p.inFlight(false); p.linked && len(names) > 0 {
		n := rapid.SampledFrom(names).Draw(w.chance, "refused")
		if p.conn.flight[n].resource != nil {
			delete(p.conn.flight, n)
		}
	}
}

// expire ends proxies whose time is over, and answers that are too old.
func (w *world) expire() {
	before := len(w.proxies)
	w.proxies = slices.DeleteFunc(w.proxies, func(p *proxy) bool { return !p.ends.IsZero() && !p.linked && !w.now.Before(p.ends) })
	w.seen.forgotten += before - len(w.proxies)
	for _, p := range w.proxies {
		if p.linked && !p.conn.started && w.now.Sub(p.conn.since) >= firstRequest {
			p.say()
		}
	}
	maps.DeleteFunc(w.told, func(_ answer, until time.Time) bool { return !w.now.Before(until) })
}

// remembers is how long the server knows a proxy that has gone, where nobody asks
// for more.
const remembers = 3 * time.Second

// Remember implements proxies.
func (w *world) Remember(d time.Duration) { w.remember = max(w.remember, d) }

// Holders implements proxies, as xds.Server does.
func (w *world) Holders(t envoy.Type, wanted func(name string) bool) []xds.Holder {
	var out []xds.Holder
	for _, p := range w.proxies {
		c := p.conn
		if c == nil || !c.connected && w.now.Sub(c.since) > max(remembers, w.remember) {
			continue
		}
		known := c.known
		if !c.started {
			known = c.earlier
			unsaid := c.connected && w.now.Sub(c.since) < firstRequest || !c.connected && c.resumed
			if len(known) == 0 && unsaid {
				out = append(out, xds.Holder{ID: p.id, Connected: c.connected, Since: c.since})
				continue
			}
		}
		for n := range known {
			if n.Type == t && wanted(n.Name) {
				out = append(out, xds.Holder{ID: p.id, Name: n.Name, Connected: c.connected, Since: c.since})
			}
		}
		for n, f := range c.flight {
			if n.Type == t && f.resource != nil && wanted(n.Name) {
				out = append(out, xds.Holder{ID: p.id, Name: n.Name, Connected: c.connected, Since: c.since})
			}
		}
	}
	return out
}
