package main

import (
	"context"
	"errors"
)

const (
	allocsTarget  = 8 // heap objects for each response
	allocsChanges = 20
	allocsHeld    = 100
)

// allocs is the part of that name: what a change allocates with proxies beyond
// what it does without any, for each of them.
func allocs(ctx context.Context, o options) ([]figure, error) {
	proxies := 2000
	if o.quick {
		proxies = 20
	}
	if err := openFiles(proxies); err != nil {
		return nil, err
	}
	s := size{Services: allocsHeld, Each: o.each, Tenants: 1, Hosts: 2000}
	objects := map[string]float64{}
	for _, side := range []string{sideRoost, sidePeer} {
		progress("allocs %s", side)
		n, err := allocsOf(ctx, side, s, proxies)
		if err != nil {
			return nil, err
		}
		objects[side] = n
	}
	f := ratio("heap objects for a response and its ACK", "", objects[sideRoost], objects[sidePeer], 0)
	f.Target, f.Met = allocsTarget, objects[sideRoost] <= allocsTarget
	return []figure{f}, nil
}

func allocsOf(ctx context.Context, side string, s size, proxies int) (n float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	c, err := startChild(ctx, side, s, proxies)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	nobody, err := c.allocated(ctx, func() error {
		for i := range allocsChanges {
			if _, err := c.ask(command{Do: "change", Service: i}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if _, err := c.fill(ctx); err != nil {
		return 0, err
	}
	everybody, err := c.allocated(ctx, func() error {
		for i := range allocsChanges {
			if _, err := c.move(ctx, s, i, proxies); err != nil {
				return err
			}
		}
		return nil
	})
	return (everybody - nobody) / float64(proxies*allocsChanges), err
}

// allocated is how many heap objects the server makes during f.
func (c *child) allocated(ctx context.Context, f func() error) (float64, error) {
	if _, err := c.quiet(ctx); err != nil {
		return 0, err
	}
	before, err := c.ask(command{Do: "memory"})
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	if _, err := c.quiet(ctx); err != nil {
		return 0, err
	}
	after, err := c.ask(command{Do: "memory"})
	return float64(after.Mallocs - before.Mallocs), err
}
