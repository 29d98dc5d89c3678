package binaries

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Program is a program that was run once to learn its version.
type Program struct {
	Path    string // absolute, or as the user named it
	Version string // "1.40.0"
}

const (
	versionTimeout = 20 * time.Second       // a cold 107 MB binary on a slow disk
	lockPoll       = 100 * time.Millisecond // flock cannot be waited for together with a context
)

// CacheDir is where fetched and built programs are kept: $XDG_CACHE_HOME/roost, by default ~/.cache/roost.
func CacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache directory: %w: set XDG_CACHE_HOME or HOME", err)
	}
	return filepath.Join(base, "roost"), nil
}

// lockFile takes an exclusive lock on path, shared with other processes and with other callers in this one. waiting is
// called once when somebody else has it. The lock ends with the process that holds it.
func lockFile(ctx context.Context, path string, waiting func()) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: held by another process: %w", path, ctx.Err())
		case <-tick.C:
		}
	}
}

// output runs a program to its end and returns what it printed. The error carries the last line of its standard error.
func output(cmd *exec.Cmd) (string, error) {
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if l := lastLine(errOut.String()); l != "" {
			return out.String(), fmt.Errorf("%w: %s", err, l)
		}
		return out.String(), err
	}
	return out.String(), nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// talker returns a function that writes one line to w, or nothing when w is nil.
func talker(w io.Writer) func(format string, a ...any) {
	if w == nil {
		w = io.Discard
	}
	return func(format string, a ...any) { _, _ = fmt.Fprintf(w, format+"\n", a...) }
}
