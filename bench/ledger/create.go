package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	createWithin  = time.Minute
	restartWithin = 2 * time.Second
	mostMemory    = 250 // MB
	tenants       = 10
)

// create measures the creation of many services by many clients, the memory that
// they take, and a restart with them. No proxy is connected.
func create(ctx context.Context, o options) (out []figure, err error) {
	r, err := newRoost(ctx, o, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	began := time.Now()
	group, creating := errgroup.WithContext(ctx)
	group.SetLimit(o.clients)
	for i := range o.many {
		group.Go(func() error {
			_, err := r.put(creating, fmt.Sprintf("t%d", i%tenants), fmt.Sprintf("s%d", i))
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	out = append(out, newFigure(fmt.Sprintf("%d services created by %d clients", o.many, o.clients), time.Since(began).Seconds(), "s", createWithin.Seconds()))
	created, err := r.rss()
	if err != nil {
		return nil, err
	}
	r.run.Stop(stopWithin)
	began = time.Now()
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	line := time.Since(began)
	if err := until(ctx, func(ctx context.Context) error { return r.call(ctx, http.MethodGet, "/readyz", "", nil) }); err != nil {
		return nil, err
	}
	ready := time.Since(began)
	last, err := r.put(ctx, "t0", "s0")
	if err == nil {
		err = r.resolves(last)(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("after the restart: %w", err)
	}
	again, err := r.rss()
	return append(out,
		newFigure("restart with them to the ready line", line.Seconds(), "s", 0),
		newFigure("restart with them to /readyz", ready.Seconds(), "s", restartWithin.Seconds()),
		newFigure("memory (RSS) after they were created", created, "MB", mostMemory),
		newFigure("memory (RSS) after the restart", again, "MB", mostMemory),
	), err
}
