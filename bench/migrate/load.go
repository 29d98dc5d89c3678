package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	moveEvery = 500 * time.Millisecond
	killEvery = time.Second
	kills     = 10
)

// underLoad sends requests at a steady rate while instances move by plan, and
// then while they are killed outright, and says how many failed.
func underLoad(ctx context.Context, o options, s *side) error {
	fmt.Printf("\n%-28s %9s %9s %9s\n", "under load", "requests", "failed", "events")
	moves := 0
	sent, failed, first := load(ctx, o.rate, s, func(done func(sent int64) bool) error {
		for !done(int64(o.requests)) {
			if err := s.move(ctx, false); err != nil {
				return err
			}
			moves++
			pause(ctx, moveEvery)
		}
		return nil
	})
	if first != nil && failed == 0 {
		return first
	}
	fmt.Printf("%-28s %9d %9d %9d\n", "planned moves", sent, failed, moves)
	if first != nil {
		fmt.Println("  first failure:", first)
	}
	killed := 0
	sent, failed, first = load(ctx, o.rate, s, func(func(int64) bool) error {
		for range kills {
			a, err := s.start()
			if err != nil {
				return err
			}
			if err := s.register(a); err != nil {
				return err
			}
			pause(ctx, killEvery/2)
			dead, err := s.kill()
			if err != nil {
				return err
			}
			killed++
			pause(ctx, killEvery/2)
			if err := s.b.client.Agent().ServiceDeregister(dead.name); err != nil {
				return err
			}
		}
		return nil
	})
	fmt.Printf("%-28s %9d %9d %9d\n", "instances killed outright", sent, failed, killed)
	if first != nil {
		fmt.Println("  first failure:", first)
	}
	return nil
}

// load sends GETs at rate while during runs.
func load(ctx context.Context, rate int, s *side, during func(done func(int64) bool) error) (sent, failed int64, first error) {
	const workers = 16
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var counted, bad atomic.Int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			tick := time.NewTicker(time.Second * workers / time.Duration(rate))
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				_, err := s.ask(ctx)
				if ctx.Err() != nil {
					return
				}
				counted.Add(1)
				if err != nil {
					bad.Add(1)
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	err := during(func(n int64) bool { return counted.Load() >= n || ctx.Err() != nil })
	cancel()
	wg.Wait()
	if err != nil && first == nil {
		first = err
	}
	return counted.Load(), bad.Load(), first
}
