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
)

const (
	// GRPCIOVersion is the Python gRPC library that the tests are made for: C-core, not Go.
	GRPCIOVersion = "1.85.3"

	grpcioPackage = "grpcio==" + GRPCIOVersion
	grpcioAsk     = "import grpc; print(grpc.__version__)"
)

// GRPCIOOptions says where to look for grpcio.
type GRPCIOOptions struct {
	CacheDir string    // empty: CacheDir()
	Talk     io.Writer // told about a download; nil: silent
	NoFetch  bool      // only look: a missing grpcio is an error
}

// Python is a Python that can import grpcio.
type Python struct {
	Path    string // of python3
	Modules string // what PYTHONPATH has to name
}

// FindGRPCIO returns python3 with the grpcio of the cache; when it is not there it is installed into the cache with pip.
// Processes that look at the same time install once.
func FindGRPCIO(ctx context.Context, o GRPCIOOptions) (Python, error) {
	python, err := exec.LookPath("python3")
	if err != nil {
		return Python{}, errors.New("grpcio: needs python3, which is not on PATH: install python3 and pip")
	}
	dir := o.CacheDir
	if dir == "" {
		if dir, err = CacheDir(); err != nil {
			return Python{}, fmt.Errorf("grpcio: %w", err)
		}
	}
	p := Python{python, filepath.Join(dir, "grpcio-"+GRPCIOVersion)}
	if p.works(ctx) == nil {
		return p, nil
	}
	if o.NoFetch {
		return Python{}, fmt.Errorf("grpcio: %s is not in %s, or not for this Python", GRPCIOVersion, dir)
	}
	return p, p.install(ctx, dir, talker(o.Talk))
}

// works says whether this Python imports the grpcio of its modules.
func (p Python) works(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Path, "-c", grpcioAsk)
	cmd.Env = append(os.Environ(), "PYTHONPATH="+p.Modules)
	out, err := output(cmd)
	if err != nil {
		return fmt.Errorf("grpcio: %s does not import it: %w", p.Path, err)
	}
	if got := strings.TrimSpace(out); got != GRPCIOVersion {
		return fmt.Errorf("grpcio: %s imports %s, not %s", p.Path, got, GRPCIOVersion)
	}
	return nil
}

// install runs pip. The modules appear complete and checked, or not.
func (p Python) install(ctx context.Context, dir string, say func(string, ...any)) error {
	unlock, err := lockFile(ctx, filepath.Join(dir, "grpcio.lock"), func() {
		say("grpcio: waiting for another process that installs grpcio %s", GRPCIOVersion)
	})
	if err != nil {
		return fmt.Errorf("grpcio: %w", err)
	}
	defer unlock()
	if p.works(ctx) == nil {
		return nil // the one we waited for has installed it
	}
	tmp, err := os.MkdirTemp(dir, "grpcio-install-")
	if err != nil {
		return fmt.Errorf("grpcio: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	say("grpcio: not on this host; installing grpcio %s (about 7 MB) into %s", GRPCIOVersion, p.Modules)
	fresh := Python{p.Path, filepath.Join(tmp, "modules")}
	cmd := exec.CommandContext(ctx, p.Path, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--root-user-action", "ignore", "--only-binary", ":all:", "--target", fresh.Modules, grpcioPackage)
	if _, err := output(cmd); err != nil {
		if strings.Contains(err.Error(), "No module named pip") {
			return fmt.Errorf("grpcio: installing it needs pip, which %s does not have: install pip", p.Path)
		}
		return fmt.Errorf("grpcio: pip install %s: %w", grpcioPackage, err)
	}
	if err := fresh.works(ctx); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(p.Modules), os.Rename(fresh.Modules, p.Modules)); err != nil {
		return fmt.Errorf("grpcio: %w", err)
	}
	say("grpcio: grpcio %s is at %s", GRPCIOVersion, p.Modules)
	return nil
}

// GRPCIOForTest returns a Python with grpcio. A required one is installed when it is missing; otherwise the test is skipped.
func GRPCIOForTest(t TB) Python {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), findTimeout)
	defer cancel()
	p, err := FindGRPCIO(ctx, GRPCIOOptions{Talk: logWriter{t}, NoFetch: !Require("grpcio")})
	missing(t, "grpcio", err)
	return p
}
