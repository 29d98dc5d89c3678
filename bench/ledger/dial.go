package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"
)

// dialWithin is the target of the 99th percentile.
const dialWithin = 50 * time.Millisecond

// dial measures from the PUT of a service to the first connection that Envoy
// accepts on its address, and to the first DNS answer that has it.
func dial(ctx context.Context, o options) (out []figure, err error) {
	r, err := newRoost(ctx, o, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.envoy(ctx); err != nil {
		return nil, err
	}
	warm, err := r.put(ctx, "acme", "warm") // waits for the Envoy
	if err != nil {
		return nil, err
	}
	if err := until(ctx, connect(warm)); err != nil {
		return nil, fmt.Errorf("envoy: %w: %s", err, r.said())
	}
	var dialled, resolved, both []time.Duration
	for i := range o.services {
		pause(ctx)
		began := time.Now()
		s, err := r.put(ctx, "acme", fmt.Sprintf("s%d", i))
		if err != nil {
			return nil, err
		}
		var wg sync.WaitGroup
		var errs [2]error
		took := make([]time.Duration, len(errs))
		for n, f := range []func(context.Context) error{connect(s), r.resolves(s)} {
			wg.Go(func() {
				errs[n] = until(ctx, f)
				took[n] = time.Since(began)
			})
		}
		wg.Wait()
		if err := errors.Join(errs[:]...); err != nil {
			return nil, err
		}
		dialled, resolved, both = append(dialled, took[0]), append(resolved, took[1]), append(both, max(took[0], took[1]))
	}
	name := fmt.Sprintf("PUT of a service (of %d) to ", o.services)
	out = append(quantiles(name+"a connection", dialled, 0), quantiles(name+"a DNS answer", resolved, 0)...)
	return append(out, quantiles(name+"both", both, dialWithin)...), nil
}

// connect opens one connection: in bind mode there is nobody on an address
// before Envoy has its listener.
func connect(s service) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(s.Address, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

func (r *roost) resolves(s service) func(context.Context) error {
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", r.dns)
	}}
	return func(ctx context.Context) error {
		addresses, err := resolver.LookupNetIP(ctx, "ip4", s.Domain+".")
		if err != nil {
			return err
		}
		if len(addresses) != 1 || addresses[0].Unmap().String() != s.Address {
			return fmt.Errorf("%s is %v, want %s", s.Domain, addresses, s.Address)
		}
		return nil
	}
}
