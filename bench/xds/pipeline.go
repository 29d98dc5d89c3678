package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Targets of the part pipeline, for its default sizes.
const (
	buildTarget   = 3000 // ms
	moveTarget    = 2    // ms of CPU
	residentLimit = 500  // MB
	loadTarget    = 250  // ms
	pipelineMoves = 200
	pipelineEach  = 10
)

// pipeline is the part of that name.
func pipeline(ctx context.Context, o options) (out []figure, err error) {
	if err := openFiles(o.proxies); err != nil {
		return nil, err
	}
	progress("pipeline, one proxy")
	s := size{Services: o.services, Each: pipelineEach, Tenants: o.tenants, Hosts: 2000}
	built, cpu, err := o.onePath(ctx, s)
	if err != nil {
		return nil, err
	}
	out = append(out,
		alone("pipeline: first build until it is published", "ms", milliseconds(built), buildTarget),
		alone("pipeline: CPU from a catalog to one proxy's ACK", "ms", milliseconds(cpu), moveTarget))
	progress("pipeline, %d proxies", o.proxies)
	more, err := o.underLoad(ctx, s)
	return append(out, more...), err
}

// onePath is what the first build takes, and a change's CPU with one proxy.
func (o options) onePath(ctx context.Context, s size) (built, cpu time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	c, err := startChild(ctx, sideRoost, s, 1)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	if _, err := c.fill(ctx); err != nil {
		return 0, 0, err
	}
	before, err := c.quiet(ctx)
	if err != nil {
		return 0, 0, err
	}
	err = c.profiled(o, "pipeline-roost-change", func() error {
		for i := range pipelineMoves {
			if _, err := c.move(ctx, s, i*s.Tenants%s.Services, 1); err != nil { // one of its tenant's
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	after, err := c.quiet(ctx)
	return c.start.Built, (after.CPU - before.CPU) / pipelineMoves, err
}

// underLoad connects every tenant's proxies and moves endpoints at a rate.
func (o options) underLoad(ctx context.Context, s size) (out []figure, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	c, err := startChild(ctx, sideRoost, s, o.proxies)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	took, err := c.fill(ctx)
	if err != nil {
		return nil, err
	}
	before, err := c.quiet(ctx)
	if err != nil {
		return nil, err
	}
	full, err := c.ask(command{Do: "memory"})
	if err != nil {
		return nil, err
	}
	c.records.Store(true)
	var done answer
	err = c.profiled(o, "pipeline-roost-load", func() (err error) {
		done, err = c.ask(command{Do: "load", Rate: o.rate, For: o.load})
		return err
	})
	if err != nil {
		return nil, err
	}
	after, err := c.quiet(ctx)
	if err != nil {
		return nil, err
	}
	c.drop()
	waits, lost := c.landed(done.Landed)
	if lost > 0 {
		err = fmt.Errorf("%d of %d changes did not reach a proxy that sees them", lost, lost+len(waits))
	}
	name := fmt.Sprintf("pipeline: %d changes/s, ", o.rate)
	return []figure{
		alone("pipeline: cold start of all proxies", "ms", milliseconds(took), 0),
		alone("pipeline: resident memory with all proxies", "MB", float64(full.RSS)/1e6, residentLimit),
		alone(name+"change to a proxy, p50", "ms", milliseconds(median(waits)), 0),
		alone(name+"change to a proxy, p99", "ms", milliseconds(quantile(waits, 0.99)), loadTarget),
		alone(name+"CPU for a change", "ms", milliseconds(after.CPU-before.CPU)/float64(len(done.Landed)), 0),
	}, err
}

// landed finds, for every change and every proxy that sees it, how long the
// version with it, or one after it, took to come. It counts those that did not.
func (c *child) landed(list []landed) (waits []time.Duration, lost int) {
	type key struct{ name, version uint32 }
	place := map[key]int{} // of a version among those of its name
	places := map[uint32]int{}
	changes := map[uint32][]landed{} // by name
	for _, l := range list {
		k := key{c.names.id([]byte(l.Name)), c.versions.id([]byte(l.Version))}
		if _, ok := place[k]; !ok {
			places[k.name]++
			place[k] = places[k.name]
		}
		changes[k.name] = append(changes[k.name], l)
	}
	for _, p := range c.proxies {
		got := map[uint32][]arrival{}
		for _, a := range p.arrivals {
			got[a.name] = append(got[a.name], a)
		}
		for name, list := range changes {
			if int(name) >= len(p.held[endpoints]) || p.held[endpoints][name] == 0 {
				continue // another tenant's
			}
			for _, l := range list {
				wanted := place[key{name, c.versions.id([]byte(l.Version))}]
				rest := got[name]
				for len(rest) > 0 && place[key{name, rest[0].version}] < wanted {
					rest = rest[1:]
				}
				if got[name] = rest; len(rest) == 0 {
					lost++
					continue
				}
				waits = append(waits, time.Duration(rest[0].at-l.At))
			}
		}
	}
	return waits, lost
}
