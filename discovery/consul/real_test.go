package consul

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/discovery"
)

// TestRegistrations is the life of instances in a real Consul.
func TestRegistrations(t *testing.T) {
	w := newWorld(t, binaries.ConsulConfig{}, Config{})
	agent := w.client.Agent()
	w.put("a", "10.0.0.1", 80, meta("acme"))
	w.have("registered", "acme/shop/a 10.0.0.1:80 passing w1")
	w.put("a", "10.0.0.2", 81, meta("acme"), func(r *api.AgentServiceRegistration) { r.Weights = &api.AgentWeights{Passing: 7, Warning: 1} })
	w.have("moved", "acme/shop/a 10.0.0.2:81 passing w7")
	w.put("a", "fd00::1", 81, meta("acme"))
	w.have("IPv6", "acme/shop/a fd00::1:81 passing w1")
	w.put("a", "", 81, meta("acme"))
	w.have("the node's address", "acme/shop/a 127.0.0.1:81 passing w1")
	w.put("b", "10.0.0.3", 80, meta("globex"))
	w.put("c", "10.0.0.4", 80, nil)
	w.have("a name with two tenants and a stranger", "acme/shop/a 127.0.0.1:81 passing w1", "globex/shop/b 10.0.0.3:80 passing w1")

	version := w.all.Catalog().Version
	w.put("b", "10.0.0.3", 80, meta("globex"))                                                          // says nothing new
	w.put("c", "10.0.0.4", 80, nil, func(r *api.AgentServiceRegistration) { r.Tags = []string{"new"} }) // wakes the query
	w.put("c", "10.0.0.4", 80, meta("acme"))
	w.have("meta is added", "acme/shop/a 127.0.0.1:81 passing w1", "globex/shop/b 10.0.0.3:80 passing w1", "acme/shop/c 10.0.0.4:80 passing w1")
	if got := w.all.Catalog().Version; got != version+1 {
		t.Errorf("%d catalogs for one change", got-version)
	}
	w.must(agent.ServiceDeregister("a"))
	w.put("c", "10.0.0.4", 80, nil)
	w.have("meta is taken away", "globex/shop/b 10.0.0.3:80 passing w1")

	w.must(agent.EnableServiceMaintenance("b", "by hand"))
	w.have("service maintenance", "globex/shop/b 10.0.0.3:80 maintenance w1")
	w.must(agent.DisableServiceMaintenance("b"))
	w.have("its end", "globex/shop/b 10.0.0.3:80 passing w1")
	w.must(agent.EnableNodeMaintenance("by hand"))
	w.have("node maintenance", "globex/shop/b 10.0.0.3:80 maintenance w1")
	w.must(agent.DisableNodeMaintenance())
	w.put("b", "10.0.0.3", 80, meta("globex"), func(r *api.AgentServiceRegistration) {
		r.Weights = &api.AgentWeights{Passing: 9, Warning: 2}
		r.Check = &api.AgentServiceCheck{CheckID: "ttl", TTL: "1h", Status: "critical"}
	})
	w.have("critical", "globex/shop/b 10.0.0.3:80 critical w9")
	w.must(agent.UpdateTTL("ttl", "slow", "warning"))
	w.have("warning", "globex/shop/b 10.0.0.3:80 warning w2")

	w.put("d", "shop.local", 80, meta("acme"))
	w.problem("instance_address_invalid")
	w.must(agent.ServiceDeregister("d"))
	w.must(agent.ServiceDeregister("b"))
	w.have("all gone")
	w.noProblem()
	w.must(poll(w.ctx, func() error { // it publishes nothing
		if n := w.gauge("roost_consul_watches"); n != 0 {
			return fmt.Errorf("%v watches are left", n)
		}
		return nil
	}))
}

func TestDefaultTenant(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "consul.sock")
	w := newWorld(t, binaries.ConsulConfig{Extra: fmt.Sprintf("addresses { http = \"127.0.0.1 unix://%s\" }", socket)}, Config{DefaultTenant: "acme", Address: "unix://" + socket})
	w.put("a", "10.0.0.1", 80, nil)
	w.put("b", "10.0.0.2", 80, meta("globex"))
	w.must(w.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: "p", Name: "shop-proxy", Kind: api.ServiceKindConnectProxy, Port: 1, Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "shop"}}))
	w.must(w.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: "n", Name: "nomad-client", Address: "10.0.0.3", Port: 1}))
	w.put("c", "10.0.0.3", 80, nil)
	w.have("everything but Consul, Nomad and proxies", "acme/shop/a 10.0.0.1:80 passing w1", "globex/shop/b 10.0.0.2:80 passing w1", "acme/shop/c 10.0.0.3:80 passing w1")
}

// TestWipe: an empty Consul in the place of a full one takes away only what
// does not answer.
func TestWipe(t *testing.T) {
	w := newWorld(t, binaries.ConsulConfig{}, Config{})
	lives, stop := listen(t)
	dies, stopNow := listen(t)
	stopNow()
	w.put("a", "127.0.0.1", lives, meta("acme"))
	w.put("b", "127.0.0.1", dies, meta("acme"))
	a := fmt.Sprintf("acme/shop/a 127.0.0.1:%d passing w1", lives)
	w.have("before", a, fmt.Sprintf("acme/shop/b 127.0.0.1:%d passing w1", dies))
	w.agent.Kill()
	w.problem("source_stale")
	w.agent.Restart()
	w.problem("mass_loss_held")
	w.have("the dead one goes", a+"?")
	w.put("a", "127.0.0.1", lives, meta("acme"))
	w.have("registered again", a)
	w.noProblem()
	w.must(w.client.Agent().ServiceDeregister("a"))
	w.have("deregistered, although it answers")

	// What is held goes when its port does.
	w.put("a", "127.0.0.1", lives, meta("acme"))
	w.have("once more", a)
	w.agent.Kill()
	w.agent.Restart()
	w.have("held", a+"?")
	stop()
	w.have("its port is dead")
	w.noProblem()
}

// TestRestartKeeps: a Consul that comes back with its state is believed: nothing
// is held, not even for a moment.
func TestRestartKeeps(t *testing.T) {
	w := newWorld(t, binaries.ConsulConfig{DataDir: t.TempDir()}, Config{})
	w.put("a", "10.0.0.1", 80, meta("acme"))
	w.put("b", "10.0.0.2", 80, meta("acme"))
	w.have("before", "acme/shop/a 10.0.0.1:80 passing w1", "acme/shop/b 10.0.0.2:80 passing w1")
	w.agent.Kill()
	w.have("stale", "acme/shop/a 10.0.0.1:80 passing w1?", "acme/shop/b 10.0.0.2:80 passing w1?")
	w.agent.Restart()
	w.have("confirmed", "acme/shop/a 10.0.0.1:80 passing w1", "acme/shop/b 10.0.0.2:80 passing w1")
	w.must(w.client.Agent().ServiceDeregister("b"))
	w.have("a deregistration", "acme/shop/a 10.0.0.1:80 passing w1")
	w.noProblem()
	(&fleet{world: w}).neverHeld()
}

// TestTokens: over TLS, with ACLs. The token file is read again; a token that
// may see less than before, none at all, or no file takes nothing away.
func TestTokens(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) { writeToken(t, file, token) }
	write(binaries.ConsulToken)
	w := newWorld(t, binaries.ConsulConfig{TLS: true, ACL: true}, Config{TokenFile: file})
	port, _ := listen(t)
	w.put("a", "127.0.0.1", port, meta("acme"))
	a := fmt.Sprintf("acme/shop/a 127.0.0.1:%d passing w1", port)
	w.have("as the manager", a)
	enough := w.token("enough", `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`)
	less := w.token("less", `service_prefix "" { policy = "read" }`)

	write(less)
	w.have("a token that sees no nodes", a+"?")
	w.problem("consul_token_limited")
	write(enough)
	w.have("one that sees enough", a)
	w.noProblem()
	write("00000000-0000-4000-8000-0000000000ff")
	w.have("a token that Consul does not know", a+"?")
	w.problem("source_stale")
	write(enough)
	w.have("mended", a)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	w.put("a", "127.0.0.1", port, meta("acme"), func(r *api.AgentServiceRegistration) { r.Tags = []string{"wakes the query"} })
	w.have("no file", a+"?")
	w.until("it says so", func(c *discovery.Catalog) string {
		if text := c.Sources[0].LastError; !strings.Contains(text, "token file") {
			return text
		}
		return ""
	})
	write(enough)
	w.have("the file is back", a)
	w.must(w.client.Agent().ServiceDeregister("a"))
	w.have("deregistered")
	w.noProblem()
}

// TestAnotherConsul: behind one address another Consul takes the place of the
// first, with an index that is higher.
func TestAnotherConsul(t *testing.T) {
	first := newWorldAt(t, binaries.StartConsul(t, binaries.ConsulConfig{}))
	lives, _ := listen(t)
	dies, stop := listen(t)
	stop()
	first.put("a", "127.0.0.1", lives, meta("acme"))
	first.put("b", "127.0.0.1", dies, meta("acme"))
	d := newDoor(t, first.agent.HTTPAddr)
	first.watch(Config{Address: "http://" + d.Addr().String()})
	a := fmt.Sprintf("acme/shop/a 127.0.0.1:%d passing w1", lives)
	first.have("the first", a, fmt.Sprintf("acme/shop/b 127.0.0.1:%d passing w1", dies))

	second := newWorldAt(t, binaries.StartConsul(t, binaries.ConsulConfig{Node: "h2"}))
	for range 50 { // its index overtakes
		second.put("c", "10.0.0.3", 80, meta("globex"), func(r *api.AgentServiceRegistration) { r.Tags = []string{rand.Text()} })
	}
	d.lead(second.agent.HTTPAddr)
	first.have("the second", a+"?", "globex/shop/c 10.0.0.3:80 passing w1")
	first.problem("mass_loss_held")
	second.put("c", "10.0.0.4", 80, meta("globex"))
	first.have("it is followed", a+"?", "globex/shop/c 10.0.0.4:80 passing w1")
	d.lead(first.agent.HTTPAddr)
	first.until("the first is back", func(c *discovery.Catalog) string {
		for _, g := range c.Groups.All() {
			for _, i := range g.Instances {
				if i.ID == "a" && !i.Stale {
					return ""
				}
			}
		}
		return "held"
	})
}

// TestManyOverHTTP2: 300 services share a few connections.
func TestManyOverHTTP2(t *testing.T) {
	w := newWorld(t, binaries.ConsulConfig{TLS: true}, Config{})
	w.many(300)
	w.one(299, 81)
	w.moved(299, 81)
	w.noProblem()
	if n := w.gauge("roost_consul_connections"); n > 10 {
		t.Errorf("%v connections", n)
	}
}

// TestManyOverHTTP1: 300 services within the budget of connections, beside
// another client of the agent. Registrations, checks, maintenance of the node and
// deregistrations of services that share the sweep arrive as the others do.
func TestManyOverHTTP1(t *testing.T) {
	w := newWorld(t, binaries.ConsulConfig{}, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	other := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 40}}
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait(); other.CloseIdleConnections() }()
	for range 40 {
		wg.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.agent.HTTPAddr+"/v1/health/service/none?index=1000000&wait=60s", nil)
			if err == nil {
				var res *http.Response
				if res, err = other.Do(req); err == nil {
					err = res.Body.Close()
				}
			}
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	w.many(300)
	w.problem("consul_watch_budget")
	if n := w.gauge("roost_consul_connections"); n > 150 {
		t.Errorf("%v connections", n)
	}
	const stride = 23 // own queries and shared ones
	for i := range 300 / stride {
		w.one(i*stride, 81)
		w.moved(i*stride, 81)
	}
	agent := w.client.Agent()
	health := func(what string, want discovery.Health, services int) {
		t.Helper()
		w.until(what, func(c *discovery.Catalog) string {
			n := 0
			for _, g := range c.Groups.All() {
				if g.Instances[0].Health == want {
					n++
				}
			}
			if n != services {
				return fmt.Sprintf("%d are %s, want %d", n, want, services)
			}
			return ""
		})
	}
	w.must(agent.EnableNodeMaintenance(""))
	health("node maintenance", discovery.Maintenance, 300)
	w.must(agent.DisableNodeMaintenance())
	health("its end", discovery.Passing, 300)
	const some = 30
	for i := range some {
		w.must(agent.EnableServiceMaintenance(fmt.Sprintf("s%d", i*10), ""))
	}
	health("service maintenance", discovery.Maintenance, some)
	for i := range 300 {
		w.must(agent.ServiceDeregister(fmt.Sprintf("s%d", i)))
	}
	w.have("all gone")
	w.noProblem()
}
