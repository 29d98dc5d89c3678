package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/cmd/binaries"
)

// given are the ports that freePort has given; none is given twice.
var given sync.Map

// freePort is a loopback port that nobody has now, out of the range from which
// the kernel takes ports for connections, and of that of the tests' Consuls.
func freePort(t *testing.T) int {
	t.Helper()
	const lowest, highest, tries = 10000, 17999, 1000
	for range tries {
		port := lowest + rand.IntN(highest-lowest+1)
		if _, twice := given.LoadOrStore(port, true); twice {
			continue
		}
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatalf("no free port from %d to %d", lowest, highest)
	return 0
}

// catalog is a real Consul of the test.
type catalog struct {
	t      *testing.T
	addr   string
	agent  *binaries.ConsulAgent
	client *api.Client
}

// newCatalog starts a Consul in dev mode: its state ends with it.
func newCatalog(t *testing.T) *catalog {
	t.Helper()
	agent := binaries.StartConsul(t, binaries.ConsulConfig{})
	client, err := api.NewClient(&api.Config{Address: agent.HTTPAddr})
	if err != nil {
		t.Fatal(err)
	}
	return &catalog{t: t, addr: agent.HTTPAddr, agent: agent, client: client}
}

func (c *catalog) start() {
	c.t.Helper()
	c.agent.Restart()
}

func (c *catalog) kill() {
	c.t.Helper()
	c.agent.Kill()
}

// register registers an instance of cart.
func (c *catalog) register(id, address string) {
	c.t.Helper()
	ip, port, _ := strings.Cut(address, ":")
	n, err := strconv.Atoi(port)
	if err != nil {
		c.t.Fatal(err)
	}
	err = c.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: id, Name: "cart", Address: ip, Port: n, Meta: map[string]string{"roost-tenant": "acme", "roost-port": "18081", "roost-protocol": "http"}})
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *catalog) deregister(id string) {
	c.t.Helper()
	if err := c.client.Agent().ServiceDeregister(id); err != nil {
		c.t.Fatal(err)
	}
}

// onLoopback is a config with ports and a pool of its own.
func onLoopback(t *testing.T, pool, rest string) string {
	t.Helper()
	return fmt.Sprintf("node: h1\nadmin: {address: 127.0.0.1:%d}\nxds: {address: 127.0.0.1:%d}\ndns: {addresses: [127.0.0.1:%d], forward: []}\naddresses: {internal: %s}\n%s", freePort(t), freePort(t), freePort(t), pool, rest)
}

// load sends GETs to one address until it is stopped.
type load struct {
	sent, failed atomic.Int64
	first        atomic.Value
	last         atomic.Value
	stop         func()
}

func newLoad(t *testing.T, url string, ok func(status int, reason string) bool) *load {
	t.Helper()
	l := &load{}
	done := make(chan struct{})
	var wg sync.WaitGroup
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	for range 4 {
		wg.Go(func() {
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				l.sent.Add(1)
				res, err := client.Get(url)
				if err != nil {
					l.fail(err.Error())
					continue
				}
				body := make([]byte, 256)
				n, _ := res.Body.Read(body)
				_ = res.Body.Close()
				if !ok(res.StatusCode, res.Header.Get("x-roost-reason")) {
					l.fail(fmt.Sprintf("%s %s", res.Status, body[:n]))
					continue
				}
				l.last.Store(string(body[:n]))
			}
		})
	}
	l.stop = sync.OnceFunc(func() {
		close(done)
		wg.Wait()
		client.CloseIdleConnections()
	})
	t.Cleanup(l.stop)
	return l
}

func (l *load) fail(what string) {
	l.failed.Add(1)
	l.first.CompareAndSwap(nil, what)
}

// none fails the test when a request has failed.
func (l *load) none(t *testing.T, during string) {
	t.Helper()
	if n := l.failed.Load(); n > 0 {
		t.Errorf("%s: %d of %d requests failed, the first with %v", during, n, l.sent.Load(), l.first.Load())
	}
}

// answers waits until the last answer is want.
func (l *load) answers(t *testing.T, want string) {
	t.Helper()
	until(t, "answer "+want, func() error {
		if got := l.last.Load(); got != want {
			return fmt.Errorf("it is %v", got)
		}
		return nil
	})
}

func up(status int, _ string) bool { return status == http.StatusOK }

// TestConsulMigration is the main job: instances registered, moved, killed and
// gone in a real Consul, resolved and called through a real Envoy; Consul, Roost
// and Envoy restarted under load.
func TestConsulMigration(t *testing.T) {
	c := newCatalog(t)
	// The file names no node: it is the Consul agent's, also while Consul is gone.
	config := strings.Replace(onLoopback(t, "127.150.0.0/16", "discovery: {consul: {address: \"http://"+c.addr+"\"}}\n"), "node: h1\n", "", 1)
	r := newRoost(host{t, ""}, config).serve()
	node := func() (v struct{ Node string }) {
		t.Helper()
		res, err := http.Get("http://" + r.args + "/version")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		if err := json.NewDecoder(res.Body).Decode(&v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	if n := node().Node; n != "h1" {
		t.Errorf("the node is %q", n)
	}
	h := r.host
	h.app("http", "one", "127.0.0.21:9001")
	second := h.app("http", "two", "127.0.0.22:9001")
	c.register("c1", "127.0.0.21:9001")
	until(t, "the service exists", func() error {
		if code, _, errOut := r.cli("service", "show", "acme/cart"); code != 0 {
			return errors.New(errOut)
		}
		return nil
	})
	address := r.address("acme/cart")
	url := "http://" + address + ":18081/"
	envoy := r.envoy("--node", "h1")
	until(t, "first answer", func() error {
		if got := h.call("http", url); got != "200  one" {
			return errors.New(got)
		}
		return nil
	})
	l := newLoad(t, url, up)
	for i := range 4 { // planned moves: register the new one, deregister the old one
		next, want := fmt.Sprintf("c%d", i+2), []string{"two", "one"}[i%2]
		c.register(next, []string{"127.0.0.22:9001", "127.0.0.21:9001"}[i%2])
		c.deregister(fmt.Sprintf("c%d", i+1))
		l.answers(t, want)
	}
	l.none(t, "planned moves")

	// Both serve; one is killed outright: retries on the other host hide it.
	c.register("c6", "127.0.0.22:9001")
	l.answers(t, "two")
	if err := second.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-second.Done()
	l.answers(t, "one")
	l.none(t, "an instance killed")
	c.deregister("c6")

	// Roost is killed and comes back; Envoy goes on.
	r.crash()
	r.serve()
	l.none(t, "roost killed")

	// Consul is gone; Roost is killed and starts without it: the last good state.
	until(t, "the last good state is kept", func() error {
		data, err := os.ReadFile(filepath.Join(r.dir, "data", "catalog", "consul.json"))
		if err == nil && (!strings.Contains(string(data), `"c5"`) || strings.Contains(string(data), `"c6"`)) {
			err = fmt.Errorf("it is %s", data)
		}
		return err
	})
	c.kill()
	r.crash()
	r.serve()
	if got := r.address("acme/cart"); got != address {
		t.Errorf("without Consul the address is %s, was %s", got, address)
	}
	if n := node().Node; n != "h1" {
		t.Errorf("without Consul the node is %q", n)
	}
	r.problem("source_stale")
	l.none(t, "roost restarted without Consul")

	// An empty Consul takes nothing away.
	c.start()
	r.problem("mass_loss_held")
	if got := h.call("http", url); got != "200  one" {
		t.Errorf("with an empty Consul the answer is %q", got)
	}
	l.none(t, "Consul wiped")

	// It is registered again, leaves for good, and its address stays.
	c.register("c5", "127.0.0.21:9001")
	until(t, "the loss is over", func() error {
		for _, p := range r.problems() {
			if p.Code == "mass_loss_held" {
				return errors.New(p.Message)
			}
		}
		return nil
	})
	l.stop()
	l.none(t, "Consul back")
	c.deregister("c5")
	until(t, "zero instances", func() error {
		if got := h.call("http", url); !strings.HasPrefix(got, "503 no_endpoint service cart of tenant acme has no running instance") {
			return errors.New(got)
		}
		return nil
	})
	if got := r.address("acme/cart"); got != address {
		t.Errorf("with zero instances the address is %s, was %s", got, address)
	}
	c.register("c9", "127.0.0.21:9001")
	until(t, "back", func() error {
		if got := h.call("http", url); got != "200  one" {
			return errors.New(got)
		}
		return nil
	})

	// Envoy is killed: its supervisor starts it again and it has everything.
	out, err := exec.Command("pgrep", "-P", strconv.Itoa(envoy.Pid())).Output()
	if err != nil {
		t.Fatalf("the Envoy of %d: %v", envoy.Pid(), err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "Envoy is back", func() error {
		if got := h.call("http", url); got != "200  one" {
			return errors.New(got)
		}
		return nil
	})
	var kinds struct{ Items []struct{ Kind string } }
	r.json(&kinds, "events")
	seen := map[string]bool{}
	for _, e := range kinds.Items {
		seen[e.Kind] = true
	}
	for _, kind := range []string{"instance_added", "instance_removed", "source_recovered", "proxy_connected", "proxy_disconnected"} {
		if !seen[kind] {
			t.Errorf("no event %s among %v", kind, seen)
		}
	}
}

// crash kills roost run as a crash would.
func (r *roost) crash() {
	r.t.Helper()
	if err := r.run.Signal(syscall.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	<-r.run.Done()
}

// TestManyServicesBesideAnotherClient: 300 Roost services over plain HTTP, while
// another client of the same agent holds 40 connections.
func TestManyServicesBesideAnotherClient(t *testing.T) {
	c := newCatalog(t)
	const many = 300
	for i := range many {
		err := c.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: fmt.Sprintf("s%d", i), Name: fmt.Sprintf("s%d", i), Address: "127.0.0.21", Port: 9001, Meta: map[string]string{"roost-tenant": "acme", "roost-port": "18082"}})
		if err != nil {
			t.Fatal(err)
		}
	}
	other := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 40}}
	t.Cleanup(other.CloseIdleConnections)
	for range 40 {
		go func() {
			res, err := other.Get("http://" + c.addr + "/v1/health/service/none?index=1000000&wait=60s")
			if err == nil {
				_ = res.Body.Close()
			}
		}()
	}
	r := newRoost(host{t, ""}, onLoopback(t, "127.151.0.0/16", "discovery: {consul: {address: \"http://"+c.addr+"\"}}\n")).serve()
	count := func() int {
		var list struct{ Items []json.RawMessage }
		r.json(&list, "instances")
		return len(list.Items)
	}
	until(t, "all instances are known", func() error {
		if n := count(); n != many {
			return fmt.Errorf("%d of %d", n, many)
		}
		return nil
	})
	// A change of the last service, which shares the sweep, arrives soon.
	for _, i := range []int{0, many - 1} {
		name := fmt.Sprintf("s%d", i)
		if err := c.client.Agent().ServiceDeregister(name); err != nil {
			t.Fatal(err)
		}
		until(t, name+" is gone", func() error {
			var s serviceJSON
			r.json(&s, "service", "show", "acme/"+name)
			if s.Instances.Total != 0 {
				return fmt.Errorf("it has %d instances", s.Instances.Total)
			}
			return nil
		})
	}
	for _, p := range r.problems() {
		if p.Severity == "error" {
			t.Errorf("problem %+v", p)
		}
	}
}
