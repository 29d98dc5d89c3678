package binaries

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func sayingConsul(version string) string { return fmt.Sprintf("echo 'Consul v%s'; echo more", version) }

// TestWhichConsul walks the order in which a Consul is looked for.
func TestWhichConsul(t *testing.T) {
	dir := t.TempDir()
	named := script(t, filepath.Join(dir, "named"), sayingConsul("1.20.0"))
	env := script(t, filepath.Join(dir, "env"), sayingConsul("1.22.3"))
	onPath := filepath.Join(dir, "bin")
	cache := filepath.Join(dir, "cache")
	cached := script(t, filepath.Join(cache, "consul-"+ConsulVersion), sayingConsul(ConsulVersion))
	junk := script(t, filepath.Join(dir, "junk"), "echo hello")
	fails := script(t, filepath.Join(dir, "fails"), "echo no such option >&2; exit 2")
	path := os.Getenv("PATH")
	for _, c := range []struct {
		name, path, env, onPath, cache, want, fails string
	}{
		{name: "named by the user, whatever its version", path: named, env: env, want: named},
		{name: "named one that is none", path: junk, fails: "not a Consul"},
		{name: "named one that fails", path: fails, fails: "no such option"},
		{name: "named one that is not there", path: filepath.Join(dir, "nowhere"), fails: "no such file"},
		{name: "by the environment", env: env, onPath: "1.22.0", want: env},
		{name: "on PATH", onPath: "1.22.0", want: filepath.Join(onPath, "consul")},
		{name: "another version on PATH is passed over", onPath: "1.21.9", want: cached},
		{name: "the cache", want: cached},
		{name: "nowhere", cache: filepath.Join(dir, "empty"), fails: "not in $CONSUL, on PATH or in"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(ConsulEnv, c.env)
			t.Setenv("PATH", onPath+":"+path)
			_ = os.RemoveAll(onPath)
			if c.onPath != "" {
				script(t, filepath.Join(onPath, "consul"), sayingConsul(c.onPath))
			}
			if c.cache == "" {
				c.cache = cache
			}
			p, err := FindConsul(t.Context(), ConsulOptions{Path: c.path, CacheDir: c.cache, NoFetch: true})
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("%v, want %q", err, c.fails)
				}
				return
			}
			if err != nil || p.Path != c.want {
				t.Errorf("%+v %v, want %s", p, err, c.want)
			}
		})
	}
}

// TestConsulIsBuiltOnce: by one of those that look at the same time, in the
// nested module, and it says how long that takes.
func TestConsulIsBuiltOnce(t *testing.T) {
	dir := t.TempDir()
	cache, bin, log := filepath.Join(dir, "cache"), filepath.Join(dir, "bin"), filepath.Join(dir, "log")
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(filepath.Join(root, consulModule), 0o755); err != nil {
		t.Fatal(err)
	}
	built := script(t, filepath.Join(dir, "built"), sayingConsul(ConsulVersion))
	script(t, filepath.Join(bin, "go"), fmt.Sprintf(`case "$1" in
list) echo '%s' ;;
build) pwd >> '%s'; cp '%s' "$4" ;;
esac`, root, log, built))
	t.Setenv(ConsulEnv, "")
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	talk := &Log{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			p, err := FindConsul(t.Context(), ConsulOptions{CacheDir: cache, Talk: talk})
			if err != nil || p.Path != filepath.Join(cache, "consul-"+ConsulVersion) || p.Version != ConsulVersion {
				t.Errorf("%+v %v", p, err)
			}
		})
	}
	wg.Wait()
	where, err := os.ReadFile(log)
	if err != nil || strings.TrimSpace(string(where)) != filepath.Join(root, consulModule) {
		t.Errorf("built in %q %v", where, err)
	}
	if !strings.Contains(talk.String(), "4 to 8 minutes") {
		t.Errorf("it says %q", talk.String())
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "*.new")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestConsulThatCannotBeBuilt(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(ConsulEnv, "")
	t.Setenv("PATH", dir)
	if _, err := FindConsul(t.Context(), ConsulOptions{CacheDir: filepath.Join(dir, "cache")}); err == nil || !strings.Contains(err.Error(), "needs Go and Roost's source") || !strings.Contains(err.Error(), "put Consul 1.22.x on PATH") {
		t.Errorf("without Go: %v", err)
	}
}

// kv reads or, with a body, writes a key.
func kv(t *testing.T, a *ConsulAgent, body string) string {
	t.Helper()
	method := http.MethodGet
	if body != "" {
		method = http.MethodPut
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	out, err := a.do(ctx, method, "/v1/kv/key?raw", body)
	if err != nil {
		return err.Error()
	}
	return out
}

// TestStartConsul: in dev mode its state ends with it; with a data directory it
// survives a crash, on the same ports.
func TestStartConsul(t *testing.T) {
	dev := StartConsul(t, ConsulConfig{})
	kept := StartConsul(t, ConsulConfig{Node: "h2", DataDir: t.TempDir()})
	for _, a := range []*ConsulAgent{dev, kept} {
		kv(t, a, "value")
		if got := kv(t, a, ""); got != "value" {
			t.Errorf("read %q", got)
		}
		a.Kill()
		if conn, err := net.Dial("tcp", a.HTTPAddr); err == nil {
			_ = conn.Close()
			t.Error("it still listens")
		}
		a.Restart()
	}
	if got := kv(t, dev, ""); !strings.Contains(got, "404") {
		t.Errorf("dev mode kept %q", got)
	}
	if got := kv(t, kept, ""); got != "value" {
		t.Errorf("with a data directory it kept %q", got)
	}
	kept.Stop()
	kept.Stop() // no harm
}

// TestStartConsulSafely: HTTP/2 over TLS with the authority that is named, and
// nothing without the token.
func TestStartConsulSafely(t *testing.T) {
	a := StartConsul(t, ConsulConfig{TLS: true, ACL: true})
	pem, err := os.ReadFile(a.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	res, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get("https://" + a.HTTPSAddr + "/v1/kv/key")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.ProtoMajor != 2 || res.StatusCode != http.StatusForbidden {
		t.Errorf("%s %s without a token", res.Proto, res.Status)
	}
}

// pretend is a TB that notes how it ended.
type pretend struct {
	testing.TB
	skipped, failed string
}

var errEnded = errors.New("ended")

func (p *pretend) Helper() {}

func (p *pretend) Logf(string, ...any) {}

func (p *pretend) Skipf(format string, a ...any) {
	p.skipped = fmt.Sprintf(format, a...)
	panic(errEnded)
}

func (p *pretend) Fatalf(format string, a ...any) {
	p.failed = fmt.Sprintf(format, a...)
	panic(errEnded)
}

// TestWhatIsMissing: a component that is not there skips a test, and fails it
// when it is required.
func TestWhatIsMissing(t *testing.T) {
	t.Setenv(ConsulEnv, filepath.Join(t.TempDir(), "nowhere"))
	t.Setenv(EnvoyEnv, os.Getenv(ConsulEnv))
	for required, fails := range map[string]bool{"": false, "netns": false, " consul , envoy": true} {
		t.Setenv(RequireEnv, required)
		for name, ask := range map[string]func(TB) string{"consul": ConsulForTest, "envoy": EnvoyForTest} {
			p := &pretend{TB: t}
			func() {
				defer func() { _ = recover() }()
				ask(p)
			}()
			if (p.failed != "") != fails || (p.skipped != "") == fails {
				t.Errorf("%s with %q: failed %q, skipped %q", name, required, p.failed, p.skipped)
			}
		}
	}
}
