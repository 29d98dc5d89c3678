// Command runtests fetches what the tests need, runs `go test` with the
// arguments it is given, shows what failed or was skipped, and says at the end
// how many tests passed. It exits 1 when one failed, or when none ran.
//
//	go run ./cmd/internal/runtests [go test arguments]
//
// Needs are read from $ROOST_REQUIRE: envoy, consul, grpcio, netns.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"

	"github.com/roostmesh/roost/cmd/binaries"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	ok, err := false, fetch(ctx)
	if err == nil {
		ok, err = run(ctx, os.Args[1:], os.Stdout)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtests:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// fetch brings the required programs into the cache before any test waits for
// them.
func fetch(ctx context.Context) error {
	if binaries.Require("envoy") {
		if _, err := binaries.FindEnvoy(ctx, binaries.EnvoyOptions{Talk: os.Stderr}); err != nil {
			return err
		}
	}
	if binaries.Require("consul") {
		if _, err := binaries.FindConsul(ctx, binaries.ConsulOptions{Talk: os.Stderr}); err != nil {
			return err
		}
	}
	if binaries.Require("grpcio") {
		if _, err := binaries.FindGRPCIO(ctx, binaries.GRPCIOOptions{Talk: os.Stderr}); err != nil {
			return err
		}
	}
	if binaries.Require("netns") {
		return debian(ctx)
	}
	return nil
}

// tools are the programs that the tests in network namespaces run, and the
// Debian packages that have them.
var tools = map[string]string{"ip": "iproute2", "iptables": "iptables", "nft": "nftables", "sysctl": "procps", "unshare": "util-linux"}

func debian(ctx context.Context) error {
	var packages []string
	for tool, pkg := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			packages = append(packages, pkg)
		}
	}
	if len(packages) == 0 {
		return nil
	}
	slices.Sort(packages)
	if _, err := exec.LookPath("apt-get"); err != nil || os.Geteuid() != 0 {
		return fmt.Errorf("the tests in network namespaces need %s: install them", strings.Join(packages, ", "))
	}
	fmt.Fprintln(os.Stderr, "runtests: installing", strings.Join(packages, ", "))
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-y", "-q", "--no-install-recommends"}, packages...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w\n%s", args[0], err, out)
		}
	}
	return nil
}

// event is one line of `go test -json`.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type counts struct{ passed, failed, skipped int }

// run runs go test and reports; ok says that some test ran and none failed.
func run(ctx context.Context, args []string, out io.Writer) (ok bool, err error) {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	c, err := report(pipe, out)
	waited := cmd.Wait()
	if err != nil {
		return false, err
	}
	var ended *exec.ExitError
	if waited != nil && !errors.As(waited, &ended) {
		return false, waited
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", c.passed, c.failed, c.skipped)
	return waited == nil && c.failed == 0 && c.passed > 0, nil
}

// report shows failures with their output, skips with their reason, and a line
// for each package. A test counts once, its subtests as tests of their own.
func report(in io.Reader, out io.Writer) (counts, error) {
	var c counts
	output := map[string][]string{}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(out, lines.Text()) // not an event: what a build says
			continue
		}
		id := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			output[id] = append(output[id], e.Output)
		case "pass", "fail", "skip":
			c.take(e, output[id], out)
			delete(output, id)
		}
	}
	return c, lines.Err()
}

func (c *counts) take(e event, said []string, out io.Writer) {
	if e.Test == "" {
		if e.Action == "fail" {
			fmt.Fprint(out, strings.Join(said, ""))
			c.failed++ // a package that fails without a test failing: a build, a leak, a crash
		}
		fmt.Fprintf(out, "%-5s %-60s %6.1fs\n", e.Action, e.Package, e.Elapsed)
		return
	}
	switch e.Action {
	case "pass":
		c.passed++
	case "fail":
		c.failed++
		fmt.Fprintf(out, "--- FAIL: %s %s\n%s", e.Package, e.Test, strings.Join(said, ""))
	case "skip":
		c.skipped++
		fmt.Fprintf(out, "--- SKIP: %s %s\n%s", e.Package, e.Test, strings.Join(said, ""))
	}
}
