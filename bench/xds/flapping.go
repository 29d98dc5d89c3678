package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/xds/envoy"
)

// The part flapping: so many services have an instance that turns over so often a
// second, and others change now and then.
const (
	flapServices  = 1000
	flapsASecond  = 10
	flapWarm      = 3 * time.Second // until what flaps is known to flap
	flapCores     = 1
	flapHalf      = 500 * time.Millisecond
	steadyEvery   = 50 * time.Millisecond
	steadyTarget  = loadTarget
	flapSource    = "flapping"
	pushesForHalf = 1
)

// flapping is the part of that name.
func flapping(ctx context.Context, o options) (out []figure, err error) {
	if err := openFiles(o.proxies); err != nil {
		return nil, err
	}
	progress("flapping, %d proxies", o.proxies)
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	s := size{Services: o.services, Each: pipelineEach, Tenants: o.tenants, Hosts: 2000}
	c, err := startChild(ctx, sideRoost, s, o.proxies)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	if _, err := c.fill(ctx); err != nil {
		return nil, err
	}
	// Its first seconds, in which nothing is known to flap, are not measured.
	if _, err := c.ask(command{Do: "flap", For: flapWarm}); err != nil {
		return nil, err
	}
	before, err := c.ask(command{Do: "usage"})
	if err != nil {
		return nil, err
	}
	c.records.Store(true)
	done, err := c.ask(command{Do: "flap", For: o.load})
	if err != nil {
		return nil, err
	}
	after, err := c.ask(command{Do: "usage"})
	if err != nil {
		return nil, err
	}
	// The last steady changes are on their way.
	if _, err := c.ask(command{Do: "flap", For: flapHalf}); err != nil {
		return nil, err
	}
	c.drop()
	waits, lost := c.landed(done.Landed)
	if lost > 0 {
		err = fmt.Errorf("%d of %d steady changes did not reach a proxy that sees them", lost, lost+len(waits))
	}
	name := fmt.Sprintf("%d instances flap %d times a second: ", min(flapServices, o.services/2), flapsASecond)
	return []figure{
		alone(name+"cores", "", (after.CPU-before.CPU).Seconds()/o.load.Seconds(), flapCores),
		alone(name+"versions of a cluster in half a second, at most", "", c.mostFlaps(s)/(o.load.Seconds()/flapHalf.Seconds()+1), pushesForHalf),
		alone(name+"steady change to a proxy, p99", "ms", milliseconds(quantile(waits, 0.99)), steadyTarget),
	}, err
}

// mostFlaps is how many versions of a flapping cluster the proxy got that got most.
func (c *child) mostFlaps(s size) (most float64) {
	flaps := map[uint32]bool{}
	for i := range min(flapServices, s.Services/2) {
		flaps[c.names.id([]byte(s.clusterName(i)))] = true
	}
	for _, p := range c.proxies {
		got := map[uint32]float64{}
		for _, a := range p.arrivals {
			if flaps[a.name] {
				got[a.name]++
				most = max(most, got[a.name])
			}
		}
	}
	return most
}

// flap has instances turn over and steady ones move for a time, through
// discovery's Aggregator, and builds as the daemon does. What flaps goes on until
// the server ends.
func (r *roost) flap(d time.Duration) (out []landed, err error) {
	if r.flaps == nil {
		r.flaps = &flapper{world: r.world, steady: make(chan landed, 1<<12), ended: make(chan error, 1)}
		r.flaps.agg = discovery.NewAggregator(discovery.Config{Sources: []discovery.Source{r.flaps}})
		go func() { r.flaps.ended <- r.flaps.agg.Run(r.ctx) }()
	}
	f, over := r.flaps, time.After(d)
	waiting := map[string][]landed{}
	for {
		select {
		case <-over:
			return out, nil
		case l := <-f.steady:
			waiting[l.Name] = append(waiting[l.Name], l)
		case <-f.agg.Changed():
			if c := f.agg.Catalog(); c.Groups.Len() == r.world.Services {
				r.world.input.Catalog = c
				translation, change := r.world.build()
				r.server.Publish(translation, change)
				out = append(out, r.landedNow(translation, waiting)...)
			}
		}
	}
}

// landedNow gives the steady changes that a World has their version.
func (r *roost) landedNow(t *envoy.Translation, waiting map[string][]landed) (out []landed) {
	for name, list := range waiting {
		proxy := r.world.proxy()
		key := r.world.key(list[0].service)
		proxy.Tenant, proxy.Service = key.Tenant, key.Service
		res := t.View(proxy).Get(envoy.Name{Type: envoy.Endpoint, Name: name})
		if at := r.world.snapshot.Services.Get(key).Endpoints[0].At[0].Addr(); res == nil || at != list[len(list)-1].moved {
			continue // not in this one
		}
		for _, l := range list {
			l.Version = res.Version
			out = append(out, l)
		}
		delete(waiting, name)
	}
	return out
}

// flapper is a source of which some instances flap and others move.
type flapper struct {
	world  *world
	agg    *discovery.Aggregator
	steady chan landed // what has moved, before it is told
	ended  chan error
	moves  int
}

// Name implements discovery.Source.
func (f *flapper) Name() string { return flapSource }

// Run implements discovery.Source.
func (f *flapper) Run(ctx context.Context, emit func(discovery.Update)) error {
	w := f.world
	known := make([][]discovery.Instance, w.Services) // a source's own work is not measured
	for i := range known {
		for n := range w.Each {
			known[i] = append(known[i], w.instance(i, n))
		}
	}
	tell := func(i int, edit func(*discovery.Instance)) {
		u := discovery.Update{Source: flapSource, Scope: w.clusterName(i), Instances: slices.Clone(known[i])}
		if edit != nil {
			edit(&u.Instances[0])
		}
		emit(u)
	}
	for i := range w.Services {
		tell(i, nil)
	}
	const steps = 10 // of a turn, so that not all flap at the same moment
	ticker := time.NewTicker(time.Second / flapsASecond / steps)
	defer ticker.Stop()
	flapping, next := min(flapServices, w.Services/2), time.Now()
	for step := 0; ; step++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-ticker.C:
			for i := step % steps; i < flapping; i += steps {
				tell(i, func(x *discovery.Instance) {
					if (step/steps)%2 == 0 {
						x.Health = discovery.Critical
					}
				})
			}
			if now.Before(next) {
				continue
			}
			next = now.Add(steadyEvery)
			f.moves++
			service := flapping + f.moves%(w.Services-flapping)
			at := moved(f.moves)
			f.steady <- landed{Name: w.clusterName(service), At: time.Now().UnixNano(), service: service, moved: at}
			tell(service, func(x *discovery.Instance) { x.Address = at })
		}
	}
}
