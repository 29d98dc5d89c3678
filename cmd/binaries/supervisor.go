package binaries

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	defaultBackoffMin  = 100 * time.Millisecond
	defaultBackoffMax  = 10 * time.Second
	defaultHealthy     = 10 * time.Second
	defaultStopTimeout = 10 * time.Second
)

// Backoff says how long to wait before a crashed Envoy is started again: Min, doubled for every further crash up to Max,
// each time with up to half of it taken off at random. One that lived for Healthy starts again at Min.
type Backoff struct {
	Min, Max, Healthy time.Duration // zero: 100 ms, 10 s, 10 s
}

// SupervisorConfig describes one Envoy process that is to be kept alive.
type SupervisorConfig struct {
	Path          string   // the Envoy to run
	Bootstrap     []byte   // JSON; kept in a private file while Run runs
	BootstrapPath string   // a file (.json or .yaml), when Bootstrap is empty
	Args          []string // our arguments, beside -c and --disable-hot-restart
	ExtraArgs     []string // the user's: they replace the same ones of ours
	Env           []string // nil: the environment of this process
	Dir           string   // working directory; empty: that of this process

	Stdout, Stderr io.Writer        // nil: thrown away
	Logger         *slog.Logger     // nil: silent
	Signals        <-chan os.Signal // SIGTERM and SIGINT stop Envoy, others are passed on to it; nil: none

	Backoff     Backoff
	StopTimeout time.Duration // between SIGTERM and SIGKILL; zero: 10 s
	GiveUpAfter int           // consecutive crashes before Healthy that end Run with an error; zero: never
	AmbientCaps bool          // hand CAP_NET_BIND_SERVICE and CAP_NET_ADMIN on to Envoy, where this process has them

	OnStart func(pid int)                // called in Run's goroutine after each start
	OnExit  func(pid int, ending string) // the same after each end, asked for or not
}

// Supervisor keeps one Envoy running in the foreground. All its state is in the locals of Run; call that once.
type Supervisor struct {
	cfg SupervisorConfig // fixed at construction
}

// NewSupervisor checks cfg and starts nothing.
func NewSupervisor(cfg SupervisorConfig) (*Supervisor, error) {
	if cfg.Path == "" {
		return nil, errors.New("envoy: no program to run")
	}
	if len(cfg.Bootstrap) == 0 && cfg.BootstrapPath == "" {
		return nil, errors.New("envoy: no bootstrap to run with")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&cfg.Backoff.Min, defaultBackoffMin)
	setDefault(&cfg.Backoff.Max, defaultBackoffMax)
	setDefault(&cfg.Backoff.Healthy, defaultHealthy)
	setDefault(&cfg.StopTimeout, defaultStopTimeout)
	return &Supervisor{cfg: cfg}, nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d <= 0 {
		*d = v
	}
}

// Run starts Envoy, starts it again whenever it ends unasked, and stops it when ctx ends or a SIGTERM or SIGINT comes in:
// SIGTERM, then SIGKILL after StopTimeout or at a second signal. It returns nil after a stop that was asked for, and an
// error when Envoy cannot be started at all or GiveUpAfter is reached; in every case Envoy has ended.
func (s *Supervisor) Run(ctx context.Context) error {
	bootstrap, remove, err := s.bootstrapFile()
	if err != nil {
		return err
	}
	defer remove()
	if _, err := RaiseFileLimit(); err != nil {
		s.cfg.Logger.Warn("envoy keeps the file descriptor limit it has", "err", err)
	}
	signals := s.cfg.Signals
	for crashes := 0; ; {
		began := time.Now()
		p, err := startProcess(s.command(bootstrap), s.cfg.AmbientCaps)
		if err != nil {
			return fmt.Errorf("envoy %s: %w", s.cfg.Path, err)
		}
		s.cfg.Logger.Info("envoy started", "pid", p.pid)
		if s.cfg.OnStart != nil {
			s.cfg.OnStart(p.pid)
		}
		stopped := s.watch(ctx, p, &signals)
		lived := time.Since(began)
		if s.cfg.OnExit != nil {
			s.cfg.OnExit(p.pid, p.ending())
		}
		if stopped {
			s.cfg.Logger.Info("envoy stopped", "pid", p.pid, "ending", p.ending())
			return nil
		}
		if lived >= s.cfg.Backoff.Healthy {
			crashes = 0
		}
		crashes++
		if s.cfg.GiveUpAfter > 0 && crashes >= s.cfg.GiveUpAfter {
			return fmt.Errorf("envoy %s: ended %d times in a row soon after its start, the last time with %s", s.cfg.Path, crashes, p.ending())
		}
		delay := s.cfg.Backoff.delay(crashes, rand.Float64())
		s.cfg.Logger.Warn("envoy ended, starting it again", "pid", p.pid, "ending", p.ending(), "lived", lived, "delay", delay)
		if !pause(ctx, delay, &signals) {
			return nil
		}
	}
}

// delay before the start that follows the n-th crash in a row; r is in [0, 1).
func (b Backoff) delay(n int, r float64) time.Duration {
	d := b.Min
	for i := 1; i < n && d < b.Max; i++ {
		d *= 2
	}
	d = min(d, b.Max)
	return d - time.Duration(r*float64(d)/2)
}

// watch returns when p has ended: true when it was asked to. A closed signal channel counts as none.
func (s *Supervisor) watch(ctx context.Context, p *Process, signals *<-chan os.Signal) bool {
	for {
		select {
		case <-p.done:
			return ctx.Err() != nil
		case <-ctx.Done():
			s.stop(p, syscall.SIGTERM, *signals)
			return true
		case sig, ok := <-*signals:
			switch {
			case !ok:
				*signals = nil
			case isStop(sig):
				s.stop(p, sig, *signals)
				return true
			default:
				if err := p.signal(sig); err != nil {
					s.cfg.Logger.Warn("envoy did not get a signal", "signal", sig, "err", err)
				}
			}
		}
	}
}

// stop returns when p has ended.
func (s *Supervisor) stop(p *Process, sig os.Signal, signals <-chan os.Signal) {
	if err := p.signal(sig); err != nil {
		s.cfg.Logger.Warn("envoy did not get a signal", "signal", sig, "err", err)
	}
	timer := time.NewTimer(s.cfg.StopTimeout)
	defer timer.Stop()
	for again := false; !again; {
		select {
		case <-p.done:
			return
		case <-timer.C:
			again = true
		case sig, ok := <-signals:
			if !ok {
				signals = nil
			}
			again = ok && isStop(sig)
		}
	}
	s.cfg.Logger.Warn("envoy did not end in time and is killed", "pid", p.pid)
	_ = p.signal(syscall.SIGKILL)
	<-p.done
}

// pause waits for d and says whether to go on.
func pause(ctx context.Context, d time.Duration, signals *<-chan os.Signal) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return true
		case <-ctx.Done():
			return false
		case sig, ok := <-*signals:
			if !ok {
				*signals = nil
			} else if isStop(sig) {
				return false
			}
		}
	}
}

func isStop(sig os.Signal) bool { return sig == syscall.SIGTERM || sig == syscall.SIGINT }

// bootstrapFile returns the file for -c and a function that removes it when it is ours.
func (s *Supervisor) bootstrapFile() (path string, remove func(), err error) {
	if len(s.cfg.Bootstrap) == 0 {
		return s.cfg.BootstrapPath, func() {}, nil
	}
	dir, err := os.MkdirTemp("", "roost-envoy-") // mode 0700: a bootstrap may name credentials
	if err != nil {
		return "", nil, fmt.Errorf("envoy bootstrap: %w", err)
	}
	remove = func() { _ = os.RemoveAll(dir) }
	path = filepath.Join(dir, "bootstrap.json")
	if err := os.WriteFile(path, s.cfg.Bootstrap, 0o600); err != nil {
		remove()
		return "", nil, fmt.Errorf("envoy bootstrap: %w", err)
	}
	return path, remove, nil
}

func (s *Supervisor) command(bootstrap string) *exec.Cmd {
	cmd := exec.Command(s.cfg.Path, s.args(bootstrap)...)
	cmd.Env, cmd.Dir = s.cfg.Env, s.cfg.Dir
	cmd.Stdout, cmd.Stderr = s.cfg.Stdout, s.cfg.Stderr
	return cmd
}

// args puts the command line together. Envoy refuses an option that is given twice, so the user's replace ours. Without hot
// restart Envoys on one host share no memory segment, so a second one cannot clash.
func (s *Supervisor) args(bootstrap string) []string {
	ours := append([]string{"-c", bootstrap}, s.cfg.Args...)
	restarts := []string{"--base-id", "--use-dynamic-base-id", "--restart-epoch", "--disable-hot-restart"}
	all := slices.Concat(s.cfg.Args, s.cfg.ExtraArgs)
	if !slices.ContainsFunc(all, func(a string) bool { return slices.Contains(restarts, optionName(a)) }) {
		ours = append(ours, "--disable-hot-restart")
	}
	var theirs []string
	for _, a := range s.cfg.ExtraArgs {
		theirs = append(theirs, optionName(a))
	}
	var args []string
	replaced := false
	for _, a := range ours {
		if name := optionName(a); name != "" {
			replaced = slices.Contains(theirs, name)
		}
		if !replaced {
			args = append(args, a)
		}
	}
	return append(args, s.cfg.ExtraArgs...)
}

// optionName is the long name of an option as it stands on a command line, and empty for a value.
func optionName(arg string) string {
	if len(arg) < 2 || arg[0] != '-' {
		return ""
	}
	name, _, _ := strings.Cut(arg, "=")
	switch name {
	case "-c":
		return "--config-path"
	case "-l":
		return "--log-level"
	}
	return name
}
