package binaries

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// said waits until the log has a text.
func said(t *testing.T, log *Log, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := Poll(ctx, readyPoll, func() error {
		if !strings.Contains(log.String(), text) {
			return fmt.Errorf("it said %q, want %q", log.String(), text)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestProcessStop: a child ends by SIGTERM, or by SIGKILL after the grace; Stop
// returns when it has ended, and a second one does no harm.
func TestProcessStop(t *testing.T) {
	for _, c := range []struct {
		name, body, ending string
		grace              time.Duration
	}{
		{"by itself", "exit 0", "exit status 0", time.Minute},
		{"with a failure", "exit 7", "exit status 7", time.Minute},
		{"by SIGTERM", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done", "exit status 3", time.Minute},
		{"by SIGKILL", "trap '' TERM; echo up; while :; do sleep 0.05; done", "killed", 50 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := &Log{}
			cmd := exec.Command(script(t, filepath.Join(t.TempDir(), "child"), c.body))
			cmd.Stdout = log
			p, err := Start(cmd)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(c.body, "up") {
				said(t, log, "up")
			} else {
				<-p.Done()
			}
			p.Stop(c.grace)
			p.Stop(c.grace)
			select {
			case <-p.Done():
			default:
				t.Error("it has not ended")
			}
			if !strings.Contains(p.Ending(), c.ending) {
				t.Errorf("ended with %q, want %q", p.Ending(), c.ending)
			}
			if err := p.Signal(syscall.SIGHUP); err != nil {
				t.Errorf("a signal to one that has ended: %v", err)
			}
		})
	}
	if _, err := Start(exec.Command("/nowhere/at/all")); err == nil || !strings.Contains(err.Error(), "start: ") {
		t.Errorf("one that is not there: %v", err)
	}
}

// TestSignals: SIGTERM and SIGINT stop Envoy, a second one kills it, others are
// passed on; a closed channel counts as none. The bootstrap is there while it
// runs, for nobody else to read, and gone afterwards.
func TestSignals(t *testing.T) {
	body := `trap 'echo hup' HUP; trap 'echo term' TERM
echo "up $2 $(stat -c %a "$2") $(cat "$2")"
while :; do sleep 0.05; done`
	log := &Log{}
	signals := make(chan os.Signal, 1)
	s, err := NewSupervisor(SupervisorConfig{Path: script(t, filepath.Join(t.TempDir(), "child"), body), Bootstrap: []byte(`{"node": 1}`), Stdout: log, Signals: signals, StopTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context()) }()
	said(t, log, `600 {"node": 1}`)
	signals <- syscall.SIGHUP
	said(t, log, "hup")
	signals <- syscall.SIGTERM
	said(t, log, "term")
	signals <- syscall.SIGINT
	if err := <-done; err != nil {
		t.Error(err)
	}
	file := strings.Fields(log.String())[1]
	if _, err := os.Stat(filepath.Dir(file)); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", file, err)
	}
}

// TestStopWhileItWaits: a stop between a crash and the next start is obeyed at
// once, and a closed signal channel is no stop.
func TestStopWhileItWaits(t *testing.T) {
	closed := make(chan os.Signal)
	close(closed)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := NewSupervisor(SupervisorConfig{
		Path: script(t, filepath.Join(t.TempDir(), "crash"), "exit 1"), BootstrapPath: "b.json", Signals: closed,
		Backoff: Backoff{Min: time.Hour, Max: time.Hour}, OnExit: func(int, string) { cancel() },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
}

// TestLongLifeForgives: one that lived long enough begins with the shortest pause
// again, and is not given up.
func TestLongLifeForgives(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	starts := 0
	s, err := NewSupervisor(SupervisorConfig{
		Path: script(t, filepath.Join(t.TempDir(), "crash"), "exit 1"), BootstrapPath: "b.json", GiveUpAfter: 2,
		Backoff: Backoff{Min: time.Millisecond, Max: time.Millisecond, Healthy: time.Nanosecond},
		OnStart: func(int) {
			if starts++; starts == 5 {
				cancel()
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(ctx); err != nil || starts != 5 {
		t.Errorf("%v after %d starts", err, starts)
	}
}

func TestCommandLines(t *testing.T) {
	for _, c := range []struct {
		name         string
		ours, theirs []string
		want         string
	}{
		{"ours", []string{"-l", "info"}, nil, "-c b -l info --disable-hot-restart"},
		{"theirs beside ours", []string{"-l", "info"}, []string{"--concurrency", "2"}, "-c b -l info --disable-hot-restart --concurrency 2"},
		{"theirs replace ours, in either form", []string{"--log-level", "info", "--concurrency", "1"}, []string{"-l", "debug", "--concurrency=4"}, "-c b --disable-hot-restart -l debug --concurrency=4"},
		{"their bootstrap", nil, []string{"--config-path", "theirs.json"}, "--disable-hot-restart --config-path theirs.json"},
		{"their way to restart", nil, []string{"--use-dynamic-base-id"}, "-c b --use-dynamic-base-id"},
	} {
		s, err := NewSupervisor(SupervisorConfig{Path: "envoy", BootstrapPath: "b", Args: c.ours, ExtraArgs: c.theirs})
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(s.args("b"), " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	for _, c := range []SupervisorConfig{{}, {Path: "envoy"}, {BootstrapPath: "b"}} {
		if _, err := NewSupervisor(c); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}
