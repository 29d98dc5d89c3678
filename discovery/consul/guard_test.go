package consul

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/discovery"
)

// fleet is a world of services that listen; each has one instance, s0, s1, ...
type fleet struct {
	*world
	ports []int
	stops []func()
}

// newFleet registers them before they are watched, so that none is new.
func newFleet(t *testing.T, n int, cc binaries.ConsulConfig, c Config) *fleet {
	t.Helper()
	f := &fleet{world: newWorldAt(t, binaries.StartConsul(t, cc))}
	for i := range n {
		port, stop := listen(t)
		f.ports, f.stops = append(f.ports, port), append(f.stops, stop)
		f.register(i)
	}
	c.Address = "http://" + f.agent.HTTPAddr
	f.watch(c)
	f.counts("registered", n, 0)
	return f
}

func name(i int) string { return fmt.Sprintf("s%d", i) }

func (f *fleet) register(i int) {
	f.t.Helper()
	f.put(name(i), "127.0.0.1", f.ports[i], meta("acme"), func(r *api.AgentServiceRegistration) { r.Name = name(i) })
}

// counts waits for so many instances that are live, and held.
func (f *fleet) counts(what string, live, held int) {
	f.t.Helper()
	f.until(what, func(c *discovery.Catalog) string {
		l, h := count(c)
		if l == live && h == held {
			return ""
		}
		return fmt.Sprintf("%d are live and %d held, want %d and %d", l, h, live, held)
	})
}

func count(c *discovery.Catalog) (live, held int) {
	for _, g := range c.Groups.All() {
		for _, i := range g.Instances {
			switch {
			case i.Held:
				held++
			case i.Health.Serving():
				live++
			}
		}
	}
	return live, held
}

// neverHeld fails when anything is, or was, held.
func (f *fleet) neverHeld() {
	f.t.Helper()
	if n := f.gauge("roost_discovery_mass_loss_total"); n != 0 {
		f.t.Errorf("%v mass losses", n)
	}
}

// TestWipedFleet: an empty Consul at the address of a full one. What answers is
// held, what does not goes, and what comes back is ordinary again.
func TestWipedFleet(t *testing.T) {
	f := newFleet(t, 12, binaries.ConsulConfig{}, Config{})
	for _, stop := range f.stops[8:] {
		stop()
	}
	f.agent.Kill()
	f.agent.Restart()
	f.counts("the dead ones go", 0, 8)
	f.problem("mass_loss_held")
	for i := range 8 {
		f.register(i)
	}
	f.counts("registered again", 8, 0)
	f.noProblem()
}

// TestTokenSeesLess: of what a token no longer sees nothing is lost.
func TestTokenSeesLess(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	writeToken(t, file, binaries.ConsulToken)
	f := newFleet(t, 6, binaries.ConsulConfig{ACL: true}, Config{TokenFile: file})
	less := f.token("less", `service "s0" { policy = "read" } node_prefix "" { policy = "read" }`)
	writeToken(t, file, less)
	f.counts("it sees one", 1, 5)
	f.problem("mass_loss_held")
	writeToken(t, file, binaries.ConsulToken)
	f.counts("it sees all", 6, 0)
	f.noProblem()
}

// TestPolicySeesLess: the token stays and its policy is cut. Such an answer may
// come from a stream, which does not say that it hides anything.
func TestPolicySeesLess(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	writeToken(t, file, binaries.ConsulToken)
	f := newFleet(t, 6, binaries.ConsulConfig{ACL: true}, Config{TokenFile: file})
	writeToken(t, file, f.token("some", `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`))
	f.register(0) // wakes the queries
	f.counts("as before", 6, 0)
	policy, _, err := f.client.ACL().PolicyReadByName("some", nil)
	f.must(err)
	policy.Rules = `service "s0" { policy = "read" } node_prefix "" { policy = "read" }`
	_, _, err = f.client.ACL().PolicyUpdate(policy, nil)
	f.must(err)
	f.counts("it sees one", 1, 5)
	policy.Rules = `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`
	_, _, err = f.client.ACL().PolicyUpdate(policy, nil)
	f.must(err)
	f.counts("it sees all", 6, 0)
}

// TestByHand: deregistered one by one, although all listen, as fast as Consul
// takes it.
func TestByHand(t *testing.T) {
	f := newFleet(t, 20, binaries.ConsulConfig{}, Config{})
	for i := range 16 {
		f.must(f.client.Agent().ServiceDeregister(name(i)))
	}
	f.counts("gone", 4, 0)
	f.neverHeld()
}

// external registers an instance on a node that no agent looks after, so that
// nobody registers it again. With a status the node has the servers' own check.
func (w *world) external(node, id, service string, port int, status string) {
	w.t.Helper()
	r := &api.CatalogRegistration{Node: node, Address: "127.0.0.1", Service: &api.AgentService{ID: id, Service: service, Address: "127.0.0.1", Port: port, Meta: meta("acme")}}
	if status != "" {
		r.Check = &api.AgentCheck{Node: node, CheckID: serfHealth, Name: "as serf says it", Status: status}
	}
	_, err := w.client.Catalog().Register(r, nil)
	w.must(err)
}

// reaped waits until a new leader has looked through the catalog: it takes out
// nodes with its own check that serf does not know, and again after a minute.
func (w *world) reaped() {
	w.t.Helper()
	w.must(poll(w.ctx, func() error {
		checks, _, err := w.client.Health().Node("h1", nil)
		if err == nil && !slices.ContainsFunc(checks, func(c *api.HealthCheck) bool { return c.CheckID == serfHealth }) {
			err = errors.New("the leader has not looked at the members yet")
		}
		return err
	}))
}

// TestMassStop: a node is taken out of the catalog by one write. What still
// answers is held; what has stopped goes.
func TestMassStop(t *testing.T) {
	w := newWorldAt(t, binaries.StartConsul(t, binaries.ConsulConfig{}))
	var stops []func()
	for i := range 20 {
		port, stop := listen(t)
		stops = append(stops, stop)
		w.external("n1", name(i), name(i), port, "")
	}
	w.watch(Config{Address: "http://" + w.agent.HTTPAddr})
	f := &fleet{world: w}
	f.counts("registered", 20, 0)
	for _, stop := range stops[5:] {
		stop()
	}
	_, err := w.client.Catalog().Deregister(&api.CatalogDeregistration{Node: "n1"}, nil)
	w.must(err)
	f.counts("what has stopped is gone", 0, 5)
	for _, stop := range stops[:5] {
		stop()
	}
	f.counts("all have stopped", 0, 0)
	f.noProblem()
}

// TestNodeDown: which checks make it so.
func TestNodeDown(t *testing.T) {
	check := func(id, service, status string) *api.HealthCheck {
		return &api.HealthCheck{CheckID: id, ServiceID: service, Status: status}
	}
	for name, c := range map[string]struct {
		checks api.HealthChecks
		want   bool
	}{
		"passing":              {api.HealthChecks{check("serfHealth", "", "passing")}, false},
		"the node":             {api.HealthChecks{check("serfHealth", "", "critical"), check("c", "a", "passing")}, true},
		"the service":          {api.HealthChecks{check("serfHealth", "", "passing"), check("c", "a", "critical")}, false},
		"a check of its own":   {api.HealthChecks{check("disk", "", "critical")}, false},
		"a service's serfname": {api.HealthChecks{check("serfHealth", "a", "critical")}, false},
		"maintenance":          {api.HealthChecks{check("serfHealth", "", "critical"), check(api.NodeMaint, "", "critical")}, false},
	} {
		list, _ := newSource(t, Config{}).instances([]*api.ServiceEntry{entry("a", meta("acme"), func(e *api.ServiceEntry) { e.Checks = c.checks })})
		if len(list) != 1 || list[0].NodeDown != c.want {
			t.Errorf("%s: %+v", name, list)
		}
	}
}

// TestSplit: two nodes of three become critical at once; what answers there is held.
func TestSplit(t *testing.T) {
	w := newWorldAt(t, binaries.StartConsul(t, binaries.ConsulConfig{}))
	port, _ := listen(t)
	put := func(node, status string) { w.external(node, "a", "shop", port, status) }
	for _, node := range []string{"n1", "n2", "n3"} {
		put(node, "")
	}
	w.external("n1", "b0", "shop", port, "")
	w.external("n1", "b1", "shop", port, "")
	w.watch(Config{Address: "http://" + w.agent.HTTPAddr})
	f := &fleet{world: w}
	f.counts("registered", 5, 0)
	w.reaped()
	put("n2", api.HealthCritical)
	f.counts("one node fails over", 4, 0)
	put("n1", api.HealthCritical)
	f.counts("two nodes", 1, 4)
	put("n1", api.HealthPassing)
	put("n2", api.HealthPassing)
	f.counts("healed", 5, 0)
	f.noProblem()
}
