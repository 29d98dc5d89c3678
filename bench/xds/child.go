package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// The servers.
const (
	sideRoost = "roost"
	sidePeer  = "peer"
)

// child is a server in a process of its own, and its proxies.
type child struct {
	*fleet
	side  string
	start answer
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *json.Decoder
}

// startChild starts a server; its proxies are made, not connected.
func startChild(ctx context.Context, side string, s size, proxies int) (c *child, err error) {
	if c, err = startAt(ctx, side, s, ""); err != nil {
		return nil, err
	}
	c.fleet = newFleet(c.start.Address, c.start.Held, proxies, s.Tenants)
	return c, nil
}

// startAt starts a server at an address, or where there is room; it has no proxies.
func startAt(ctx context.Context, side string, s size, address string) (c *child, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c = &child{side: side, cmd: exec.CommandContext(ctx, self, "-serve", side)}
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.out = json.NewDecoder(out)
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	if c.start, err = c.ask(command{Do: "start", size: s, At: address}); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	if want := s.Services / s.Tenants; c.start.Held != want {
		return nil, errors.Join(fmt.Errorf("a proxy has %d clusters, want %d", c.start.Held, want), c.stop())
	}
	return c, nil
}

// kill ends the server without a word. Its proxies have lost their connections
// when it returns.
func (c *child) kill() error {
	for _, p := range c.proxies {
		p.closing.Store(true)
	}
	if err := c.cmd.Process.Kill(); err != nil {
		return err
	}
	for _, p := range c.proxies {
		<-p.done
		p.conn = nil
	}
	_ = c.in.Close()
	_ = c.cmd.Wait() // it was killed
	return nil
}

func (c *child) ask(q command) (a answer, err error) {
	if err := json.NewEncoder(c.in).Encode(q); err != nil {
		return a, fmt.Errorf("%s: %s: %w", c.side, q.Do, err)
	}
	if err := c.out.Decode(&a); err != nil {
		return a, fmt.Errorf("%s: %s: %w", c.side, q.Do, err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("%s: %s: %s", c.side, q.Do, a.Error)
	}
	return a, nil
}

// stop ends the proxies, then the server.
func (c *child) stop() error {
	if c.fleet != nil {
		c.drop()
	}
	return errors.Join(c.in.Close(), c.cmd.Wait())
}

const (
	quietEvery = 25 * time.Millisecond
	quietTimes = 3
	quietCPU   = time.Millisecond
)

// quiet waits until the server has nothing to do, and says what it has used.
func (c *child) quiet(ctx context.Context) (answer, error) {
	ticker := time.NewTicker(quietEvery)
	defer ticker.Stop()
	last, err := c.ask(command{Do: "usage"})
	for n := 0; n < quietTimes && err == nil; {
		select {
		case <-ctx.Done():
			return last, context.Cause(ctx)
		case <-ticker.C:
		}
		var now answer
		now, err = c.ask(command{Do: "usage"})
		if n++; now.CPU-last.CPU > quietCPU {
			n = 0
		}
		last = now
	}
	return last, err
}

// fill connects every proxy and waits until they have everything.
func (c *child) fill(ctx context.Context) (time.Duration, error) {
	r := c.expect(filled, 0, len(c.proxies))
	requests := c.requests()
	began := time.Now()
	if err := c.open(requests); err != nil {
		return 0, err
	}
	if err := c.wait(ctx, r); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}

// move makes one change and waits until every proxy that sees it has it.
func (c *child) move(ctx context.Context, s size, service, proxies int) (at int64, err error) {
	name := c.names.id([]byte(s.clusterName(service)))
	r := c.expect(changed, name, proxies)
	a, err := c.ask(command{Do: "change", Service: service})
	if err != nil {
		return 0, err
	}
	return a.At, c.wait(ctx, r)
}

func quantile[T int64 | float64 | time.Duration](list []T, q float64) T {
	if len(list) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func median[T int64 | float64 | time.Duration](list []T) T { return quantile(list, 0.5) }

// profiled runs f, and writes what the server's CPU does meanwhile and what its
// memory is for afterwards, where that is asked for.
func (c *child) profiled(o options, name string, f func() error) error {
	if o.profiles == "" {
		return f()
	}
	file := filepath.Join(o.profiles, name)
	if _, err := c.ask(command{Do: "profile", File: file + ".cpu"}); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if _, err := c.ask(command{Do: "profile"}); err != nil {
		return err
	}
	_, err := c.ask(command{Do: "heap", File: file + ".heap"})
	return err
}
