package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/roostmesh/roost/cmd/binaries"
)

const examples = "../../../docs/examples"

// stopHooks checks the commands by which an application is drained before it
// stops, and that its manager waits longer than a drain.
func stopHooks(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(examples, "systemd", "web@.service"))
	if err != nil {
		t.Fatal(err)
	}
	hooks := regexp.MustCompile(`(?m)^Exec(?:StartPost|Stop)=-/usr/local/bin/roost (\S+) acme/web/web-%i$`).FindAllStringSubmatch(string(data), -1)
	if len(hooks) != 2 || hooks[0][1] != "undrain" || hooks[1][1] != "drain" || !strings.Contains(string(data), "TimeoutStopSec=45\n") {
		t.Errorf("systemd: hooks %v", hooks)
	}
	if data, err = os.ReadFile(filepath.Join(examples, "compose", "stop.yaml")); err != nil {
		t.Fatal(err)
	}
	var compose struct {
		Services map[string]struct {
			Grace   string `yaml:"stop_grace_period"`
			PreStop []struct {
				Command []string `yaml:"command"`
			} `yaml:"pre_stop"`
		} `yaml:"services"`
	}
	if err := yaml.Load(data, &compose); err != nil {
		t.Fatal(err)
	}
	web := compose.Services["web"]
	if web.Grace != "45s" || len(web.PreStop) != 1 || strings.Join(web.PreStop[0].Command, " ") != "/usr/local/bin/roost drain acme/web/web-1" {
		t.Errorf("compose: %+v", web)
	}
	if data, err = os.ReadFile(filepath.Join(examples, "nomad", "web.nomad.hcl")); err != nil || !strings.Contains(string(data), `shutdown_delay = "45s"`) || !strings.Contains(string(data), "roost drain ") {
		t.Errorf("nomad: %v", err)
	}
	for _, verb := range []string{"drain", "undrain"} {
		fails(t, 0, "roost "+verb+" INSTANCE", verb, "--help")
	}
}

// TestExamplesAreValid: the config files load, and every command that a unit or
// a Compose file runs has flags that the binary knows.
func TestExamplesAreValid(t *testing.T) {
	for _, name := range []string{"roost.yaml", "routed.yaml"} {
		fails(t, 0, "ok", "validate", "--config", filepath.Join(examples, name))
	}
	units, err := filepath.Glob(filepath.Join(examples, "systemd", "roost*.service"))
	if err != nil || len(units) != 4 {
		t.Fatalf("units: %v %v", units, err)
	}
	start := regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/roost (.*)$`)
	for _, path := range units {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		m := start.FindStringSubmatch(string(data))
		if m == nil || !strings.Contains(string(data), "AmbientCapabilities=") {
			t.Fatalf("%s has no ExecStart of roost, or no capabilities", path)
		}
		fails(t, 0, "Usage:", append(strings.Fields(m[1]), "--help")...)
	}
	stopHooks(t)
	data, err := os.ReadFile(filepath.Join(examples, "compose", "compose.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var compose struct {
		Services map[string]struct {
			Image       string   `yaml:"image"`
			NetworkMode string   `yaml:"network_mode"`
			Command     []string `yaml:"command"`
		} `yaml:"services"`
	}
	if err := yaml.Load(data, &compose); err != nil {
		t.Fatal(err)
	}
	if s := compose.Services["shop-envoy"]; s.Image != "envoyproxy/envoy:v"+binaries.EnvoyVersion || s.NetworkMode != "service:shop" {
		t.Errorf("compose: %+v", s)
	}
}

// TestStockEnvoyOverASocket is the Compose example without an engine: an Envoy
// that knows nothing but `roost bootstrap`, over a unix socket that serves one
// tenant.
func TestStockEnvoyOverASocket(t *testing.T) {
	h := host{t, ""}
	socket := filepath.Join(t.TempDir(), "acme.sock")
	config := strings.Replace(onLoopback(t, "127.161.0.0/16", "services: [{name: shop, tenant: acme, ports: [{port: 18088, protocol: http}]}, {name: web, tenant: globex, ports: [{port: 18088, protocol: http}]}]\n"),
		"xds: {", "xds: {sockets: [{path: "+socket+", tenant: acme}], ", 1)
	r := newRoost(h, config).serve()
	run := func(sidecar string) {
		t.Helper()
		code, out, errOut := r.cli("bootstrap", "--sidecar", sidecar, "--xds", "unix:"+socket)
		if code != 0 {
			t.Fatal(errOut)
		}
		file := filepath.Join(t.TempDir(), "envoy.json")
		if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
			t.Fatal(err)
		}
		h.start(&binaries.Log{}, "", binaries.EnvoyForTest(t), "-c", file, "--disable-hot-restart", "-l", "warning", "--concurrency", "1")
	}
	run("acme/shop/shop-1")
	run("globex/web/web-1") // the socket is not its tenant's
	until(t, "the sidecar answers", func() error {
		if got := h.call("http", "http://"+r.address("acme/shop")+":18088/"); !strings.HasPrefix(got, "503 no_endpoint") {
			return errors.New(got)
		}
		return nil
	})
	_, out, _ := r.cli("status")
	if !strings.Contains(out, "sidecar~acme~shop~shop-1") || strings.Contains(out, "globex") {
		t.Errorf("status:\n%s", out)
	}
}

// TestFullPool: services beyond the pool are a Problem that names it; they have
// no address, and the others keep theirs.
func TestFullPool(t *testing.T) {
	var services strings.Builder
	for i := range 8 {
		fmt.Fprintf(&services, "  - {name: s%d, tenant: acme, ports: [{port: 80}]}\n", i)
	}
	r := newRoost(host{t, ""}, onLoopback(t, "127.162.0.0/29", "services:\n"+services.String())).serve()
	p := r.problem("pool_full")
	if !strings.Contains(p.Message, "127.162.0.0/29") || !strings.Contains(p.Fix, "make pool 127.162.0.0/29 larger") {
		t.Errorf("problem %+v", p)
	}
	var list struct{ Items []serviceJSON }
	r.json(&list, "services")
	seen := map[string]bool{}
	for _, s := range list.Items {
		if s.Address != "" && seen[s.Address] {
			t.Errorf("address %s twice", s.Address)
		}
		seen[s.Address] = true
	}
	if len(list.Items) != 8 || len(seen) != 7 { // six addresses, and none
		t.Errorf("%d services with the addresses %v", len(list.Items), seen)
	}
}

// TestRequestsAreCounted: /metrics has the requests of the Envoys of this host
// by tenant, service and code, each counted once.
func TestRequestsAreCounted(t *testing.T) {
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.163.0.0/16", "services: [{name: shop, tenant: acme, ports: [{port: 18089, protocol: http}], instances: [{id: a, address: \"127.0.0.51:9001\"}]}]\n")).serve()
	h.app("http", "a", "127.0.0.51:9001")
	r.envoy("--node", "h1")
	url := "http://" + r.address("acme/shop") + ":18089/"
	until(t, "first answer", func() error {
		if got := h.call("http", url); got != "200  a" {
			return errors.New(got)
		}
		return nil
	})
	for range 9 {
		h.call("http", url)
	}
	const want = `roost_requests_total{code="200",role="node",service="shop",tenant="acme"} 10`
	until(t, "ten requests", func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.args+"/metrics", nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			return err
		}
		if !strings.Contains(string(text), want+"\n") {
			return fmt.Errorf("no line %s", want)
		}
		return nil
	})
	if n, b := r.metric("roost_xds_resources"), r.metric("roost_xds_resource_bytes"); n < 4 || b < 100*n {
		t.Errorf("%v resources are encoded, %v bytes: at least a cluster, its endpoints, a listener and a route", n, b)
	}
	if sent := r.metric("roost_xds_sent_bytes_total"); sent < r.metric("roost_xds_resource_bytes")/2 {
		t.Errorf("%v bytes were sent", sent)
	}
}

// TestLeaves: a Roost that is told to stop says that it is not ready, and still
// serves, before it ends.
func TestLeaves(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.164.0.0/16", "services: [{name: shop, tenant: acme, ports: [{port: 18090}]}]\n")).serve()
	ready := func() (int, string) {
		res, err := http.Get("http://" + r.args + "/readyz")
		if err != nil {
			return 0, err.Error()
		}
		defer func() { _ = res.Body.Close() }()
		body, _ := io.ReadAll(res.Body) // an error leaves it short
		return res.StatusCode, string(body)
	}
	if code, body := ready(); code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	ended := make(chan struct{})
	go func() {
		r.run.Stop(5 * time.Second)
		close(ended)
	}()
	seen := false
	for done := false; !done; {
		select {
		case <-ended:
			done = true
		default:
			code, body := ready()
			seen = seen || code == http.StatusServiceUnavailable && strings.Contains(body, "about to stop")
		}
	}
	if !seen {
		t.Error("it has ended without a word")
	}
}
