package binaries

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// RequireEnv is a comma-separated list of components (envoy, consul, grpcio, netns) whose absence fails a test instead of
// skipping it.
const RequireEnv = "ROOST_REQUIRE"

const (
	findTimeout  = 15 * time.Minute // a cold build of Consul takes up to 8 on two cores
	readyTimeout = 60 * time.Second
	readyPoll    = 20 * time.Millisecond
)

// TB is the part of testing.TB that the helpers need: the package is linked into roost, which carries no test code.
type TB interface {
	Helper()
	Failed() bool
	TempDir() string
	Cleanup(func())
	Logf(format string, args ...any)
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Require says whether the component must be there for tests to pass: whether $ROOST_REQUIRE names it.
func Require(name string) bool {
	for s := range strings.SplitSeq(os.Getenv(RequireEnv), ",") {
		if strings.TrimSpace(s) == name {
			return true
		}
	}
	return false
}

// EnvoyForTest returns the path of Envoy. A required one is downloaded when it is missing; otherwise the test is skipped.
func EnvoyForTest(t TB) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), findTimeout)
	defer cancel()
	p, err := FindEnvoy(ctx, EnvoyOptions{Talk: logWriter{t}, NoFetch: !Require("envoy")})
	missing(t, "envoy", err)
	return p.Path
}

// ConsulForTest returns the path of Consul. A required one is built when it is missing; otherwise the test is skipped.
func ConsulForTest(t TB) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), findTimeout)
	defer cancel()
	p, err := FindConsul(ctx, ConsulOptions{Talk: logWriter{t}, NoFetch: !Require("consul")})
	missing(t, "consul", err)
	return p.Path
}

// missing ends the test when err says that a component is not there.
func missing(t TB, name string, err error) {
	t.Helper()
	switch {
	case err == nil:
	case Require(name):
		t.Fatalf("%v (required by $%s)", err, RequireEnv)
	default:
		t.Skipf("%v", err)
	}
}

// logWriter passes lines on to a test's log.
type logWriter struct{ t TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimRight(p, "\n"))
	return len(p), nil
}

// TestEnvoy is an Envoy that a test started; it ends with the test.
type TestEnvoy struct {
	Admin string // host:port of its admin interface
	Log   *Log   // its standard output and error

	stop func()
}

// Stop ends Envoy and returns after it has ended.
func (e *TestEnvoy) Stop() { e.stop() }

// StartEnvoy runs the Envoy of EnvoyForTest under a Supervisor with a bootstrap in JSON, whose admin interface must be a
// loopback address with port 0, and returns when the admin interface answers. What Envoy said is logged when the test fails.
func StartEnvoy(t TB, bootstrap []byte, args ...string) *TestEnvoy {
	t.Helper()
	path := EnvoyForTest(t)
	e := &TestEnvoy{Log: &Log{}}
	adminFile := filepath.Join(t.TempDir(), "admin")
	s, err := NewSupervisor(SupervisorConfig{
		Path: path, Bootstrap: bootstrap, Stdout: e.Log, Stderr: e.Log, GiveUpAfter: 3, StopTimeout: 3 * time.Second,
		Args: slices.Concat([]string{"--admin-address-path", adminFile, "-l", "info", "--concurrency", "1"}), ExtraArgs: args,
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Logf("%v", err)
		}
	})
	t.Cleanup(func() {
		e.stop()
		if t.Failed() {
			t.Logf("envoy said:\n%s", e.Log.String())
		}
	})
	wait, done := context.WithTimeout(ctx, readyTimeout)
	defer done()
	err = Poll(wait, readyPoll, func() (err error) {
		select {
		case err := <-ended:
			ended <- err
			cancel()
			return fmt.Errorf("ended: %w", err)
		default:
		}
		e.Admin, err = adminAddress(wait, adminFile)
		return err
	})
	if err != nil {
		t.Fatalf("envoy is not up: %v", err)
	}
	return e
}

// adminAddress returns what Envoy wrote to file once its admin interface answers there.
func adminAddress(ctx context.Context, file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	address := strings.TrimSpace(string(b))
	_, err = get(ctx, "http://"+address+"/server_info")
	return address, err
}

// get fetches url without keeping a connection, so that nothing is left for a leak check to find.
func get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	tr := &http.Transport{DisableKeepAlives: true}
	res, err := (&http.Client{Transport: tr, Timeout: 5 * time.Second}).Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	var b bytes.Buffer
	if _, err := b.ReadFrom(res.Body); err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", url, res.Status)
	}
	return b.Bytes(), nil
}

// Poll calls f at once and then at each tick until it succeeds or ctx ends; then it
// returns the last error of f.
func Poll(ctx context.Context, every time.Duration, f func() error) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// Log collects what a process writes; safe for concurrent use.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns all that was written so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
