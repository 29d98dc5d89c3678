package discovery

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// registry plays a guarded source: its state, told scope by scope, with an index
// that each write moves.
type registry struct {
	t     *testing.T
	m     *merge
	clock time.Time
	index uint64
	list  map[string]Instance // by tenant/service/id
	told  map[string]uint64   // the index of each scope's last write
}

func newRegistry(t *testing.T, c Config) *registry {
	c.Log, c.Guard = quiet(), []string{"consul"}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	r := &registry{t: t, m: newMerge(c), clock: time.Unix(1_000_000, 0), index: 100, list: map[string]Instance{}, told: map[string]uint64{}}
	r.m.now = func() time.Time { return r.clock }
	r.m.source("consul").complete = true // what comes from now on is news
	r.m.load()
	return r
}

// add registers n instances of a service, on nodes h0, h1, h2 in turn, and lets
// the window pass.
func (r *registry) add(key string, n int) *registry {
	tenant, service, _ := strings.Cut(key, "/")
	for i := range n {
		r.put(Instance{ID: fmt.Sprint(i), Node: fmt.Sprintf("h%d", i%3), Key: Key{tenant, service}, Address: netip.MustParseAddr("10.0.0.1"), Ports: []Port{{Number: 80}}, Health: Passing})
	}
	r.clock = r.clock.Add(lossWindow + time.Second)
	return r
}

func (r *registry) put(i Instance) {
	r.index++
	r.list[i.Name()] = i
	r.told[i.Key.Service] = r.index
	r.say(i.Key.Service)
}

// quietly changes the list by one write and tells nothing yet.
func (r *registry) quietly(change func(name string, i *Instance) bool) {
	r.index++
	for name, i := range r.list {
		keep := change(name, &i)
		r.told[i.Key.Service] = r.index
		if r.list[name] = i; !keep {
			delete(r.list, name)
		}
	}
}

// say tells a scope as it is now.
func (r *registry) say(scope string, change ...func(*Update)) bool {
	u := Update{Source: "consul", Scope: scope, Index: r.told[scope], Seen: r.clock}
	for _, name := range slices.Sorted(maps.Keys(r.list)) {
		if i := r.list[name]; i.Key.Service == scope {
			u.Instances = append(u.Instances, i)
		}
	}
	for _, f := range change {
		f(&u)
	}
	return r.m.apply(u)
}

// drop deregisters by one write each and tells each at once.
func (r *registry) drop(names ...string) {
	for _, name := range names {
		i, ok := r.list[name]
		if !ok {
			r.t.Fatalf("no %s", name)
		}
		r.index++
		delete(r.list, name)
		r.told[i.Key.Service] = r.index
		r.say(i.Key.Service)
	}
}

// dropAtOnce deregisters by a single write, as of a node or by a mishap, and
// tells the scopes one after the other.
func (r *registry) dropAtOnce(names ...string) {
	scopes := map[string]bool{}
	r.index++
	for _, name := range names {
		scope := r.list[name].Key.Service
		delete(r.list, name)
		scopes[scope], r.told[scope] = true, r.index
	}
	for _, scope := range slices.Sorted(maps.Keys(scopes)) {
		r.say(scope)
	}
}

// nodeDown makes everything on a node critical.
func (r *registry) node(node string, down bool) {
	scopes := map[string]bool{}
	r.index++
	for name, i := range r.list {
		if i.Node == node {
			i.NodeDown, i.Health = down, Passing
			if down {
				i.Health = Critical
			}
			r.list[name] = i
			scopes[i.Key.Service], r.told[i.Key.Service] = true, r.index
		}
	}
	for _, scope := range slices.Sorted(maps.Keys(scopes)) {
		r.say(scope)
	}
}

// counts are the catalog's instances: live, held, critical.
func (r *registry) counts() string {
	var live, held, critical int
	for _, g := range r.m.catalog().Groups.All() {
		for _, i := range g.Instances {
			switch {
			case i.Held != (i.Held && i.Stale):
				r.t.Errorf("%s is held and not stale", i.Name())
			case i.Held:
				held++
			case i.Health == Critical:
				critical++
			default:
				live++
			}
		}
	}
	return fmt.Sprintf("%d live %d held %d critical", live, held, critical)
}

func (r *registry) want(what, counts string) {
	r.t.Helper()
	if got := r.counts(); got != counts {
		r.t.Errorf("%s: %s, want %s", what, got, counts)
	}
}

// probe answers a probe of each held instance.
func (r *registry) probe(err error) {
	for id, h := range r.m.sources["consul"].held {
		h.running = true
		r.m.probed(probeResult{"consul", id, err})
	}
}

func names(key string, from, to int) []string {
	var out []string
	for i := from; i < to; i++ {
		out = append(out, fmt.Sprintf("%s/%d", key, i))
	}
	return out
}

// TestGuard: what is held, and what goes at once, on each side of each limit.
func TestGuard(t *testing.T) {
	for _, c := range []struct {
		name, want string
		act        func(r *registry)
	}{
		{"one deregistration", "9 live 0 held 0 critical", func(r *registry) { r.add("acme/shop", 10).drop("acme/shop/1") }},
		{"all of a tenant, one by one", "20 live 0 held 0 critical", func(r *registry) { r.add("acme/shop", 10).add("globex/web", 20).drop(names("acme/shop", 0, 10)...) }},
		{"one by one, told together", "0 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 10)
			for range 10 {
				r.quietly(func(string, *Instance) bool { return true })
			}
			r.list = map[string]Instance{}
			r.say("shop")
		}},
		{"15 % of a tenant by one write", "117 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 20).add("globex/web", 100).dropAtOnce(names("acme/shop", 0, 3)...)
		}},
		{"more than 15 %", "116 live 3 held 0 critical", func(r *registry) {
			r.add("acme/shop", 19).add("globex/web", 100).dropAtOnce(names("acme/shop", 0, 3)...)
		}},
		{"more than 15 %, and only 2", "102 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 4).add("globex/web", 100).dropAtOnce(names("acme/shop", 0, 2)...)
		}},
		{"5 % of all", "95 live 0 held 0 critical", func(r *registry) {
			for n := range 5 {
				r.add(fmt.Sprintf("t%d/s%d", n, n), 20)
			}
			r.dropAtOnce("t0/s0/0", "t1/s1/0", "t2/s2/0", "t3/s3/0", "t4/s4/0")
		}},
		{"more than 5 % of all", "94 live 6 held 0 critical", func(r *registry) {
			for n := range 5 {
				r.add(fmt.Sprintf("t%d/s%d", n, n), 20)
			}
			r.dropAtOnce("t0/s0/0", "t0/s0/1", "t1/s1/0", "t2/s2/0", "t3/s3/0", "t4/s4/0")
		}},
		{"more than 5 % of all, and only 2", "8 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 5).add("globex/web", 5).dropAtOnce("acme/shop/0", "globex/web/0")
		}},
		{"many scopes of one instance each: the first come back", "0 live 10 held 0 critical", func(r *registry) {
			for n := range 10 {
				r.add(fmt.Sprintf("acme/s%d", n), 1)
			}
			var all []string
			for n := range 10 {
				all = append(all, fmt.Sprintf("acme/s%d/0", n))
			}
			r.dropAtOnce(all...)
		}},
		{"hidden, without a write", "0 live 2 held 0 critical", func(r *registry) {
			r.add("acme/shop", 2)
			r.say("shop", func(u *Update) { u.Instances = nil })
		}},
		{"two windows", "16 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 20)
			r.dropAtOnce(names("acme/shop", 0, 2)...)
			r.clock = r.clock.Add(lossWindow + time.Second)
			r.dropAtOnce(names("acme/shop", 2, 4)...)
		}},
		{"a rolling deploy, new first", "10 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 10)
			for n := range 5 {
				r.put(Instance{ID: fmt.Sprint("new", n), Node: "h9", Key: shop, Health: Passing})
			}
			r.dropAtOnce(names("acme/shop", 0, 5)...)
		}},
		{"more lost than gained", "7 live 3 held 0 critical", func(r *registry) {
			r.add("acme/shop", 10)
			for n := range 2 {
				r.put(Instance{ID: fmt.Sprint("new", n), Node: "h9", Key: shop, Health: Passing})
			}
			r.dropAtOnce(names("acme/shop", 0, 5)...)
		}},
		{"a migration of many by one write", "10 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 10)
			r.quietly(func(string, *Instance) bool { return true })
			for n := range r.list {
				i := r.list[n]
				i.Node = "other"
				r.list[n] = i
			}
			r.told["shop"] = r.index
			r.say("shop")
		}},
		{"one dead node", "6 live 0 held 3 critical", func(r *registry) { r.add("acme/shop", 9).node("h0", true) }},
		{"two dead nodes: the first comes back", "3 live 6 held 0 critical", func(r *registry) {
			r.add("acme/shop", 9).node("h0", true)
			r.clock = r.clock.Add(3 * time.Second)
			r.node("h1", true)
		}},
		{"two dead nodes, in two windows", "3 live 0 held 6 critical", func(r *registry) {
			r.add("acme/shop", 9).node("h0", true)
			r.clock = r.clock.Add(lossWindow + time.Second)
			r.node("h1", true)
		}},
		{"critical checks are ordinary", "1 live 0 held 8 critical", func(r *registry) {
			r.add("acme/shop", 9)
			r.quietly(func(name string, i *Instance) bool {
				if name != "acme/shop/0" {
					i.Health = Critical
				}
				return true
			})
			r.say("shop")
		}},
		{"what was critical is no loss", "2 live 0 held 0 critical", func(r *registry) {
			r.add("acme/shop", 9)
			r.quietly(func(name string, i *Instance) bool {
				if name > "acme/shop/1" {
					i.Health = Critical
				}
				return true
			})
			r.say("shop")
			r.dropAtOnce(names("acme/shop", 2, 9)...)
		}},
		{"an ordinary removal beside what is held", "6 live 3 held 0 critical", func(r *registry) {
			r.add("acme/shop", 10).dropAtOnce(names("acme/shop", 0, 3)...)
			r.clock = r.clock.Add(time.Second)
			r.drop("acme/shop/9")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRegistry(t, Config{})
			c.act(r)
			r.want("then", c.want)
		})
	}
}

// TestFilesAreNotGuarded: an edited file is an act.
func TestFilesAreNotGuarded(t *testing.T) {
	r := newRegistry(t, Config{})
	var list []Instance
	for n := range 10 {
		list = append(list, at(fmt.Sprint(n), "10.0.0.1:80"))
	}
	r.m.apply(Update{Source: "file", Scope: "a.yaml", Instances: list})
	r.want("before", "10 live 0 held 0 critical")
	r.m.apply(Update{Source: "file", Scope: "a.yaml"})
	r.want("after", "0 live 0 held 0 critical")
}

// TestHeldEnd: each way in which the holding ends.
func TestHeldEnd(t *testing.T) {
	lose := func(t *testing.T) *registry {
		r := newRegistry(t, Config{})
		r.add("acme/shop", 10).dropAtOnce(names("acme/shop", 0, 5)...)
		r.want("lost", "5 live 5 held 0 critical")
		return r
	}
	t.Run("refused twice", func(t *testing.T) {
		r := lose(t)
		r.probe(syscall.ECONNREFUSED)
		r.want("once", "5 live 5 held 0 critical")
		r.probe(syscall.ECONNREFUSED)
		r.want("twice", "5 live 0 held 0 critical")
		if s := r.m.catalog().Sources[0]; s.Held != 0 || s.HeldWhy != "" || !s.HeldSince.IsZero() {
			t.Errorf("%+v", s)
		}
	})
	t.Run("silent three times", func(t *testing.T) {
		r := lose(t)
		for range 2 {
			r.probe(errors.New("i/o timeout"))
		}
		r.probe(nil)
		for range 2 {
			r.probe(errors.New("i/o timeout"))
		}
		r.want("it has answered between", "5 live 5 held 0 critical")
		r.probe(errors.New("i/o timeout"))
		r.want("three times", "5 live 0 held 0 critical")
	})
	t.Run("of a split: dead", func(t *testing.T) {
		r := newRegistry(t, Config{})
		r.add("acme/shop", 9).node("h0", true)
		r.node("h1", true)
		r.want("split", "3 live 6 held 0 critical")
		r.say("shop")
		r.want("said again", "3 live 6 held 0 critical")
		r.probe(syscall.ECONNREFUSED)
		r.probe(syscall.ECONNREFUSED)
		r.want("dead", "3 live 0 held 6 critical")
		r.say("shop")
		r.want("and stays so", "3 live 0 held 6 critical")
	})
	t.Run("of a split: it heals", func(t *testing.T) {
		r := newRegistry(t, Config{})
		r.add("acme/shop", 9).node("h0", true)
		r.node("h1", true)
		r.node("h0", false)
		r.want("one node is back", "6 live 3 held 0 critical")
		r.node("h1", false)
		r.want("both are", "9 live 0 held 0 critical")
	})
	t.Run("released", func(t *testing.T) {
		for _, name := range []string{"consul", ""} {
			r := lose(t)
			r.m.releaseHeld("file")
			r.want("another source's", "5 live 5 held 0 critical")
			r.m.releaseHeld(name)
			r.want("released", "5 live 0 held 0 critical")
			r.dropAtOnce(names("acme/shop", 5, 9)...)
			r.want("the guard is disarmed", "1 live 0 held 0 critical")
			r.clock = r.clock.Add(lossWindow + time.Second)
			r.add("acme/shop", 10)
			r.clock = r.clock.Add(lossWindow + time.Second)
			r.dropAtOnce(names("acme/shop", 5, 9)...)
			r.want("and armed again", "6 live 4 held 0 critical")
		}
	})
	t.Run("recovered", func(t *testing.T) {
		r := lose(t)
		r.clock = r.clock.Add(time.Hour)
		r.m.tick()
		r.want("none has come back", "5 live 5 held 0 critical")
		for n := range 4 {
			r.put(Instance{ID: fmt.Sprint(n), Node: fmt.Sprintf("h%d", n%3), Key: shop, Health: Passing})
		}
		r.want("four are back", "9 live 1 held 0 critical")
		r.clock = r.clock.Add(recoveredAfter - time.Second)
		r.m.tick()
		r.want("not long enough", "9 live 1 held 0 critical")
		r.clock = r.clock.Add(time.Second)
		r.m.tick()
		r.want("recovered", "9 live 0 held 0 critical")
	})
	t.Run("not recovered while much is missing", func(t *testing.T) {
		r := lose(t)
		r.put(Instance{ID: "0", Node: "h0", Key: shop, Health: Passing})
		r.clock = r.clock.Add(time.Hour)
		r.m.tick()
		r.want("four of ten", "6 live 4 held 0 critical")
	})
}

// TestHeldIsTold: in the status, as a Problem with the way out, and in metrics.
func TestHeldIsTold(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRegistry(t, Config{Registerer: reg})
	r.add("acme/shop", 10).add("globex/web", 4)
	r.dropAtOnce(append(names("acme/shop", 0, 5), names("globex/web", 0, 3)...)...)
	c := r.m.catalog()
	if s := c.Sources[0]; s.Held != 8 || !s.HeldSince.Equal(r.clock) || !strings.Contains(s.HeldWhy, "vanished within 10s") {
		t.Errorf("%+v", s)
	}
	if len(c.Problems) != 1 {
		t.Fatalf("%+v", c.Problems)
	}
	p := c.Problems[0]
	if p.Code != "mass_loss_held" || p.Object != "consul" || !strings.Contains(p.Message, "8 instances") || !strings.Contains(p.Message, "acme 5, globex 3") || !strings.HasSuffix(p.Fix, "roost discovery release consul") || !p.Since.Equal(r.clock) {
		t.Errorf("%+v", p)
	}
	r.probe(nil)
	r.probe(errors.New("i/o timeout"))
	r.probe(syscall.ECONNREFUSED)
	want := "held_instances 8 mass_loss_total 1 probes_total/alive 8 probes_total/failed 8 probes_total/refused 8"
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		for _, s := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "roost_discovery_")
			for _, l := range s.GetLabel() {
				if l.GetName() == "result" {
					name += "/" + l.GetValue()
				} else if l.GetValue() != "consul" {
					t.Errorf("label %v", l)
				}
			}
			got = append(got, fmt.Sprintf("%s %v", name, s.GetGauge().GetValue()+s.GetCounter().GetValue()))
		}
	}
	if text := strings.Join(got, " "); text != want {
		t.Errorf("metrics %s, want %s", text, want)
	}
}

// TestHeldOutlivesARestart: what is held is held afterwards, too, although the
// source, which answers well, does not list it.
func TestHeldOutlivesARestart(t *testing.T) {
	c := Config{Dir: t.TempDir(), Remember: []string{"consul"}}
	r := newRegistry(t, c)
	r.add("acme/shop", 10)
	r.m.apply(Update{Source: "consul", Complete: true, Scopes: []string{"shop"}, Index: r.index})
	r.dropAtOnce(names("acme/shop", 0, 5)...)
	if failed := r.m.config.keep(r.m.due()); failed != nil {
		t.Fatal(failed)
	}
	again := newRegistry(t, c)
	again.list, again.told, again.index = r.list, r.told, r.index
	if s := again.m.catalog().Sources[0]; s.Held != 5 || s.HeldSince.IsZero() || s.HeldWhy == "" {
		t.Errorf("%+v", s)
	}
	again.say("shop")
	again.m.apply(Update{Source: "consul", Complete: true, Scopes: []string{"shop"}, Index: r.index})
	again.want("after the restart", "5 live 5 held 0 critical")
	again.probe(syscall.ECONNREFUSED)
	again.probe(syscall.ECONNREFUSED)
	again.want("dead", "5 live 0 held 0 critical")
}

// TestProbeAt: where an instance is probed, if anywhere.
func TestProbeAt(t *testing.T) {
	a := netip.MustParseAddr("10.0.0.1")
	for name, c := range map[string]struct {
		i    Instance
		want uint16
	}{
		"no port":        {Instance{}, 0},
		"the only port":  {Instance{Ports: []Port{{"", 80}}}, 80},
		"UDP only":       {Instance{Ports: []Port{{"udp", 53}}, Wants: []WantedPort{{Name: "udp", Protocol: "udp"}}}, 0},
		"TCP beside UDP": {Instance{Ports: []Port{{"udp", 53}, {"tcp", 54}}, Wants: []WantedPort{{Name: "udp", Protocol: "udp"}, {Name: "tcp", Protocol: "tcp"}}}, 54},
	} {
		c.i.Address = a
		got, ok := probeAt(&c.i)
		if got.Port() != c.want || ok != (c.want != 0) {
			t.Errorf("%s: %v %v", name, got, ok)
		}
	}
}
