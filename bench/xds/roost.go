package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"time"

	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// roost is Roost's side: every change goes the daemon's way, from the catalog
// through lb.Build and envoy.Translate to Publish.
type roost struct {
	world   *world
	server  *xds.Server
	serving chan error
}

// admitted is enough for every proxy of a part at once: how fast Roost lets them in
// by itself is not what is measured.
const admitted = 100_000

func (r *roost) start(ctx context.Context, s size, l net.Listener) (answer, error) {
	r.world = newWorld(s)
	r.server = xds.New(xds.Config{Node: "h1", Admission: xds.Admission{PerSecond: admitted, Burst: admitted}})
	began := time.Now()
	r.server.Publish(r.world.build())
	took := time.Since(began)
	r.serving = make(chan error, 1)
	go func() { r.serving <- r.server.Run(ctx, xds.Listener{Listener: l}) }()
	clusters, _ := r.world.held()
	return answer{Built: took, Held: len(clusters)}, nil
}

func (r *roost) wait() (err error) {
	if r.serving != nil {
		err = <-r.serving
	}
	return err
}

func (r *roost) change(service int) (answer, error) {
	at := time.Now().UnixNano()
	r.world.move(service)
	r.server.Publish(r.world.build())
	return answer{Name: r.world.clusterName(service), At: at}, nil
}

// wish is a change of a load.
type wish struct {
	service int
	at      time.Time
}

// load hands changes in at a rate; what waits is built at once, as the daemon's
// reconciler does.
func (r *roost) load(rate int, d time.Duration) ([]landed, error) {
	wishes := make(chan wish, rate*int(d/time.Second+1))
	go offer(wishes, r.world.Services, rate, d)
	var out []landed
	for first := range wishes {
		batch := []wish{first}
		for len(wishes) > 0 {
			batch = append(batch, <-wishes)
		}
		services := make([]int, len(batch))
		for i, w := range batch {
			services[i] = w.service
		}
		r.world.move(services...)
		translation, change := r.world.build()
		r.server.Publish(translation, change)
		for _, w := range batch {
			key := r.world.key(w.service)
			proxy := r.world.proxy()
			proxy.Tenant, proxy.Service = key.Tenant, key.Service
			name := r.world.clusterName(w.service)
			res := translation.View(proxy).Get(envoy.Name{Type: envoy.Endpoint, Name: name})
			if res == nil {
				return nil, errors.New(name + " has no endpoints")
			}
			out = append(out, landed{Name: name, Version: res.Version, At: w.at.UnixNano()})
		}
	}
	return out, nil
}

// offer hands in changes of any services, evenly over the time.
func offer(wishes chan<- wish, services, rate int, d time.Duration) {
	defer close(wishes)
	const every = 2 * time.Millisecond
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	began, n := time.Now(), 0
	for now := range ticker.C {
		spent := min(now.Sub(began), d)
		for ; n < int(spent.Seconds()*float64(rate)); n++ {
			wishes <- wish{rand.IntN(services), time.Now()}
		}
		if spent == d {
			return
		}
	}
}
