package changes

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// TestMoved: what happens to instances, and from when on it is counted.
func TestMoved(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	now := start
	d := New(func() time.Time { return now })
	key := lb.Key{Tenant: "acme", Service: "shop"}
	instance := func(id, address string) *discovery.Instance {
		return &discovery.Instance{ID: id, Node: "h1", Key: key, Address: netip.MustParseAddr(address), Ports: []discovery.Port{{Number: 80}}, Health: discovery.Passing, Source: "consul"}
	}
	before := &lb.Service{Key: key}
	step := func(index uint64, endpoints ...*lb.Endpoint) (got []string) {
		after := &lb.Service{Key: key, Group: before.Group, Endpoints: endpoints}
		if index > 0 {
			after.Group = &discovery.Group{Key: key, Index: index, Seen: now.Add(-time.Millisecond)}
		}
		for _, e := range d.moved(before, after, 1) {
			text := e.Kind + " " + *e.Instance + " " + e.Message
			if e.Source != nil {
				text += " " + *e.Source
			}
			if late := now.Sub(e.Steps.Seen); (late == 0) != (index == 0) {
				t.Errorf("%s: seen %s ago", text, late)
			}
			got = append(got, text)
		}
		before = after
		return got
	}
	want := func(what string, got []string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	serving := func(id, address string) *lb.Endpoint {
		return &lb.Endpoint{Instance: instance(id, address), Serving: true}
	}
	a, b := serving("a", "10.0.0.1"), serving("b", "10.0.0.2")
	want("two come", step(1, a, b), events.InstanceAdded+" acme/shop/a 10.0.0.1:80 on h1 consul", events.InstanceAdded+" acme/shop/b 10.0.0.2:80 on h1 consul")
	now = now.Add(time.Hour)
	draining := &lb.Endpoint{Instance: a.Instance, Drain: lb.Draining}
	want("one drains", step(0, draining, b), events.InstanceDraining+" acme/shop/a takes no new traffic and finishes what it has")
	want("it is closed", step(0, &lb.Endpoint{Instance: a.Instance, Drain: lb.Closing}, b), events.InstanceDraining+" acme/shop/a its time is over: what it still has is closed")
	want("it is drained", step(0, &lb.Endpoint{Instance: a.Instance, Drain: lb.Drained}, b), events.InstanceRemoved+" acme/shop/a drained")
	want("it is back", step(0, a, b), events.InstanceAdded+" acme/shop/a takes traffic again: passing")
	want("one moves", step(2, serving("a", "10.0.0.9"), b), events.InstanceMigrated+" acme/shop/a 10.0.0.1:80 on h1 -> 10.0.0.9:80 on h1 consul")
	want("the other leaves", step(3, serving("a", "10.0.0.9")), events.InstanceRemoved+" acme/shop/b 10.0.0.2:80 on h1 consul")
	now = now.Add(5 * time.Second)
	want("it comes back elsewhere", step(4, serving("a", "10.0.0.9"), serving("b", "10.0.0.7")), events.InstanceMigrated+" acme/shop/b 10.0.0.2:80 on h1 -> 10.0.0.7:80 on h1, after 5s consul")
	step(5, serving("a", "10.0.0.9"))
	want("it comes back where it was", step(6, serving("a", "10.0.0.9"), serving("b", "10.0.0.7")), events.InstanceAdded+" acme/shop/b 10.0.0.7:80 on h1 consul")
	step(7, serving("a", "10.0.0.9"))
	now = now.Add(2 * departedFor)
	want("it comes back after long", step(8, serving("a", "10.0.0.9"), serving("b", "10.0.0.8")), events.InstanceAdded+" acme/shop/b 10.0.0.8:80 on h1 consul")
}
