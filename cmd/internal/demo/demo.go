// Package demo shows Roost's main job live on loopback, with a real Envoy and
// no privilege: services of two tenants keep their names and addresses while an
// instance moves, a service stops and starts, and the control plane is killed,
// all under load. It runs the same binary as an operator does, `roost run` and
// `roost envoy`, as children; in goes the path of that binary, out comes a
// Result and talk for people.
//
// Run owns every goroutine and child, and returns after all of them have ended.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/cmd/internal/host"
)

// Config says how the demo runs.
type Config struct {
	Program  string    // the roost binary
	Envoy    string    // its Envoy, already found
	Version  string    // of that Envoy
	Talk     io.Writer // told what happens
	Commands io.Writer // told how to look around; nil: not told
	Stay     bool      // go on after the steps
	Duration time.Duration
}

// Step is one thing that the demo shows.
type Step struct {
	Name          string  `json:"name"`
	OK            bool    `json:"ok"`
	AddressBefore string  `json:"address_before"`
	AddressAfter  string  `json:"address_after"`
	FirstAnswerMS float64 `json:"first_answer_ms"`
	Requests      int     `json:"requests"`
	Failed        int     `json:"failed"`

	why string
}

// Result is what the demo has found.
type Result struct {
	OK           bool   `json:"ok"`
	EnvoyVersion string `json:"envoy_version"`
	Steps        []Step `json:"steps"`
}

const (
	startTimeout  = 30 * time.Second
	changeTimeout = 10 * time.Second
	stopGrace     = 3 * time.Second
	// lead and tail are how long load runs before and after each change.
	lead     = 700 * time.Millisecond
	tail     = 1200 * time.Millisecond
	httpPort = 8080
	tcpPort  = 5432
)

// stage is the running demo.
type stage struct {
	config Config
	dir    string
	ports  ports
	pool   string

	run   *binaries.Process
	proxy []*binaries.Process
	apps  map[string]*app
	at    map[string]*app // instance of each service; absent: stopped
	load  *load
	front string // the shop's public address, on the gateway
}

// Run runs the steps once, and goes on until ctx ends or the duration is over
// where that was asked for. The error says what could not be started; a promise
// that did not hold is in the Result.
func Run(ctx context.Context, c Config) (result Result, err error) {
	dir, err := os.MkdirTemp("", "roost-demo-")
	if err != nil {
		return result, err
	}
	s := &stage{config: c, dir: dir, apps: map[string]*app{}, at: map[string]*app{}}
	defer func() { err = errors.Join(err, s.close()) }()
	result = Result{EnvoyVersion: c.Version}
	if err := s.open(ctx); err != nil {
		return result, err
	}
	s.commands()
	steps := []func(context.Context) Step{s.migrate, s.stop, s.start, s.restart}
	result.OK = s.isolated(ctx)
	for _, step := range steps {
		done := step(ctx)
		if ctx.Err() != nil {
			return result, ctx.Err()
		}
		s.report(done)
		result.Steps = append(result.Steps, done)
		result.OK = result.OK && done.OK
	}
	if c.Stay {
		s.stay(ctx)
	}
	return result, nil
}

func (s *stage) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.config.Talk, format+"\n", args...)
}

func (s *stage) report(d Step) {
	mark := "ok  "
	if !d.OK {
		mark = "FAIL"
	}
	s.say("%s %-22s address %s, first answer after %.0f ms, %d requests, %d failed%s", mark, d.Name, d.AddressAfter, d.FirstAnswerMS, d.Requests, d.Failed, d.why)
}

// open starts the apps, roost run, both Envoys and the load.
func (s *stage) open(ctx context.Context) error {
	var err error
	if s.ports, err = freePorts(); err != nil {
		return err
	}
	if s.pool, err = freePool(); err != nil {
		return err
	}
	for _, name := range []string{"shop-1", "shop-2"} {
		if s.apps[name], err = serveHTTP(name); err != nil {
			return err
		}
	}
	if s.apps["other-1"], err = serveHTTP("other-1"); err != nil {
		return err
	}
	if s.apps["db-1"], err = serveTCP("db-1"); err != nil {
		return err
	}
	s.at["acme/shop"], s.at["acme/db"], s.at["globex/shop"] = s.apps["shop-1"], s.apps["db-1"], s.apps["other-1"]
	if err := s.write(); err != nil {
		return err
	}
	if s.config.Stay && s.config.Commands != nil {
		_, _ = fmt.Fprintf(s.config.Commands, "export ROOST_ADDR=%s\n", s.ports.at("admin"))
	}
	s.say("starting roost, a node Envoy and a gateway Envoy (%s) on loopback, pool %s", s.config.Version, s.pool)
	if err := s.startRun(ctx); err != nil {
		return err
	}
	for _, flags := range [][]string{{"--node", "demo"}, {"--gateway", "edge/demo"}} {
		p, err := s.child("envoy", append([]string{"envoy", "--xds", s.ports.at("xds")}, flags...)...)
		if err != nil {
			return err
		}
		s.proxy = append(s.proxy, p)
	}
	address, err := s.lookup(ctx, "shop.acme.roost")
	if err != nil {
		return err
	}
	db, err := s.lookup(ctx, "db.acme.roost")
	if err != nil {
		return err
	}
	s.front = s.ports.at("web")
	s.load = newLoad(fmt.Sprintf("%s:%d", address, httpPort), s.front, fmt.Sprintf("%s:%d", db, tcpPort))
	if err := s.load.wait(ctx, startTimeout); err != nil {
		return fmt.Errorf("no answer through the Envoys: %w%s", err, s.logs())
	}
	s.load.start(ctx)
	s.say("shop.acme.roost is %s, shop.globex.roost is another service; load runs through the addresses and the gateway", address)
	return nil
}

// isolated shows that the other tenant's callers do not even see the service.
func (s *stage) isolated(ctx context.Context) bool {
	ours, err1 := s.resolve(ctx, "shop.acme.roost", "10.1.0.9")
	theirs, err2 := s.resolve(ctx, "shop.acme.roost", "10.2.0.9")
	ok := err1 == nil && err2 == nil && ours == "NOERROR" && theirs == "NXDOMAIN"
	mark := "ok  "
	if !ok {
		mark = "FAIL"
	}
	s.say("%s %-22s a caller of acme gets %s for shop.acme.roost, a caller of globex %s", mark, "isolation", ours, theirs)
	return ok
}

// change makes one step: load, then do, then until; all under load.
func (s *stage) change(ctx context.Context, name string, phase phase, do func() error, until func(seen) bool) Step {
	step := Step{Name: name}
	fail := func(err error) Step {
		step.OK, step.why = false, ": "+err.Error()
		return step
	}
	var err error
	if step.AddressBefore, err = s.lookup(ctx, "shop.acme.roost"); err != nil {
		return fail(err)
	}
	s.load.begin(phase)
	pause(ctx, lead)
	began := time.Now()
	if err := do(); err != nil {
		return fail(err)
	}
	at, err := s.load.until(ctx, began, changeTimeout, until)
	if err != nil {
		return fail(err)
	}
	step.FirstAnswerMS = float64(at.Sub(began).Microseconds()) / 1000
	pause(ctx, tail)
	if step.AddressAfter, err = s.lookup(ctx, "shop.acme.roost"); err != nil {
		return fail(err)
	}
	var bad string
	step.Requests, step.Failed, bad = s.load.end()
	if bad != "" {
		step.why = ": " + bad
	}
	step.OK = step.Failed == 0 && step.AddressBefore == step.AddressAfter && step.Requests > 0
	return step
}

func (s *stage) migrate(ctx context.Context) Step {
	return s.change(ctx, "migrate", phaseUp, func() error {
		s.at["acme/shop"] = s.apps["shop-2"]
		return s.write()
	}, func(o seen) bool { return o.body == "shop-2" })
}

func (s *stage) stop(ctx context.Context) Step {
	return s.change(ctx, "stop", phaseDown, func() error {
		delete(s.at, "acme/shop")
		return s.write()
	}, func(o seen) bool { return o.reason == "no_endpoint" })
}

func (s *stage) start(ctx context.Context) Step {
	return s.change(ctx, "start", phaseDown, func() error {
		s.at["acme/shop"] = s.apps["shop-1"]
		return s.write()
	}, func(o seen) bool { return o.body == "shop-1" })
}

// restart kills the control plane under load, starts it again, and shows that
// it goes on: the next migration arrives.
func (s *stage) restart(ctx context.Context) Step {
	return s.change(ctx, "control_plane_restart", phaseUp, func() error {
		if err := s.run.Signal(syscall.SIGKILL); err != nil {
			return err
		}
		<-s.run.Done()
		pause(ctx, lead)
		s.at["acme/shop"] = s.apps["shop-2"]
		if err := s.write(); err != nil {
			return err
		}
		return s.startRun(ctx)
	}, func(o seen) bool { return o.body == "shop-2" })
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func (s *stage) commands() {
	if !s.config.Stay || s.config.Commands == nil {
		return
	}
	shop, _, _ := strings.Cut(s.load.targets[0], ":")
	_, _ = fmt.Fprintf(s.config.Commands, `# in another terminal, with the line above:
#   curl -i http://%s:%d/
#   curl -i -H 'Host: shop.example.com' http://%s/
#   dig @127.0.0.1 -p %d shop.acme.roost
#   roost services
#   roost explain http://shop.acme.roost:%d/
#   roost events -f
`, shop, httpPort, s.front, s.ports["dns"], httpPort)
}

func (s *stage) stay(ctx context.Context) {
	if s.config.Duration > 0 {
		s.say("going on for %s; Ctrl-C ends it", s.config.Duration)
		pause(ctx, s.config.Duration)
		return
	}
	s.say("going on until Ctrl-C")
	<-ctx.Done()
}

// close ends everything that was started.
func (s *stage) close() error {
	if s.load != nil {
		s.load.stop()
	}
	for _, p := range s.proxy {
		p.Stop(stopGrace)
	}
	if s.run != nil {
		s.run.Stop(stopGrace)
	}
	for _, a := range s.apps {
		if a != nil {
			a.close()
		}
	}
	if pool, err := netip.ParsePrefix(s.pool); err == nil {
		// Put there by roost run where it may; a failure leaves rules for
		// addresses that nobody uses.
		_ = host.Remove(host.Rules{Pools: []netip.Prefix{pool}})
	}
	return os.RemoveAll(s.dir)
}

// logs are the last lines of the children, for an error message.
func (s *stage) logs() string {
	var out strings.Builder
	for _, name := range []string{"run", "envoy"} {
		data, err := os.ReadFile(filepath.Join(s.dir, name+".log"))
		if err != nil || len(data) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&out, "\n%s said:\n  %s", name, strings.Join(lines[max(0, len(lines)-8):], "\n  "))
	}
	return out.String()
}

// JSON is the result as one line.
func (r Result) JSON() []byte {
	data, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings, numbers and booleans always marshal
	}
	return append(data, '\n')
}
