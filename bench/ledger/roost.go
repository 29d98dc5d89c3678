package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

const (
	startWithin = 30 * time.Second
	stopWithin  = 10 * time.Second
	// node is the host's name in every part.
	node = "h1"
)

// roost is a `roost run` with a directory, ports and a pool of its own.
type roost struct {
	program string
	dir     string
	run     *binaries.Process
	others  []*binaries.Process
	client  *http.Client

	admin, xds, dns string // addresses, from the ready line
}

// newRoost starts a Roost with more in its config than every part needs.
func newRoost(ctx context.Context, o options, more map[string]any) (*roost, error) {
	program, err := filepath.Abs(o.roost)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "roost-bench-")
	if err != nil {
		return nil, err
	}
	r := &roost{program: program, dir: dir, client: &http.Client{Timeout: startWithin, Transport: &http.Transport{MaxIdleConnsPerHost: o.clients}}}
	config := map[string]any{
		"node": node, "data_dir": "data", "admin": map[string]any{"address": "127.0.0.1:0"}, "xds": map[string]any{"address": "127.0.0.1:0"},
		"dns":       map[string]any{"addresses": []string{"127.0.0.1:0"}, "forward": []string{}},
		"addresses": map[string]any{"internal": "127.141.0.0/16"}, "log": map[string]any{"level": "warn"},
		"capture": map[string]any{"node": "bind", "sidecar": "bind"}, // no rules of the kernel
	}
	for key, value := range more {
		config[key] = value
	}
	data, err := json.Marshal(config)
	if err == nil {
		err = os.WriteFile(r.config(), data, 0o600)
	}
	if err == nil {
		err = r.start(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *roost) config() string { return filepath.Join(r.dir, "roost.yaml") }

// start runs `roost run` and returns after its ready line.
func (r *roost) start(ctx context.Context) error {
	ready := &readyLine{found: make(chan string, 1)}
	var err error
	if r.run, err = r.process(ready, "run", "--config", r.config()); err != nil {
		return fmt.Errorf("%w: make build first", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	select {
	case line := <-ready.found:
		for _, field := range strings.Fields(line) {
			key, value, _ := strings.Cut(field, "=")
			switch key {
			case "admin":
				r.admin = value
			case "xds":
				r.xds = value
			case "dns":
				r.dns = value
			}
		}
		return nil
	case <-r.run.Done():
		return fmt.Errorf("roost run has ended: %s: %s", r.run.Ending(), r.said())
	case <-ctx.Done():
		return fmt.Errorf("roost run is not ready: %s", r.said())
	}
}

// process starts a verb of roost; what it says on stderr goes into a file.
func (r *roost) process(stdout io.Writer, args ...string) (*binaries.Process, error) {
	log, err := os.OpenFile(r.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(r.program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = r.dir, stdout, log
	return binaries.Start(cmd)
}

func (r *roost) log() string { return filepath.Join(r.dir, "log") }

// said is the end of the log.
func (r *roost) said() string {
	const most = 2000
	data, err := os.ReadFile(r.log())
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-most):])
}

// envoy starts a real Envoy for every caller on this host.
func (r *roost) envoy(ctx context.Context) error {
	program, err := binaries.FindEnvoy(ctx, binaries.EnvoyOptions{Talk: os.Stderr})
	if err != nil {
		return err
	}
	p, err := r.process(io.Discard, "envoy", "--config", r.config(), "--xds", r.xds, "--node", node, "--envoy", program.Path)
	if err == nil {
		r.others = append(r.others, p)
	}
	return err
}

func (r *roost) close() error {
	for _, p := range r.others {
		p.Stop(stopWithin)
	}
	if r.run != nil {
		r.run.Stop(stopWithin)
	}
	r.client.CloseIdleConnections()
	return os.RemoveAll(r.dir)
}

// call makes one call of the admin API and decodes its answer into out.
func (r *roost) call(ctx context.Context, method, path, body string, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+r.admin+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := r.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return err
	case res.StatusCode >= http.StatusMultipleChoices:
		return fmt.Errorf("%s %s: %s: %s", method, path, res.Status, data)
	case out == nil:
		return nil
	}
	return json.Unmarshal(data, out)
}

type service struct {
	Domain  string `json:"domain"`
	Address string `json:"address"`
}

// port is the one port of every service.
const port = 18080

// put creates a service.
func (r *roost) put(ctx context.Context, tenant, name string) (s service, err error) {
	err = r.call(ctx, http.MethodPut, "/api/v1/services/"+tenant+"/"+name, fmt.Sprintf(`{"ports": [{"name": "http", "port": %d, "protocol": "http"}]}`, port), &s)
	return s, err
}

// rss is the memory of roost run in MB.
func (r *roost) rss() (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.run.Pid()))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(data), "VmRSS:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0, errors.New("no VmRSS in the process's status")
	}
	kb, err := strconv.ParseFloat(fields[0], 64)
	return kb / 1024, err
}

// readyLine is a stdout that waits for the ready line.
type readyLine struct {
	mu    sync.Mutex
	text  bytes.Buffer // guarded by mu
	found chan string
}

func (l *readyLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	for {
		line, err := l.text.ReadString('\n')
		if err != nil {
			l.text.WriteString(line) // not at its end yet
			return len(p), nil
		}
		if rest, ok := strings.CutPrefix(line, "roost ready "); ok {
			l.found <- rest
		}
	}
}

// pollEvery is short beside what is measured.
const pollEvery = 500 * time.Microsecond

// until asks f until there is no error.
func until(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	return binaries.Poll(ctx, pollEvery, func() error { return f(ctx) })
}

// pause lets one measurement's work end before the next.
func pause(ctx context.Context) {
	timer := time.NewTimer(settled)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

const settled = 30 * time.Millisecond
