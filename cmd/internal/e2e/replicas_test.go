package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const sharedServices = `services:
  - name: shop
    tenant: acme
    ports: [{port: 18101, protocol: http}]
    instances: [{id: a, address: "127.0.0.71:9001", node: h1}, {id: b, address: "127.0.0.72:9001", node: h2}]
listeners: [{name: web, address: "127.0.0.73:18102", protocol: http, gateway: edge}]
routes: [{name: all, tenant: acme, listeners: [web], to: [{service: shop}]}]
`

// replica is a Roost that shares its ledger in a Consul.
func (c *catalog) replica(node, rest string) *roost {
	c.t.Helper()
	config := onLoopback(c.t, "127.170.0.0/29", "discovery: {consul: {address: \"http://"+c.addr+"\"}}\nstore: {consul: {}}\n"+rest)
	config = strings.Replace(config, "node: h1\n", "node: "+node+"\n", 1)
	config = strings.Replace(config, "internal: 127.170.0.0/29", "internal: 127.170.0.0/29, quarantine: 1s", 1)
	config = strings.Replace(config, "forward: []", "ttl: 1s, forward: []", 1)
	return newRoost(host{c.t, ""}, config)
}

// ok runs a verb that must succeed.
func (r *roost) ok(args ...string) string {
	r.t.Helper()
	code, out, errOut := r.cli(args...)
	if code != 0 {
		r.t.Fatalf("roost %v: exit %d: %s", args, code, errOut)
	}
	return out
}

// sees waits until a service has an address there.
func (r *roost) sees(service, address string) {
	r.t.Helper()
	until(r.t, service+" at "+address, func() error {
		code, out, errOut := r.cli("service", "show", service)
		if code != 0 {
			return errors.New(errOut)
		}
		if !strings.Contains(out, address+"\n") {
			return errors.New(out)
		}
		return nil
	})
}

// TestReplicas: two Roosts share a ledger. What one gives, both serve; a drain
// waits for the proxies of both, and names who is silent; an address is free when
// both are through with it; each goes on without the other, and without Consul.
func TestReplicas(t *testing.T) {
	c := newCatalog(t)
	h := host{t, ""}
	r1, r2 := c.replica("h1", sharedServices).serve(), c.replica("h2", sharedServices).serve()
	address := r1.address("acme/shop")
	r2.sees("acme/shop", address)
	r1.ok("service", "create", "acme/cart", "--port", "18103:http")
	cart := r1.address("acme/cart")
	r2.sees("acme/cart", cart)
	r2.ok("service", "set", "acme/cart", "--port", "18104:http")
	until(t, "the change is there, too", func() error {
		if out := r1.ok("service", "show", "acme/cart"); !strings.Contains(out, "18104/http") {
			return errors.New(out)
		}
		return nil
	})

	// A drain asked of one replica waits for a request at the other's proxy.
	b := newHeld(t, "b", "127.0.0.72:9001", false)
	r1.envoy("--node", "h1")
	gateway := r2.envoy("--gateway", "edge/h2")
	web := "http://127.0.0.73:18102/"
	until(t, "the gateway answers", func() error {
		if got := h.call("http", web); got != "200  b" {
			return errors.New(got)
		}
		return nil
	})
	slow := make(chan string)
	go func() { slow <- h.call("http", web+"slow") }()
	<-b.began
	done := make(chan drainJSON)
	go func() {
		var out drainJSON
		r1.json(&out, "drain", "acme/shop/b@h2")
		done <- out
	}()
	until(t, "the gateway has let go", func() error {
		if got := h.call("http", web); !strings.HasPrefix(got, "503 no_healthy_endpoint") {
			return errors.New(got)
		}
		return nil
	})
	select {
	case out := <-done:
		t.Fatalf("it did not wait for the other replica's proxy: %+v", out)
	case <-time.After(300 * time.Millisecond):
	}
	b.let <- struct{}{}
	if got := <-slow; got != "200  b" {
		t.Errorf("the request in flight: %s", got)
	}
	if out := <-done; !out.Drained || out.TimedOut || len(out.Waiting) != 0 {
		t.Errorf("drain: %+v", out)
	}
	r2.ok("undrain", "acme/shop/b@h2")
	until(t, "the gateway answers again", func() error {
		if got := h.call("http", web); got != "200  b" {
			return errors.New(got)
		}
		return nil
	})

	// Who does not answer is named.
	resume := stopEnvoy(t, gateway)
	if code, _, errOut := r1.cli("drain", "acme/shop/b@h2", "--timeout", "500ms"); code != 1 || !strings.Contains(errOut, "proxy gateway~edge~h2 has not confirmed") {
		t.Errorf("a silent proxy of the other: exit %d %s", code, errOut)
	}
	resume()
	r1.ok("undrain", "acme/shop/b@h2")
	if err := r2.run.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := r1.cli("drain", "acme/shop/b@h2", "--timeout", "500ms"); code != 1 || !strings.Contains(errOut, "replica h2 has not confirmed") {
		t.Errorf("a silent replica: exit %d %s", code, errOut)
	}

	// While it is silent no address becomes free.
	r1.ok("service", "delete", "acme/cart")
	rec, err := r1.record("acme/cart")
	if err != nil || rec.FreeAfter == nil {
		t.Fatalf("record %+v, %v", rec, err)
	}
	waited := time.NewTimer(time.Until(*rec.FreeAfter) + 2*time.Second)
	<-waited.C
	if rec, err := r1.record("acme/cart"); err != nil || rec.State != "quarantined" {
		t.Errorf("the other replica may have it, but the record is %+v, %v", rec, err)
	}
	if err := r2.run.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	until(t, "it is free when both are through", func() error {
		if rec, err := r1.record("acme/cart"); err == nil {
			return fmt.Errorf("record %+v", rec)
		}
		return nil
	})

	// One is killed: the other goes on, and the first comes back under its name.
	r1.crash()
	r2.ok("service", "create", "acme/late", "--port", "18105:http")
	late := r2.address("acme/late")
	r1.serve()
	r1.sees("acme/late", late)
	r1.sees("acme/shop", address)

	// Consul is killed, and one Roost with it: it starts with what it remembers.
	until(t, "it is remembered", func() error {
		data, err := os.ReadFile(filepath.Join(r1.dir, "data", "ledger.json"))
		if err == nil && !strings.Contains(string(data), "late") {
			err = errors.New("not there")
		}
		return err
	})
	c.kill()
	r1.crash()
	r1.serve()
	r1.sees("acme/late", late)
	r1.problem("store_unreachable")
	if code, _, errOut := r1.cli("service", "create", "acme/none", "--port", "18106"); code != 1 || !strings.Contains(errOut, "store.consul") && !strings.Contains(errOut, c.addr) {
		t.Errorf("a service made without a store: exit %d %s", code, errOut)
	}

	// Consul comes back empty: the ledger is written again, nothing moves.
	c.start()
	until(t, "the store is whole again", func() error {
		code, _, errOut := r1.cli("service", "create", "acme/after", "--port", "18107:http")
		if code != 0 {
			return errors.New(errOut)
		}
		return nil
	})
	after := r1.address("acme/after")
	r2.sees("acme/after", after)
	for _, r := range []*roost{r1, r2} {
		r.sees("acme/shop", address)
		r.sees("acme/late", late)
	}
}

// TestReplicasDiffer: a service that one replica's file no longer has keeps its
// address while another's has it.
func TestReplicasDiffer(t *testing.T) {
	c := newCatalog(t)
	r1, r2 := c.replica("h1", sharedServices).serve(), c.replica("h2", sharedServices).serve()
	address := r1.address("acme/shop")
	r2.sees("acme/shop", address)
	less := func(r *roost) {
		t.Helper()
		data, err := os.ReadFile(r.config)
		if err != nil {
			t.Fatal(err)
		}
		r.file("roost.yaml", strings.Replace(string(data), sharedServices, "", 1))
		until(t, "the service is not served there", func() error {
			if code, out, _ := r.cli("service", "show", "acme/shop"); code == 0 {
				return errors.New(out)
			}
			return nil
		})
	}
	less(r1)
	if p := r1.problem("replicas_differ"); !strings.Contains(p.Message, "h2") {
		t.Errorf("problem %+v", p)
	}
	r2.sees("acme/shop", address)
	if rec, err := r2.record("acme/shop"); err != nil || rec.State != "bound" {
		t.Errorf("record %+v, %v", rec, err)
	}
	less(r2)
	until(t, "it is gone from both", func() error {
		rec, err := r1.record("acme/shop")
		if err == nil && rec.State == "bound" {
			return fmt.Errorf("record %+v", rec)
		}
		return nil
	})
}
