package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// dimensions is a size of the part change.
type dimensions struct{ proxies, held int }

func (d dimensions) String() string { return fmt.Sprintf("%dx%d", d.proxies, d.held) }

// Above this many resources of a type in all proxies a round takes minutes.
const expensive = 500_000

// fewest is how many changes are made in any case.
const fewest = 5

func parseSizes(text string) (out []dimensions, err error) {
	most := 0
	for one := range strings.SplitSeq(text, ",") {
		var d dimensions
		if _, err := fmt.Sscanf(one, "%dx%d", &d.proxies, &d.held); err != nil || d.proxies < 1 || d.held < 1 {
			return nil, fmt.Errorf("-sizes: %q is no PROXIESxHELD", one)
		}
		out, most = append(out, d), max(most, d.proxies)
	}
	return out, openFiles(most)
}

// openFiles says whether so many connections fit; Go has raised the limit as far
// as it goes.
func openFiles(connections int) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if need := uint64(connections) + 100; l.Cur < need {
		return fmt.Errorf("%d open files are allowed, %d are needed: raise ulimit -n", l.Cur, need)
	}
	return nil
}

// metric is what a round measures.
type metric uint8

const (
	cold       metric = iota // ms until everything is everywhere
	coldBytes                // sent meanwhile
	memoryFor                // KB of resident memory for each proxy
	stacksFor                // KB of it that are stacks of goroutines
	cpuMedian                // ms of CPU for a change
	cpuMean                  // the same, every collection of garbage in it
	latencyP50               // ms from a change to a proxy
	latencyP99
	changeBytes    // sent for a change
	reconnect      // ms until a change has reached every proxy that came back
	reconnectBytes // sent meanwhile, beyond changeBytes
	metrics
)

// measured is a round of one side.
type measured [metrics]float64

// middle is the median of every metric.
func middle(rounds []measured) (out measured) {
	for m := range metrics {
		var list []float64
		for _, r := range rounds {
			list = append(list, r[m])
		}
		out[m] = median(list)
	}
	return out
}

// change is the part of that name.
func change(ctx context.Context, o options) ([]figure, error) {
	sizes, err := parseSizes(o.sizes)
	if err != nil {
		return nil, err
	}
	var out []figure
	flat := map[dimensions]float64{}
	for _, d := range sizes {
		rounds := map[string][]measured{}
		n := o.rounds
		if d.proxies*d.held > expensive {
			n = 1
		}
		for range n {
			for _, side := range []string{sideRoost, sidePeer} {
				m, err := o.round(ctx, side, d)
				if err != nil {
					return out, fmt.Errorf("%s: %w", d, err)
				}
				rounds[side] = append(rounds[side], m)
			}
		}
		roost, peer := middle(rounds[sideRoost]), middle(rounds[sidePeer])
		flat[d] = roost[cpuMedian]
		out = append(out, d.figures(roost, peer)...)
	}
	few, many := flat[dimensions{2000, 10}], flat[dimensions{2000, 1000}]
	if few > 0 && many > 0 {
		out = append(out, ratio("Roost's CPU for a change at 2000x1000, to 2000x10", "ms", many, few, 1.25))
	}
	return out, nil
}

// targets of the sizes that have any; 0 is none.
var (
	cpuTargets    = map[dimensions]float64{{2000, 1000}: 1.0 / 30, {200, 10_000}: 1.0 / 300}
	p99Targets    = map[dimensions]float64{{2000, 1000}: 1.0 / 10}
	memoryTargets = map[dimensions]float64{{2000, 1000}: 1.0 / 6, {200, 10_000}: 1.0 / 20}
)

const (
	reconnectTarget = 1.0 / 3
	coldTarget      = 1.1
	// resentTarget is of the bytes of a cold start, where a handshake is not
	// more than that by itself.
	resentTarget = 0.02
	resentFrom   = 100
)

func (d dimensions) figures(roost, peer measured) []figure {
	both := func(name, unit string, m metric, target float64) figure {
		return ratio(d.String()+" "+name, unit, roost[m], peer[m], target)
	}
	out := []figure{
		both("cold start", "ms", cold, coldTarget),
		both("cold start, sent", "MB", coldBytes, 0),
		both("memory for a proxy", "KB", memoryFor, memoryTargets[d]),
		both("memory for a proxy, stacks in it", "KB", stacksFor, 0),
		both("CPU for a change, median", "ms", cpuMedian, cpuTargets[d]),
		both("CPU for a change, mean", "ms", cpuMean, 0),
		both("change to a proxy, p50", "ms", latencyP50, 0),
		both("change to a proxy, p99", "ms", latencyP99, p99Targets[d]),
		both("sent for a change", "MB", changeBytes, 0),
		both("reconnect", "ms", reconnect, reconnectTarget),
		both("reconnect, sent", "MB", reconnectBytes, 0),
	}
	if d.held >= resentFrom {
		out = append(out, ratio(d.String()+" Roost's reconnect, sent, to its cold start", "MB", roost[reconnectBytes], roost[coldBytes], resentTarget))
	}
	return out
}

// progress tells somebody who waits what is measured now.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// round measures one side at one size.
func (o options) round(ctx context.Context, side string, d dimensions) (m measured, err error) {
	progress("%s %s", d, side)
	s := size{Services: d.held, Each: o.each, Tenants: 1, Hosts: 2000}
	c, err := startChild(ctx, side, s, d.proxies)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	defer runtime.GC() // what the proxies of this round held
	for _, step := range []struct {
		name string
		run  func(context.Context, size, *measured, options) error
	}{{"cold", c.coldStart}, {"change", c.changes}, {"reconnect", c.comeBack}} {
		limited, cancel := context.WithTimeout(ctx, stepTimeout)
		err = c.profiled(o, d.String()+"-"+side+"-"+step.name, func() error { return step.run(limited, s, &m, o) })
		cancel()
		if err != nil {
			return m, fmt.Errorf("%s: %s: %w", side, step.name, err)
		}
	}
	return m, nil
}

func (c *child) coldStart(ctx context.Context, _ size, m *measured, _ options) error {
	empty, err := c.ask(command{Do: "memory"})
	if err != nil {
		return err
	}
	if _, err := c.quiet(ctx); err != nil {
		return err
	}
	before := c.received.Load()
	took, err := c.fill(ctx)
	if err != nil {
		return err
	}
	_, err = c.quiet(ctx)
	if err != nil {
		return err
	}
	sent := c.received.Load() - before
	full, err := c.ask(command{Do: "memory"})
	m[cold] = milliseconds(took)
	m[coldBytes] = float64(sent) / 1e6
	m[memoryFor] = float64(full.RSS-empty.RSS) / 1e3 / float64(len(c.proxies))
	m[stacksFor] = float64(full.Stacks-empty.Stacks) / 1e3 / float64(len(c.proxies))
	return err
}

// changes moves endpoints one after the other.
func (c *child) changes(ctx context.Context, s size, m *measured, o options) error {
	var cpu, latency []time.Duration
	first, err := c.quiet(ctx)
	if err != nil {
		return err
	}
	began, before, received := time.Now(), first, c.received.Load()
	for i := 0; i < o.changes && (i < fewest || time.Since(began) < o.budget); i++ {
		service := i * 7919 % s.Services
		at, err := c.move(ctx, s, service, len(c.proxies))
		if err != nil {
			return err
		}
		now, err := c.quiet(ctx)
		if err != nil {
			return err
		}
		cpu = append(cpu, now.CPU-before.CPU)
		latency = append(latency, c.latencies(at)...)
		if err := c.agree(c.names.id([]byte(s.clusterName(service)))); err != nil {
			return err
		}
		before = now
	}
	m[cpuMedian] = milliseconds(median(cpu))
	m[cpuMean] = milliseconds(before.CPU-first.CPU) / float64(len(cpu))
	m[latencyP50], m[latencyP99] = milliseconds(median(latency)), milliseconds(quantile(latency, 0.99))
	m[changeBytes] = float64(c.received.Load()-received) / 1e6 / float64(len(cpu))
	return nil
}

// comeBack breaks every connection and waits until a change reaches all proxies
// that have come back.
func (c *child) comeBack(ctx context.Context, s size, m *measured, _ options) error {
	c.drop()
	if _, err := c.quiet(ctx); err != nil {
		return err
	}
	before, requests := c.received.Load(), c.requests()
	asked := c.expect(written, 0, len(c.proxies))
	began := time.Now()
	if err := c.open(requests); err != nil {
		return err
	}
	if err := c.wait(ctx, asked); err != nil {
		return err
	}
	if _, err := c.move(ctx, s, s.Services/2, len(c.proxies)); err != nil {
		return err
	}
	m[reconnect] = milliseconds(time.Since(began))
	_, err := c.quiet(ctx)
	m[reconnectBytes] = max(0, float64(c.received.Load()-before)/1e6-m[changeBytes])
	return err
}
