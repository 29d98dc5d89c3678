package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

// fails runs the binary and checks its exit code and what it says.
func fails(t *testing.T, code int, says string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(t), args...)
	cmd.Env = append(os.Environ(), "ROOST_CONFIG=", "ROOST_ADDR=", "XDG_STATE_HOME="+t.TempDir())
	out, err := cmd.CombinedOutput()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code || !strings.Contains(string(out), says) {
		t.Errorf("roost %s: exit %d, want %d; it says\n%s\nwant %q", strings.Join(args, " "), got, code, out, says)
	}
}

// TestExitCodes: each way to fail has its code and says what is wrong.
func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	bad, good := filepath.Join(dir, "bad.yaml"), filepath.Join(dir, "good.yaml")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Close() }()
	locked := filepath.Join(dir, "locked")
	if err := os.WriteFile(locked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	config := func(key string) string {
		path := filepath.Join(dir, strings.SplitN(key, ":", 2)[0]+".yaml")
		text := fmt.Sprintf("data_dir: %s\nadmin: {address: 127.0.0.1:%d}\nxds: {address: 127.0.0.1:%d}\ndns: {addresses: [127.0.0.1:%d], forward: []}\n", t.TempDir(), freePort(t), freePort(t), freePort(t))
		lines := strings.Split(text, "\n")
		for i, line := range lines {
			name, _, _ := strings.Cut(key, ":")
			if strings.HasPrefix(line, name+":") {
				lines[i] = key
			}
		}
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for path, text := range map[string]string{bad: "domian: x\n", good: "services: [{name: shop, tenant: acme, ports: [{port: 80}]}]\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at := busy.Addr().String()
	fails(t, 65, `bad.yaml:1:1: domian: is not a known key; did you mean "domain"?`, "validate", "--config", bad)
	fails(t, 65, "domian", "run", "--config", bad)
	fails(t, 65, "no such file", "validate", "--config", filepath.Join(dir, "none.yaml"))
	fails(t, 0, "ok, 1 services", "validate", "--config", good)
	fails(t, 2, "admin.address: "+at+": bind: address already in use", "run", "--config", config("admin: {address: "+at+"}"))
	fails(t, 2, "xds.address: "+at+": bind: address already in use", "run", "--config", config("xds: {address: "+at+"}"))
	fails(t, 2, "dns.addresses: "+at+": address already in use", "run", "--config", config("dns: {addresses: ["+at+"], forward: []}"))
	fails(t, 2, "not a directory", "run", "--config", config("data_dir: "+locked+"/x"))
	fails(t, 64, "unknown flag: --nope", "run", "--nope")
	fails(t, 64, "unknown command", "nope")
	fails(t, 64, "say which proxy this is", "bootstrap")
	fails(t, 64, `--sidecar "a/b" is not TENANT/SERVICE/ID[@NODE]`, "bootstrap", "--sidecar", "a/b")
	fails(t, 69, "no roost answers at http://127.0.0.1:1", "--address", "127.0.0.1:1", "services")
	fails(t, 79, "mend:", "check", "--config", good)
	fails(t, 0, `"id": "node~h1"`, "bootstrap", "--node", "h1")
	fails(t, 0, `"server_uri": "unix:/run/x.sock"`, "bootstrap", "--grpc", "a/b/c", "--xds", "unix:/run/x.sock")
	fails(t, 64, `--grpc "a/b" is not TENANT/SERVICE/ID[@NODE]`, "bootstrap", "--grpc", "a/b")
	fails(t, 64, "want IP:PORT or unix:PATH", "bootstrap", "--grpc", "a/b/c", "--xds", "nowhere")
	fails(t, 64, "--admin is Envoy's", "bootstrap", "--grpc", "a/b/c", "--admin", "127.0.0.1:0")
	fails(t, 64, "is for an application that needs no Envoy: roost bootstrap --grpc a/b/c", "envoy", "--grpc", "a/b/c")
	fails(t, 0, "json-schema.org", "schema")
	fails(t, 0, "bash completion", "completion", "bash")
	fails(t, 0, "roost", "version")
}

// TestSecondRoostIsRefused: two with one data directory would own the same
// ledger.
func TestSecondRoostIsRefused(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.154.0.0/16", "")).serve()
	other := filepath.Join(r.dir, "other.yaml")
	text := onLoopback(t, "127.154.0.0/16", "data_dir: "+filepath.Join(r.dir, "data")+"\n")
	if err := os.WriteFile(other, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	fails(t, 2, "another roost runs with this data_dir", "run", "--config", other)
}

// TestServicesAsObjects: a service made through the command line has its name
// and address from then on, over restarts; deleted and made again it has the
// same address; what a file declares is not changed here.
func TestServicesAsObjects(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.155.0.0/16", "services: [{name: fixed, tenant: acme, ports: [{port: 80}]}]\n")).serve()
	ok := func(args ...string) string {
		t.Helper()
		code, out, errOut := r.cli(args...)
		if code != 0 {
			t.Fatalf("roost %v: exit %d: %s", args, code, errOut)
		}
		return out
	}
	ok("service", "create", "acme/cart", "--port", "18085:http")
	address := r.address("acme/cart")
	ok("service", "set", "acme/cart", "--allow", "globex/web")
	if out := ok("service", "show", "acme/cart"); !strings.Contains(out, "globex/web") || !strings.Contains(out, "18085/http") {
		t.Errorf("set lost something: %s", out)
	}
	r.crash()
	r.serve()
	if got := r.address("acme/cart"); got != address {
		t.Errorf("after a crash the address is %s, was %s", got, address)
	}
	if out := ok("service", "delete", "acme/cart"); !strings.Contains(out, address) || !strings.Contains(out, "quarantined") {
		t.Errorf("delete says %q", out)
	}
	if code, _, errOut := r.cli("service", "show", "acme/cart"); code != 1 || !strings.Contains(errOut, "there is no service acme/cart") {
		t.Errorf("show of a deleted service: exit %d %s", code, errOut)
	}
	ok("service", "create", "acme/cart", "--port", "18085:http")
	if got := r.address("acme/cart"); got != address {
		t.Errorf("made again the address is %s, was %s", got, address)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"service", "set", "acme/fixed", "--port", "81"}, "the service is declared in a file: change it at"},
		{[]string{"service", "delete", "acme/none"}, "there is no such service"},
		{[]string{"service", "create", "acme/bad", "--port", "80:htp"}, `"htp" is none of`},
		{[]string{"service", "create", "acme/Bad", "--port", "80"}, `"Bad" is no service name`},
	} {
		if code, _, errOut := r.cli(c.args...); code != 1 || !strings.Contains(errOut, c.says) {
			t.Errorf("roost %v: exit %d %q, want %q", c.args, code, errOut, c.says)
		}
	}
}

// TestReload: a good file is taken at once, a bad one is refused whole and said
// to be, what cannot change keeps its value, and a removed service is a delete.
func TestReload(t *testing.T) {
	head := onLoopback(t, "127.156.0.0/16", "")
	r := newRoost(host{t, ""}, head+"services: [{name: a, tenant: acme, ports: [{port: 80}]}]\n").serve()
	a := r.address("acme/a")
	r.write(head + "services: [{name: a, tenant: acme, ports: [{port: 80}]}, {name: b, tenant: acme, ports: [{port: 80}]}]\n")
	until(t, "the new service is there", func() error {
		if code, _, errOut := r.cli("service", "show", "acme/b"); code != 0 {
			return errors.New(errOut)
		}
		return nil
	})
	r.write(head + "services: [{name: a, tenant: acme, prts: []}]\n")
	r.problem("config_refused")
	if _, out, _ := r.cli("problems"); !strings.Contains(out, `did you mean "ports"`) || !strings.Contains(out, "roost.yaml:7:36") {
		t.Errorf("problems:\n%s", out)
	}
	if got := r.address("acme/a"); got != a {
		t.Errorf("with a bad file the address is %s, was %s", got, a)
	}
	r.write(strings.Replace(head, "127.156.0.0/16", "127.157.0.0/16", 1) + "services: [{name: b, tenant: acme, ports: [{port: 80}]}]\n")
	if p := r.problem("config_needs_restart"); p.Object != "addresses.internal" {
		t.Errorf("problem %+v", p)
	}
	until(t, "the removed service is deleted", func() error {
		if code, _, _ := r.cli("service", "show", "acme/a"); code != 1 {
			return fmt.Errorf("exit %d", code)
		}
		return nil
	})
	if _, out, _ := r.cli("addresses"); !regexp.MustCompile(regexp.QuoteMeta(a) + `.*quarantined`).MatchString(out) {
		t.Errorf("its address is not in quarantine:\n%s", out)
	}
}

// TestAdminIsForThisHost: another Host or Origin, an unknown path and a wrong
// method get problem documents; the unix socket answers, too.
func TestAdminIsForThisHost(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.158.0.0/16", "")).serve()
	for _, c := range []struct {
		method, path, host, origin string
		status                     int
	}{
		{http.MethodGet, "/healthz", "", "", 200}, {http.MethodGet, "/readyz", "", "", 200}, {http.MethodGet, "/version", "", "", 200},
		{http.MethodGet, "/openapi.json", "", "", 200}, {http.MethodGet, "/api/v1/overview", "", "", 200}, {http.MethodGet, "/api/v1/tenants", "", "", 200},
		{http.MethodGet, "/healthz", "evil.example.com", "", 403}, {http.MethodGet, "/healthz", "", "http://evil.example.com", 403},
		{http.MethodGet, "/nope", "", "", 404}, {http.MethodPost, "/healthz", "", "", 405},
		{http.MethodGet, "/api/v1/explain?url=ftp://x", "", "", 400}, {http.MethodGet, "/api/v1/dns/resolve?name=x&type=NOPE", "", "", 400},
		{http.MethodGet, "/api/v1/proxies/node~none", "", "", 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+r.args+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = c.host
		if c.origin != "" {
			req.Header.Set("Origin", c.origin)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || res.StatusCode != c.status {
			t.Errorf("%s %s: %d %v, want %d: %s", c.method, c.path, res.StatusCode, err, c.status, data)
		}
		if c.status >= 400 && res.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s %s: content type %s", c.method, c.path, res.Header.Get("Content-Type"))
		}
	}
	out, err := exec.CommandContext(t.Context(), program(t), "--address", "unix:"+filepath.Join(r.dir, "data", "admin.sock"), "services").CombinedOutput()
	if err != nil {
		t.Errorf("over the unix socket: %v %s", err, out)
	}
}

// TestEventsStream: a change is sent at once and once more as a receipt, and a
// stream resumes after an event.
func TestEventsStream(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.159.0.0/16", "discovery: {file: {path: services.d}}\nservices: [{name: a, tenant: acme, ports: [{port: 18086}]}]\n")).serve()
	r.envoy("--node", "h1")
	until(t, "the proxy is there", func() error {
		if _, out, _ := r.cli("status"); !strings.Contains(out, "node~h1") {
			return errors.New(out)
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.args+"/api/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "text/event-stream")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	r.file("services.d/i.yaml", "instances: [{tenant: acme, service: a, id: one, address: 127.0.0.41:9001}]\n")
	lines, kind := bufio.NewScanner(res.Body), ""
	var seen []string
	for lines.Scan() && !strings.HasSuffix(strings.Join(seen, " "), "receipt") {
		if k, ok := strings.CutPrefix(lines.Text(), "event: "); ok {
			kind = k
		}
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok || kind != "instance_added" && kind != "receipt" {
			continue
		}
		var e struct {
			Kind  string
			Steps struct{ Built, Pushed, Acked *float64 }
		}
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			t.Fatal(err)
		}
		if e.Kind != "instance_added" || e.Steps.Built == nil || kind == "receipt" && (e.Steps.Acked == nil || *e.Steps.Acked <= 0) {
			t.Errorf("%s: %s", kind, data)
		}
		seen = append(seen, kind)
	}
	if got := strings.Join(seen, " "); got != "instance_added receipt" {
		t.Errorf("seen %q", got)
	}
}

// TestPortTakenByTheApplication: a sidecar whose application holds the port is
// a Problem with the way out; its other listeners work.
func TestPortTakenByTheApplication(t *testing.T) {
	h := host{t, ""}
	taken := freePort(t)
	h.app("http", "app", fmt.Sprintf("0.0.0.0:%d", taken))
	r := newRoost(h, onLoopback(t, "127.160.0.0/16", fmt.Sprintf(`
services:
  - {name: a, tenant: acme, ports: [{port: %d, protocol: http}], instances: [{id: a-1, address: "127.0.0.42:9001"}]}
  - {name: b, tenant: acme, ports: [{port: 18087, protocol: http}]}
  - {name: c, tenant: globex, ports: [{port: 18087, protocol: http}]}
`, taken))).serve()
	r.envoy("--sidecar", "acme/a/a-1")
	p := r.problem("listener_address_in_use")
	if p.Object != "sidecar~acme~a~a-1" || !strings.Contains(p.Fix, "capture: {sidecar: nft}") || !strings.Contains(p.Message, fmt.Sprintf(":%d", taken)) {
		t.Errorf("problem %+v", p)
	}
	until(t, "the other service answers", func() error {
		if got := h.call("http", "http://"+r.address("acme/b")+":18087/"); !strings.HasPrefix(got, "503 no_endpoint") {
			return errors.New(got)
		}
		return nil
	})
	if got := h.call("http", "http://"+r.address("globex/c")+":18087/"); !strings.HasPrefix(got, "failed") {
		t.Errorf("another tenant's service answers on a sidecar: %q", got)
	}
}

// TestDemo: the demo holds its promises, twice at once.
func TestDemo(t *testing.T) {
	envoy, roost := binaries.EnvoyForTest(t), program(t)
	type result struct {
		out []byte
		err error
	}
	done := make(chan result, 2)
	for range 2 {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, roost, "demo", "--headless", "-o", "json")
			cmd.Env = append(os.Environ(), binaries.EnvoyEnv+"="+envoy)
			out, err := cmd.Output()
			done <- result{out, err}
		}()
	}
	for range 2 {
		r := <-done
		var v struct {
			OK    bool
			Steps []struct {
				Name          string
				AddressBefore string `json:"address_before"`
				AddressAfter  string `json:"address_after"`
				Failed        int
			}
		}
		if err := json.Unmarshal(r.out, &v); err != nil || r.err != nil || !v.OK || len(v.Steps) != 4 {
			t.Fatalf("%v %v %s", r.err, err, r.out)
		}
		for _, s := range v.Steps {
			if s.Failed != 0 || s.AddressBefore == "" || s.AddressBefore != s.AddressAfter {
				t.Errorf("step %+v", s)
			}
		}
	}
}
