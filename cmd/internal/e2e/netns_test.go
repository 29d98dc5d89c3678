package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/roostmesh/roost/cmd/binaries"
)

// needNetns ends the test where network namespaces cannot be made.
func needNetns(t *testing.T) {
	t.Helper()
	why := ""
	for _, tool := range []string{"ip", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			why = err.Error()
		}
	}
	if os.Geteuid() != 0 {
		why = "not root, and unshare -Urnm does not work here"
	}
	switch {
	case why == "":
	case binaries.Require("netns"):
		t.Fatalf("%s (required by $%s)", why, binaries.RequireEnv)
	default:
		t.Skip(why)
	}
}

var nsCounter atomic.Int32

// machine makes a network namespace that ends with the test.
func machine(t *testing.T, name string) host {
	t.Helper()
	h := host{t, fmt.Sprintf("rst%d-%d-%s", os.Getpid(), nsCounter.Add(1), name)}
	here := host{t, ""}
	here.sh("ip", "netns", "add", h.ns)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", h.ns).Run() })
	h.sh("ip", "link", "set", "lo", "up")
	return h
}

// bridge makes a bridge with an address on a machine.
func (h host) bridge(name, address string) {
	h.t.Helper()
	h.sh("ip", "link", "add", name, "type", "bridge")
	h.sh("ip", "addr", "add", address, "dev", name)
	h.sh("ip", "link", "set", name, "up")
}

// container makes a namespace with a leg in the machine's bridge, the machine
// as its router and dns as its resolver.
func (h host) container(name, bridge, address, router, dns string) host {
	h.t.Helper()
	c := machine(h.t, name)
	n := nsCounter.Add(1)
	outer, inner := fmt.Sprintf("v%d-%d", os.Getpid()%10000, n), fmt.Sprintf("w%d-%d", os.Getpid()%10000, n)
	here := host{h.t, ""}
	here.sh("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
	here.sh("ip", "link", "set", outer, "netns", h.ns)
	here.sh("ip", "link", "set", inner, "netns", c.ns)
	h.sh("ip", "link", "set", outer, "master", bridge)
	h.sh("ip", "link", "set", outer, "up")
	c.sh("ip", "link", "set", inner, "name", "eth0")
	c.sh("ip", "addr", "add", address, "dev", "eth0")
	c.sh("ip", "link", "set", "eth0", "up")
	c.sh("ip", "route", "add", "default", "via", router)
	c.resolver(dns)
	return c
}

// resolver makes programs of the namespace ask dns.
func (h host) resolver(dns string) {
	h.t.Helper()
	dir := filepath.Join("/etc/netns", h.ns)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("nameserver "+dns+"\noptions timeout:1 attempts:2\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// wire connects two machines.
func wire(a, b host, addressA, addressB string) {
	a.t.Helper()
	n := nsCounter.Add(1)
	left, right := fmt.Sprintf("x%d-%d", os.Getpid()%10000, n), fmt.Sprintf("y%d-%d", os.Getpid()%10000, n)
	here := host{a.t, ""}
	here.sh("ip", "link", "add", left, "type", "veth", "peer", "name", right)
	for _, end := range []struct {
		h          host
		name, addr string
	}{{a, left, addressA}, {b, right, addressB}} {
		here.sh("ip", "link", "set", end.name, "netns", end.h.ns)
		end.h.sh("ip", "addr", "add", end.addr, "dev", end.name)
		end.h.sh("ip", "link", "set", end.name, "up")
	}
}

// getent resolves a name as programs of the namespace do: "" is not found.
func (h host) getent(name string) string {
	h.t.Helper()
	out, err := h.command("getent", "ahostsv4", name).Output()
	var ended *exec.ExitError
	if errors.As(err, &ended) && ended.ExitCode() == 2 {
		return ""
	}
	if err != nil {
		h.t.Fatalf("getent %s: %v", name, err)
	}
	first, _, _ := strings.Cut(string(out), " ")
	return first
}

const routedConfig = `
node: h1
dns: {addresses: ["10.42.1.1:53"], forward: []}
addresses: {internal: 100.96.0.0/12}
discovery: {file: {path: services.d}}
loopback: all
tenants:
  acme: {clients: [10.42.1.2/32]}
  globex: {clients: [10.42.1.3/32]}
services:
  - {name: shop, tenant: acme, ports: [{port: 80, protocol: http}]}
  - {name: db, tenant: acme, ports: [{port: 5432}]}
  - {name: shop, tenant: globex, ports: [{port: 80, protocol: http}]}
`

const routedInstances = `
instances:
  - {tenant: acme, service: shop, id: s1, address: "10.42.1.10:80"}
  - {tenant: acme, service: db, id: d1, address: "10.42.1.10:5432"}
  - {tenant: globex, service: shop, id: g1, address: "10.42.1.11:80"}
`

// routed is one machine with containers of two tenants and a routed pool.
type routed struct {
	*roost
	acme, globex, unknown host // callers
	acmeApp, globexApp    host
	shop, db, globexShop  string
}

func newRouted(t *testing.T, config string) *routed {
	t.Helper()
	needNetns(t)
	h := machine(t, "h1")
	h.bridge("br0", "10.42.1.1/24")
	w := &routed{}
	for _, c := range []struct {
		at      *host
		name    string
		address string
	}{{&w.acme, "acme", "10.42.1.2/24"}, {&w.globex, "globex", "10.42.1.3/24"}, {&w.unknown, "unknown", "10.42.1.4/24"}, {&w.acmeApp, "shop", "10.42.1.10/24"}, {&w.globexApp, "gshop", "10.42.1.11/24"}} {
		*c.at = h.container(c.name, "br0", c.address, "10.42.1.1", "10.42.1.1")
	}
	w.acmeApp.app("http", "acme-shop", "0.0.0.0:80")
	w.acmeApp.app("tcp", "acme-db", "0.0.0.0:5432")
	w.globexApp.app("http", "globex-shop", "0.0.0.0:80")
	w.roost = newRoost(h, config)
	w.file("services.d/i.yaml", routedInstances)
	w.serve()
	w.shop, w.db, w.globexShop = w.address("acme/shop"), w.address("acme/db"), w.address("globex/shop")
	return w
}

// TestContainersReachTheirTenantOnly: callers without a sidecar resolve and
// reach their tenant's services through the host's node proxy; another tenant's
// do not exist for them, and not one byte comes through.
func TestContainersReachTheirTenantOnly(t *testing.T) {
	w := newRouted(t, routedConfig)
	w.envoy("--node", "h1")
	until(t, "acme reaches its shop", func() error {
		if got := w.acme.call("http", "http://"+w.shop+"/"); got != "200  acme-shop" {
			return errors.New(got)
		}
		return nil
	})
	for _, c := range []struct {
		who        host
		what, want string
	}{
		{w.acme, w.db + ":5432", "got acme-db"},
		{w.globex, w.db + ":5432", "got"},
		{w.unknown, w.db + ":5432", "got"},
		{w.acmeApp, w.db + ":5432", "got acme-db"}, // an instance's own address makes it its tenant's
		{w.globexApp, w.db + ":5432", "got"},
	} {
		if got := c.who.call("tcp", c.what); got != c.want {
			t.Errorf("%s calls %s: %q, want %q", c.who.ns, c.what, got, c.want)
		}
	}
	for _, who := range []host{w.globex, w.unknown} {
		if got := who.call("http", "http://"+w.shop+"/"); !strings.HasPrefix(got, "failed") {
			t.Errorf("%s calls acme's shop: %q, want a closed connection", who.ns, got)
		}
	}
	if got := w.acme.getent("shop.acme.roost"); got != w.shop {
		t.Errorf("acme resolves its shop to %q, want %s", got, w.shop)
	}
	for _, who := range []host{w.globex, w.unknown} {
		if got := who.getent("shop.acme.roost"); got != "" {
			t.Errorf("%s resolves acme's shop to %q, want nothing", who.ns, got)
		}
	}
	if got := w.globex.getent("shop.globex.roost"); got != w.globexShop {
		t.Errorf("globex resolves its shop to %q, want %s", got, w.globexShop)
	}
	p := w.problem("caller_unknown")
	if !strings.Contains(p.Fix, "clients: [10.42.1.0/24]") {
		t.Errorf("the problem's fix is %q, want the clients line", p.Fix)
	}
}
