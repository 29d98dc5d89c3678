package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
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

// engineRules are what a container engine installs to publish the other
// tenant's container at port 80 of every local address.
func (w *routed) engineRules() {
	w.t.Helper()
	w.sh("iptables", "-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", "10.42.1.11:80")
	w.sh("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
}

// TestNothingElseAnswersForAService: with a process on 0.0.0.0 at the service's
// port and a container engine's rules that send port 80 of every local address
// to the other tenant's container, not one byte of either reaches a caller.
func TestNothingElseAnswersForAService(t *testing.T) {
	w := newRouted(t, routedConfig)
	w.engineRules()
	// Without an Envoy nobody answers.
	w.app("http", "squatter", "0.0.0.0:80")
	for _, port := range []string{"", ":5432"} {
		if got := w.acme.call("http", "http://"+w.shop+port+"/"); !strings.HasPrefix(got, "failed") {
			t.Errorf("without Envoy acme gets %q from its shop, want nothing", got)
		}
	}
	// The check bites: without the guard the other tenant's container answers.
	tables := w.sh("nft", "list", "tables", "inet")
	for line := range strings.SplitSeq(strings.TrimSpace(tables), "\n") {
		w.sh("nft", "delete", "table", "inet", strings.TrimPrefix(line, "table inet "))
	}
	if got := w.acme.call("http", "http://"+w.shop+"/"); !strings.Contains(got, "globex-shop") {
		t.Fatalf("without the guard acme gets %q: this test would not notice a leak", got)
	}
	// Roost puts the guard back by itself.
	until(t, "the guard is back", func() error {
		if got := w.acme.call("http", "http://"+w.shop+"/"); !strings.HasPrefix(got, "failed") {
			return errors.New(got)
		}
		return nil
	})
	// The port is taken: that one listener is refused, and said to be; the
	// other services of the proxy work.
	w.envoy("--node", "h1")
	p := w.problem("listener_address_in_use")
	if !strings.Contains(p.Fix, "capture: {node: tproxy}") {
		t.Errorf("fix is %q, want the way out by capture", p.Fix)
	}
	until(t, "acme reaches its database", func() error {
		if got := w.acme.call("tcp", w.db+":5432"); got != "got acme-db" {
			return errors.New(got)
		}
		return nil
	})
	if got := w.acme.call("http", "http://"+w.shop+"/"); !strings.HasPrefix(got, "failed") {
		t.Errorf("with the port taken acme gets %q, want nothing", got)
	}
}

// TestTakenPortIsCaptured: with capture: tproxy a node proxy serves a service
// although another process holds 0.0.0.0 at its port, for containers and for
// the host itself, and tells tenants apart as before.
func TestTakenPortIsCaptured(t *testing.T) {
	w := newRouted(t, "capture: {node: tproxy}\n"+routedConfig)
	w.engineRules()
	w.app("http", "squatter", "0.0.0.0:80")
	w.envoy("--node", "h1")
	until(t, "acme reaches its shop", func() error {
		if got := w.acme.call("http", "http://"+w.shop+"/"); got != "200  acme-shop" {
			return errors.New(got)
		}
		return nil
	})
	for _, c := range []struct {
		who              host
		kind, what, want string
	}{
		{w.acme, "tcp", w.db + ":5432", "got acme-db"},
		{w.globex, "tcp", w.db + ":5432", "got"},
		{w.unknown, "tcp", w.db + ":5432", "got"},
		{w.globex, "http", "http://" + w.globexShop + "/", "200  globex-shop"},
		{w.host, "http", "http://" + w.shop + "/", "200  acme-shop"},
		{w.host, "http", "http://127.0.0.1/", "200  squatter"},
	} {
		if got := c.who.call(c.kind, c.what); got != c.want {
			t.Errorf("%s calls %s: %q, want %q", c.who.ns, c.what, got, c.want)
		}
	}
	// A port that no service has is closed, not the squatter's.
	w.app("http", "squatter", "0.0.0.0:8081")
	if got := w.acme.call("http", "http://"+w.shop+":8081/"); !strings.HasPrefix(got, "failed") {
		t.Errorf("a port without a service answers %q", got)
	}
}

const twoHosts = `
node: %s
dns: {addresses: ["10.43.0.1:53"], forward: []}
addresses: {internal: 100.96.0.0/12}
discovery: {file: {path: services.d}}
loopback: none
tenants:
  acme: {clients: [{cidr: 10.43.0.0/24, node: h1}]}
  globex: {clients: [{cidr: 10.43.0.0/24, node: h2}]}
services:
  - {name: shop, tenant: acme, ports: [{port: 80, protocol: http}]}
  - {name: db, tenant: acme, ports: [{port: 5432}]}
  - {name: web, tenant: globex, ports: [{port: 80, protocol: http}]}
`

// TestSameSubnetOnTwoHosts: one bridge subnet is tenant acme's on the first
// host and globex's on the second; instances on both hosts serve behind one
// address; an instance registered by its host's own address makes that host
// nobody's.
func TestSameSubnetOnTwoHosts(t *testing.T) {
	needNetns(t)
	h1, h2 := machine(t, "h1"), machine(t, "h2")
	wire(h1, h2, "192.0.2.1/24", "192.0.2.2/24")
	instances := `
instances:
  - {tenant: acme, service: shop, id: s1, node: h1, address: "192.0.2.1:9001"}
  - {tenant: acme, service: shop, id: s2, node: h2, address: "192.0.2.2:9001"}
  - {tenant: acme, service: db, id: d1, node: h2, address: "192.0.2.2:9003"}
  - {tenant: globex, service: web, id: w1, node: h1, address: "192.0.2.1:9002"}
`
	var roosts []*roost
	var callers []host
	for i, h := range []host{h1, h2} {
		h.bridge("br0", "10.43.0.1/24")
		callers = append(callers, h.container(fmt.Sprintf("c%d", i+1), "br0", "10.43.0.2/24", "10.43.0.1", "10.43.0.1"))
		r := newRoost(h, fmt.Sprintf(twoHosts, fmt.Sprintf("h%d", i+1)))
		r.file("services.d/i.yaml", instances)
		roosts = append(roosts, r.serve())
		r.envoy("--node", fmt.Sprintf("h%d", i+1))
	}
	h1.app("http", "shop-on-h1", "192.0.2.1:9001")
	h1.app("http", "web-on-h1", "192.0.2.1:9002")
	h2.app("http", "shop-on-h2", "192.0.2.2:9001")
	h2.app("tcp", "db-on-h2", "192.0.2.2:9003")
	shop, db, web := roosts[0].address("acme/shop"), roosts[0].address("acme/db"), roosts[0].address("globex/web")
	for i, want := range []string{shop, db, web} {
		if got := roosts[1].address([]string{"acme/shop", "acme/db", "globex/web"}[i]); got != want {
			t.Fatalf("the second host derives %s, the first %s", got, want)
		}
	}
	seen := map[string]bool{}
	until(t, "acme's caller reaches instances on both hosts", func() error {
		seen[callers[0].call("http", "http://"+shop+"/")] = true
		if !seen["200  shop-on-h1"] || !seen["200  shop-on-h2"] {
			return fmt.Errorf("seen %v", seen)
		}
		return nil
	})
	until(t, "globex's caller reaches its service from the other host", func() error {
		if got := callers[1].call("http", "http://"+web+"/"); got != "200  web-on-h1" {
			return errors.New(got)
		}
		return nil
	})
	for _, c := range []struct {
		who        host
		what, want string
	}{
		{callers[0], db + ":5432", "got db-on-h2"},
		{callers[1], db + ":5432", "got"},
		{h1, db + ":5432", "got"}, // loopback: none
	} {
		if got := c.who.call("tcp", c.what); got != c.want {
			t.Errorf("%s calls %s: %q, want %q", c.who.ns, c.what, got, c.want)
		}
	}
	if got := callers[0].getent("web.globex.roost") + callers[1].getent("shop.acme.roost"); got != "" {
		t.Errorf("a tenant resolves the other's service to %q", got)
	}
	// Each host knows its own addresses, so each is asked about its callers.
	for i, c := range []map[string]string{{"192.0.2.1": "nobody", "10.43.0.2": "acme"}, {"192.0.2.2": "nobody", "10.43.0.2": "globex"}} {
		for at, want := range c {
			var a struct{ View, Why string }
			roosts[i].json(&a, "resolve", "shop.acme.roost", "--from", at)
			if a.View != want {
				t.Errorf("on host %d %s is %q (%s), want %q", i+1, at, a.View, a.Why, want)
			}
		}
	}
}

// TestCommandsThatCheckPrintsWork: what `roost check` finds missing on a host is
// mended by the commands it prints, and taken away again by `capture remove`.
func TestCommandsThatCheckPrintsWork(t *testing.T) {
	needNetns(t)
	for _, capture := range []string{"bind", "tproxy"} {
		h := machine(t, "check")
		r := newRoost(h, "capture: {node: "+capture+"}\naddresses: {internal: 100.96.0.0/12}\nservices: [{name: shop, tenant: acme, ports: [{port: 80}]}]\n")
		found := func() map[string]bool {
			var list struct {
				Items []struct {
					Name string
					OK   bool
				}
			}
			_, out, errOut := r.cli("check", "--config", r.config, "-o", "json")
			if err := json.Unmarshal([]byte(out), &list); err != nil {
				t.Fatalf("%v: %s%s", err, out, errOut)
			}
			m := map[string]bool{}
			for _, f := range list.Items {
				m[f.Name] = f.OK
			}
			return m
		}
		if f := found(); f["guard"] || f["pool 100.96.0.0/12"] {
			t.Fatalf("a bare host has %v", f)
		}
		code, script, errOut := r.cli("capture", "install", "--dry-run", "--config", r.config)
		if code != 0 {
			t.Fatal(errOut)
		}
		h.sh("sh", "-ec", script)
		if f := found(); !f["guard"] || !f["pool 100.96.0.0/12"] {
			t.Errorf("%s: after its own commands check finds %v", capture, f)
		}
		byHand := h.sh("nft", "list", "ruleset")
		if code, _, errOut := r.cli("capture", "remove", "--config", r.config); code != 0 {
			t.Fatal(errOut)
		}
		if f := found(); f["guard"] || f["pool 100.96.0.0/12"] {
			t.Errorf("%s: after remove check finds %v", capture, f)
		}
		if code, _, errOut := r.cli("capture", "install", "--config", r.config); code != 0 {
			t.Fatal(errOut)
		}
		rules := regexp.MustCompile(`(?m)^\t\t(ip .*)$`)
		own, printed := rules.FindAllString(h.sh("nft", "list", "ruleset"), -1), rules.FindAllString(byHand, -1)
		slices.Sort(own)
		slices.Sort(printed)
		if len(own) == 0 || !slices.Equal(own, printed) {
			t.Errorf("%s: roost installs\n%s\nand prints\n%s", capture, strings.Join(own, "\n"), strings.Join(printed, "\n"))
		}
	}
}

// TestSidecarCapture: with capture: nft a sidecar serves its namespace although
// the application there holds 0.0.0.0 at the service's port.
func TestSidecarCapture(t *testing.T) {
	needNetns(t)
	h := machine(t, "pod")
	h.app("http", "app", "0.0.0.0:80")
	r := newRoost(h, "node: h1\ncapture: {sidecar: nft}\nservices:\n  - {name: shop, tenant: acme, ports: [{port: 80, protocol: http}], instances: [{id: s1, address: \"127.0.0.1:80\"}]}\n  - {name: db, tenant: acme, ports: [{port: 80, protocol: http}]}\n").serve()
	r.envoy("--sidecar", "acme/shop/s1")
	until(t, "the service answers through Envoy", func() error {
		if got := h.call("http", "http://"+r.address("acme/shop")+"/"); got != "200  app" {
			return errors.New(got)
		}
		return nil
	})
	if got := h.call("http", "http://"+r.address("acme/db")+"/"); !strings.HasPrefix(got, "503 no_endpoint") {
		t.Errorf("a service without an instance answers %q: not through Envoy?", got)
	}
	if got := h.call("http", "http://127.0.0.1/"); got != "200  app" {
		t.Errorf("the application itself answers %q", got)
	}
}
