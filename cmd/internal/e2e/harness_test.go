package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

const (
	patience  = 20 * time.Second
	pollEvery = 10 * time.Millisecond
)

var (
	roostOnce sync.Once
	roostPath string
	errRoost  error
	roostDir  string
)

// program builds the roost binary once.
func program(t *testing.T) string {
	t.Helper()
	roostOnce.Do(func() {
		if roostDir, errRoost = os.MkdirTemp("", "roost-e2e-"); errRoost != nil {
			return
		}
		roostPath = filepath.Join(roostDir, "roost")
		out, err := exec.Command("go", "build", "-o", roostPath, "github.com/roostmesh/roost/cmd/roost").CombinedOutput()
		if err != nil {
			errRoost = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if errRoost != nil {
		t.Fatal(errRoost)
	}
	return roostPath
}

// until polls f until it returns nil.
func until(t *testing.T, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		case <-tick.C:
		}
	}
}

// host is where processes of a test run: this network namespace, or another.
type host struct {
	t  *testing.T
	ns string // "" is this one
}

// command is a command on this host.
func (h host) command(name string, args ...string) *exec.Cmd {
	if h.ns == "" {
		return exec.Command(name, args...)
	}
	return exec.Command("ip", append([]string{"netns", "exec", h.ns, name}, args...)...)
}

// sh runs a command to its end and fails the test with what it said.
func (h host) sh(name string, args ...string) string {
	h.t.Helper()
	out, err := h.command(name, args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s: %s %s: %v\n%s", h.ns, name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// start starts a process that ends with the test; its output is logged when the
// test fails.
func (h host) start(log *binaries.Log, dir, name string, args ...string) *binaries.Process {
	h.t.Helper()
	cmd := h.command(name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.Env = append(os.Environ(), "ROOST_CONFIG=", "ROOST_ADDR=")
	p, err := binaries.Start(cmd)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		p.Stop(5 * time.Second)
		if h.t.Failed() {
			h.t.Logf("%s %s said:\n%s", filepath.Base(name), strings.Join(args, " "), log.String())
		}
	})
	return p
}

// roost is a running `roost run` on a host.
type roost struct {
	host
	dir    string
	config string
	args   string // admin address for the command line
	run    *binaries.Process
	log    *binaries.Log
}

// newRoost writes a config; admin, xds and data_dir are added to it.
func newRoost(h host, yaml string) *roost {
	h.t.Helper()
	dir := h.t.TempDir()
	r := &roost{host: h, dir: dir, config: filepath.Join(dir, "roost.yaml")}
	r.write(yaml)
	if err := os.Mkdir(filepath.Join(dir, "services.d"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	return r
}

func (r *roost) write(yaml string) {
	r.t.Helper()
	r.file("roost.yaml", "data_dir: data\n"+yaml)
}

// file replaces a file in one step.
func (r *roost) file(name, content string) {
	r.t.Helper()
	next := filepath.Join(r.dir, ".next")
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(r.dir, name)); err != nil {
		r.t.Fatal(err)
	}
}

// serve starts `roost run` and waits for its ready line.
func (r *roost) serve() *roost {
	r.t.Helper()
	r.t.Cleanup(func() { // the rules stay when roost ends; those of a test go
		cmd := r.command(program(r.t), "capture", "remove", "--config", r.config)
		cmd.Dir = r.dir
		_ = cmd.Run() // without the right there are none
	})
	r.log = &binaries.Log{}
	r.run = r.start(r.log, r.dir, program(r.t), "run", "--config", r.config)
	until(r.t, "ready line", func() error {
		select {
		case <-r.run.Done():
			r.t.Fatalf("roost run has ended: %s", r.run.Ending())
		default:
		}
		for line := range strings.SplitSeq(r.log.String(), "\n") {
			if rest, ok := strings.CutPrefix(line, "roost ready admin="); ok {
				r.args, _, _ = strings.Cut(rest, " ")
				return nil
			}
		}
		return errors.New("not there")
	})
	return r
}

// envoy starts `roost envoy` on the same host.
func (r *roost) envoy(flags ...string) *binaries.Process {
	r.t.Helper()
	binaries.EnvoyForTest(r.t)
	return r.start(&binaries.Log{}, r.dir, program(r.t), append([]string{"envoy", "--config", r.config}, flags...)...)
}

// cli runs a verb and returns its exit code and output.
func (r *roost) cli(args ...string) (code int, stdout, stderr string) {
	r.t.Helper()
	cmd := r.command(program(r.t), append([]string{"--address", r.args}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = r.dir, &out, &errOut
	err := cmd.Run()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		r.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

// json runs a verb with -o json and decodes what it prints.
func (r *roost) json(v any, args ...string) {
	r.t.Helper()
	code, out, errOut := r.cli(append(args, "-o", "json")...)
	if code != 0 {
		r.t.Fatalf("roost %s: exit %d: %s", strings.Join(args, " "), code, errOut)
	}
	if err := json.Unmarshal([]byte(out), v); err != nil {
		r.t.Fatalf("roost %s: %v in %s", strings.Join(args, " "), err, out)
	}
}

type serviceJSON struct {
	Tenant, Name, Domain, Address string
	DedicatedIP                   *string `json:"dedicated_ip"`
	Instances                     struct{ Total, Healthy int }
}

// address is a service's address.
func (r *roost) address(service string) string {
	r.t.Helper()
	var s serviceJSON
	r.json(&s, "service", "show", service)
	if s.Address == "" {
		r.t.Fatalf("%s has no address", service)
	}
	return s.Address
}

type problemJSON struct{ Code, Severity, Object, Place, Message, Fix string }

func (r *roost) problems() []problemJSON {
	r.t.Helper()
	var list struct{ Items []problemJSON }
	r.json(&list, "problems")
	return list.Items
}

// problem waits for a problem of this code.
func (r *roost) problem(code string) problemJSON {
	r.t.Helper()
	var found problemJSON
	until(r.t, "problem "+code, func() error {
		list := r.problems()
		for _, p := range list {
			if p.Code == code {
				found = p
				return nil
			}
		}
		return fmt.Errorf("there are %v", list)
	})
	return found
}

// call makes one request from this host: "http URL" gives "STATUS REASON BODY",
// "tcp ADDRESS" what the peer said before it closed or a second was over.
func (h host) call(kind, target string) string {
	h.t.Helper()
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := h.command(self)
	cmd.Env = append(os.Environ(), actEnv+"=call "+kind+" "+target)
	out, err := cmd.CombinedOutput()
	if err != nil {
		h.t.Fatalf("call %s %s: %v: %s", kind, target, err, out)
	}
	return strings.TrimSpace(string(out))
}

// app serves a name on this host and returns when it listens.
func (h host) app(kind, name, address string) *binaries.Process {
	h.t.Helper()
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := h.command(self)
	log := &binaries.Log{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), actEnv+"=serve "+kind+" "+name+" "+address)
	p, err := binaries.Start(cmd)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { p.Stop(time.Second) })
	until(h.t, name+" listens", func() error {
		if !strings.Contains(log.String(), "listening") {
			return fmt.Errorf("it said %q", log.String())
		}
		return nil
	})
	return p
}

// decode makes a request and reads its JSON answer into v, which may be nil; an
// answer that is no success is an error.
func decode(c *http.Client, req *http.Request, v any) error {
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode >= http.StatusMultipleChoices {
		return errors.New(res.Status)
	}
	if v == nil {
		return nil
	}
	return json.NewDecoder(res.Body).Decode(v)
}
