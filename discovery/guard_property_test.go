package discovery

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestGuardProperties: whatever happens to a source, in any order,
//   - what it lists, and has always listed since, is there and not held;
//   - a single deregistration goes out at once;
//   - what its source lists again, or probes find dead, is held no longer;
//   - the counters agree with the catalog.
func TestGuardProperties(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := newRegistry(t, Config{})
		keys := []string{"acme/shop", "acme/cart", "globex/web", "globex/api"}
		number := 0
		some := func(label string) []string {
			all := slices.Sorted(maps.Keys(r.list))
			if len(all) == 0 {
				return nil
			}
			n := rapid.IntRange(1, len(all)).Draw(rt, label)
			return rapid.Permutation(all).Draw(rt, label)[:n]
		}
		check := func() {
			there := map[string]*Instance{}
			held := 0
			for _, g := range r.m.catalog().Groups.All() {
				for _, i := range g.Instances {
					there[i.Name()] = i
					if i.Held {
						held++
					}
				}
			}
			for name, i := range r.list {
				if got := there[name]; got == nil || got.Held && !i.NodeDown {
					rt.Fatalf("%s is listed and is %+v", name, got)
				}
			}
			for name, i := range there {
				if _, listed := r.list[name]; !listed && !i.Held {
					rt.Fatalf("%s is not listed, and is there without being held", name)
				}
			}
			s := r.m.sources["consul"]
			if held != s.status.Held || held != len(s.held) {
				rt.Fatalf("%d are held; the status says %d, the state %d", held, s.status.Held, len(s.held))
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) { check() },
			"register": func(rt *rapid.T) {
				key := rapid.SampledFrom(keys).Draw(rt, "key")
				tenant, service, _ := strings.Cut(key, "/")
				for range rapid.IntRange(1, 8).Draw(rt, "n") {
					number++
					r.put(Instance{ID: fmt.Sprint(number), Node: fmt.Sprintf("h%d", number%3), Key: Key{tenant, service}, Address: netip.MustParseAddr("10.0.0.1"), Ports: []Port{{Number: 80}}, Health: Passing})
				}
			},
			"deregister": func(rt *rapid.T) {
				for _, name := range some("one by one") {
					wasHeld := r.m.sources["consul"].held[idOfName(r, name)] != nil
					r.drop(name)
					if !wasHeld && there(r, name) {
						rt.Fatalf("%s was deregistered and is still there", name)
					}
				}
			},
			"at once": func(rt *rapid.T) { r.dropAtOnce(some("at once")...) },
			"node": func(rt *rapid.T) {
				r.node(rapid.SampledFrom([]string{"h0", "h1", "h2"}).Draw(rt, "node"), rapid.Bool().Draw(rt, "down"))
			},
			"time": func(rt *rapid.T) {
				r.clock = r.clock.Add(time.Duration(rapid.IntRange(1, 15).Draw(rt, "seconds")) * time.Second)
				r.m.tick()
			},
			"dead": func(rt *rapid.T) {
				r.probe(syscall.ECONNREFUSED)
				r.probe(syscall.ECONNREFUSED)
				if n := len(r.m.sources["consul"].held); n != 0 {
					rt.Fatalf("%d dead ones are held", n)
				}
			},
			"release": func(*rapid.T) { r.m.releaseHeld("") },
			"wiped": func(rt *rapid.T) {
				r.index = 1
				r.list = map[string]Instance{}
				for scope := range r.told {
					r.told[scope] = 1
					r.say(scope)
				}
			},
		})
	})
}

func idOfName(r *registry, name string) instanceID { i := r.list[name]; return idOf(&i) }

func there(r *registry, name string) bool {
	for _, g := range r.m.catalog().Groups.All() {
		if slices.ContainsFunc(g.Instances, func(i *Instance) bool { return i.Name() == name }) {
			return true
		}
	}
	return false
}
