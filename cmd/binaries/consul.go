package binaries

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	// ConsulVersion is the Consul that the tests are made for and that is built when the host has none.
	ConsulVersion = "1.22.7"
	// ConsulEnv names a Consul to use instead of the one on PATH or in the cache.
	ConsulEnv = "CONSUL"

	consulMinor   = "1.22."
	consulPackage = "github.com/hashicorp/consul"
	consulModule  = "cmd/internal/tools/consul"
)

// ConsulOptions says where to look for Consul.
type ConsulOptions struct {
	Path     string    // named by the user; empty: $CONSUL, PATH, the cache, a build
	CacheDir string    // empty: CacheDir()
	Talk     io.Writer // told about a build; nil: silent
	NoFetch  bool      // only look: a missing Consul is an error
}

// FindConsul returns the first Consul of: o.Path, $CONSUL, consul on PATH where it is 1.22, the cache; else it builds one
// from its Go module into the cache. Processes that look at the same time build once.
func FindConsul(ctx context.Context, o ConsulOptions) (Program, error) {
	for _, named := range []string{o.Path, os.Getenv(ConsulEnv)} {
		if named != "" {
			v, err := consulVersion(ctx, named)
			return Program{named, v}, err
		}
	}
	if p, err := exec.LookPath("consul"); err == nil {
		if v, err := consulVersion(ctx, p); err == nil && strings.HasPrefix(v, consulMinor) {
			return Program{p, v}, nil
		}
	}
	dir := o.CacheDir
	if dir == "" {
		var err error
		if dir, err = CacheDir(); err != nil {
			return Program{}, fmt.Errorf("consul: %w, or name a Consul in $%s", err, ConsulEnv)
		}
	}
	cached := filepath.Join(dir, "consul-"+ConsulVersion)
	if v, err := consulVersion(ctx, cached); err == nil {
		return Program{cached, v}, nil
	}
	if o.NoFetch {
		return Program{}, fmt.Errorf("consul: not in $%s, on PATH or in %s", ConsulEnv, dir)
	}
	return buildConsul(ctx, dir, cached, talker(o.Talk))
}

// consulVersion runs path version, which prints "Consul v1.22.7".
func consulVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	out, err := output(exec.CommandContext(ctx, path, "version"))
	if err != nil {
		return "", fmt.Errorf("%s version: %w", path, err)
	}
	line, _, _ := strings.Cut(out, "\n")
	v, ok := strings.CutPrefix(strings.TrimSpace(line), "Consul v")
	if !ok {
		return "", fmt.Errorf("%s version: not a Consul: it printed %.60q", path, line)
	}
	return v, nil
}

func buildConsul(ctx context.Context, dir, target string, say func(string, ...any)) (Program, error) {
	unlock, err := lockFile(ctx, filepath.Join(dir, "consul.lock"), func() {
		say("consul: waiting for another process that builds Consul %s", ConsulVersion)
	})
	if err != nil {
		return Program{}, fmt.Errorf("consul: %w", err)
	}
	defer unlock()
	if v, err := consulVersion(ctx, target); err == nil {
		return Program{target, v}, nil // the one we waited for has built it
	}
	root, err := output(exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/roostmesh/roost"))
	if err != nil {
		return Program{}, fmt.Errorf("consul: building it needs Go and Roost's source: %w: put Consul %sx on PATH or name it in $%s", err, consulMinor, ConsulEnv)
	}
	say("consul: not on this host; building Consul %s into %s: 4 to 8 minutes on two cores, once", ConsulVersion, dir)
	fresh := target + ".new"
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", fresh, consulPackage)
	cmd.Dir = filepath.Join(strings.TrimSpace(root), consulModule)
	if _, err := output(cmd); err != nil {
		return Program{}, fmt.Errorf("consul: go build in %s: %w", consulModule, err)
	}
	v, err := consulVersion(ctx, fresh)
	if err != nil {
		return Program{}, fmt.Errorf("consul: the built program does not run here: %w", err)
	}
	if err := os.Rename(fresh, target); err != nil {
		return Program{}, fmt.Errorf("consul: %w", err)
	}
	say("consul: Consul %s is at %s", v, target)
	return Program{target, v}, nil
}
