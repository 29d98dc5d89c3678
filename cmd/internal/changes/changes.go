// Package changes tells in events what has changed from one Snapshot to the next.
// It remembers who has left, so that an instance that comes back elsewhere is told
// as a migration. It starts no goroutine and is used by one.
package changes

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// Memory is what is remembered between Snapshots.
type Memory struct {
	left map[departed]departure
	now  func() time.Time
}

type departed struct {
	key lb.Key
	id  string
}

type departure struct {
	place string
	at    time.Time
}

const (
	// departedFor is how long an instance's last place is known.
	departedFor = time.Hour
	// departedMost bounds how many are; beyond it the old ones are forgotten.
	departedMost = 20_000
)

// New returns an empty Memory; now is the clock.
func New(now func() time.Time) *Memory {
	return &Memory{left: map[departed]departure{}, now: now}
}

func (d *Memory) leave(i *discovery.Instance) {
	if len(d.left) >= departedMost {
		clear(d.left)
	}
	d.left[departed{i.Key, i.ID}] = departure{Place(i), d.now()}
}

// back returns where an instance was before it left, once.
func (d *Memory) back(i *discovery.Instance) (was departure, ok bool) {
	id := departed{i.Key, i.ID}
	was, ok = d.left[id]
	delete(d.left, id)
	return was, ok && d.now().Sub(was.at) < departedFor && was.place != Place(i)
}

// Between lists what has changed from one Snapshot to the next, as events
// whose receipts are due when every proxy has the new one.
func (d *Memory) Between(prev, next *lb.Snapshot) []events.Event {
	var out []events.Event
	if prev == nil || !prev.Catalog.Ready {
		return nil // what was there before the start is no change
	}
	keys := slices.SortedFunc(next.Services.Differs(prev.Services), lb.Key.Compare)
	for _, key := range keys {
		s, before := next.Services.Get(key), prev.Services.Get(key)
		switch {
		case s == nil: // told below
		case before == nil:
			out = append(out, events.Change(events.ServiceCreated, s.Key.Tenant, s.Key.Service, "", s.Domain+" is "+s.Address.String(), time.Time{}, 0))
			out = append(out, d.moved(&lb.Service{}, s, next.Version)...)
		default:
			if before.Spec != s.Spec && !slices.Equal(before.Spec.Ports, s.Spec.Ports) {
				out = append(out, events.Change(events.ServiceChanged, s.Key.Tenant, s.Key.Service, "", "its ports are now "+PortsText(s.Spec.Ports), time.Time{}, 0))
			}
			out = append(out, d.moved(before, s, next.Version)...)
		}
	}
	for _, key := range keys {
		if s := prev.Services.Get(key); next.Services.Get(key) == nil {
			out = append(out, events.Change(events.ServiceDeleted, s.Key.Tenant, s.Key.Service, "", s.Domain+" was "+s.Address.String(), time.Time{}, 0))
		}
	}
	return append(out, sources(prev.Catalog, next.Catalog)...)
}

// moved tells what happened to a service's instances. One that is there under
// the same id with another address or node has migrated, also when it was away
// in between.
func (d *Memory) moved(before, after *lb.Service, version uint64) []events.Event {
	m := movement{version: version, seen: d.now()}
	// With the same group a drain has changed something, not the source.
	if after.Group != nil && after.Group != before.Group {
		m.group = after.Group
		if !after.Group.Seen.IsZero() {
			m.seen = after.Group.Seen
		}
	}
	gone := map[string]*lb.Endpoint{}
	for _, e := range before.Endpoints {
		gone[e.Instance.QualifiedName()] = e
	}
	var fresh []*lb.Endpoint
	for _, e := range after.Endpoints {
		name := e.Instance.QualifiedName()
		if was := gone[name]; was != nil {
			delete(gone, name)
			m.changed(was, e)
			continue
		}
		fresh = append(fresh, e)
	}
	for _, e := range fresh {
		was, ok := d.back(e.Instance)
		if other := sameID(gone, e.Instance.ID); other != nil {
			delete(gone, other.Instance.QualifiedName())
			m.add(events.InstanceMigrated, e.Instance, Place(other.Instance)+" -> "+Place(e.Instance))
		} else if ok {
			m.add(events.InstanceMigrated, e.Instance, fmt.Sprintf("%s -> %s, after %s", was.place, Place(e.Instance), d.now().Sub(was.at).Round(time.Millisecond)))
		} else {
			m.add(events.InstanceAdded, e.Instance, Place(e.Instance))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(gone)) {
		d.leave(gone[name].Instance)
		m.add(events.InstanceRemoved, gone[name].Instance, Place(gone[name].Instance))
	}
	return m.events
}

// movement collects the events of one service.
type movement struct {
	group   *discovery.Group // that has changed; nil: it has not
	version uint64
	seen    time.Time
	events  []events.Event
}

func (m *movement) add(kind string, i *discovery.Instance, message string) {
	e := events.Change(kind, i.Key.Tenant, i.Key.Service, i.Name(), message, m.seen, m.version)
	if m.group != nil {
		e = e.From(i.Source, m.group.Index)
	}
	m.events = append(m.events, e)
}

// changed tells what happened to an instance that was there before.
func (m *movement) changed(was, now *lb.Endpoint) {
	i := now.Instance
	switch {
	case Place(was.Instance) != Place(i):
		m.add(events.InstanceMigrated, i, Place(was.Instance)+" -> "+Place(i))
	case was.Drain != now.Drain && now.Drain == lb.Draining && i.Health == discovery.Maintenance:
		m.add(events.InstanceDraining, i, "in maintenance")
	case was.Drain != now.Drain && now.Drain == lb.Draining:
		m.add(events.InstanceDraining, i, "takes no new traffic and finishes what it has")
	case was.Drain != now.Drain && now.Drain == lb.Closing:
		m.add(events.InstanceDraining, i, "its time is over: what it still has is closed")
	case was.Drain != now.Drain && now.Drain == lb.Drained:
		m.add(events.InstanceRemoved, i, "drained")
	case was.Serving && !now.Serving:
		m.add(events.InstanceRemoved, i, "takes no traffic: "+string(i.Health))
	case !was.Serving && now.Serving:
		m.add(events.InstanceAdded, i, "takes traffic again: "+string(i.Health))
	}
}

func sameID(gone map[string]*lb.Endpoint, id string) *lb.Endpoint {
	for _, name := range slices.Sorted(maps.Keys(gone)) {
		if gone[name].Instance.ID == id {
			return gone[name]
		}
	}
	return nil
}

// Place is where an instance is: address, ports and node.
func Place(i *discovery.Instance) string {
	text := i.Address.String()
	for n, p := range i.Ports {
		if n == 0 {
			text = fmt.Sprintf("%s:%d", i.Address, p.Number)
			continue
		}
		text += fmt.Sprintf(",%d", p.Number)
	}
	if i.Node != "" {
		text += " on " + i.Node
	}
	return text
}

func sources(prev, next *discovery.Catalog) []events.Event {
	var out []events.Event
	stale := map[string]bool{}
	for _, s := range prev.Sources {
		stale[s.Name] = s.Stale
	}
	for _, s := range next.Sources {
		switch {
		case s.Stale && !stale[s.Name]:
			out = append(out, events.Fact(events.SourceStale, "", s.Name+": "+s.LastError))
		case !s.Stale && stale[s.Name]:
			out = append(out, events.Fact(events.SourceRecovered, "", s.Name+" answers again"))
		}
	}
	return out
}

// PortsText writes ports as "80/http, 5432/tcp".
func PortsText(ports []lb.PortSpec) string {
	out := ""
	for i, p := range ports {
		if i > 0 {
			out += ", "
		}
		out += fmt.Sprintf("%d/%s", p.Port, p.Protocol)
	}
	return out
}
