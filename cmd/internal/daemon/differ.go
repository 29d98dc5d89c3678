package daemon

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// differences lists what has changed from one Snapshot to the next, as events
// whose receipts are due when every proxy has the new one.
func differences(prev, next *lb.Snapshot) []events.Event {
	var out []events.Event
	if prev == nil || !prev.Catalog.Ready {
		return nil // what was there before the start is no change
	}
	for _, s := range next.Order {
		before := prev.Services[s.Key]
		switch before {
		case s:
		case nil:
			out = append(out, events.Change(events.ServiceCreated, s.Key.Tenant, s.Key.Service, "", s.Domain+" is "+s.Address.String(), time.Time{}, 0))
			out = append(out, moved(&lb.Service{}, s, next.Version)...)
		default:
			if before.Spec != s.Spec && !slices.Equal(before.Spec.Ports, s.Spec.Ports) {
				out = append(out, events.Change(events.ServiceChanged, s.Key.Tenant, s.Key.Service, "", "its ports are now "+portsText(s.Spec.Ports), time.Time{}, 0))
			}
			out = append(out, moved(before, s, next.Version)...)
		}
	}
	for _, s := range prev.Order {
		if next.Services[s.Key] == nil {
			out = append(out, events.Change(events.ServiceDeleted, s.Key.Tenant, s.Key.Service, "", s.Domain+" was "+s.Address.String(), time.Time{}, 0))
		}
	}
	return append(out, sources(prev.Catalog, next.Catalog)...)
}

// moved tells what happened to a service's instances. One that is there under
// the same id with another address or node has migrated.
func moved(before, after *lb.Service, version uint64) []events.Event {
	var out []events.Event
	gone := map[string]*discovery.Instance{}
	for _, e := range before.Endpoints {
		gone[e.Instance.QualifiedName()] = e.Instance
	}
	var fresh []*discovery.Instance
	add := func(kind string, i *discovery.Instance, message string) {
		seen := time.Now()
		if after.Group != nil && !after.Group.Seen.IsZero() {
			seen = after.Group.Seen
		}
		out = append(out, events.Change(kind, i.Key.Tenant, i.Key.Service, i.Name(), message, seen, version))
	}
	for _, e := range after.Endpoints {
		i := e.Instance
		was := gone[i.QualifiedName()]
		if was == nil {
			fresh = append(fresh, i)
			continue
		}
		delete(gone, i.QualifiedName())
		switch {
		case place(was) != place(i):
			add(events.InstanceMigrated, i, place(was)+" -> "+place(i))
		case was.Health != i.Health && i.Health == discovery.Maintenance:
			add(events.InstanceDraining, i, "in maintenance")
		case was.Health.Serving() && !i.Health.Serving():
			add(events.InstanceRemoved, i, "takes no traffic: "+string(i.Health))
		case !was.Health.Serving() && i.Health.Serving():
			add(events.InstanceAdded, i, "takes traffic again: "+string(i.Health))
		}
	}
	for _, i := range fresh {
		if was := sameID(gone, i.ID); was != nil {
			delete(gone, was.QualifiedName())
			add(events.InstanceMigrated, i, place(was)+" -> "+place(i))
			continue
		}
		add(events.InstanceAdded, i, place(i))
	}
	for _, name := range slices.Sorted(maps.Keys(gone)) {
		add(events.InstanceRemoved, gone[name], place(gone[name]))
	}
	return out
}

func sameID(gone map[string]*discovery.Instance, id string) *discovery.Instance {
	for _, i := range gone {
		if i.ID == id {
			return i
		}
	}
	return nil
}

func place(i *discovery.Instance) string {
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
