package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKilled: 2,000 proxies, a connection each, whose server is killed under a
// change and comes back. They resume with what they have, are sent nothing of it
// again, miss nothing, and get the next change.
func TestKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	proxies := 2000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if most := int(limit.Cur) - 200; most < proxies {
		t.Logf("%d open files are allowed: %d proxies instead of %d", limit.Cur, most, proxies)
		proxies = most
	}
	s := size{Services: 50, Each: 3, Tenants: 1, Hosts: 100}
	first, err := startChild(ctx, sideRoost, s, proxies)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.fill(ctx); err != nil {
		t.Fatal(errors.Join(err, first.stop()))
	}
	cold := first.received.Load()
	// A change that only some may have had: nobody waits for it.
	if _, err := first.ask(command{Do: "change", Service: 7}); err != nil {
		t.Fatal(errors.Join(err, first.stop()))
	}
	if err := first.kill(); err != nil {
		t.Fatal(err)
	}
	second, err := startAt(ctx, sideRoost, s, first.start.Address)
	if err != nil {
		t.Fatal(err)
	}
	second.fleet = first.fleet
	defer func() {
		if err := second.stop(); err != nil {
			t.Error(err)
		}
	}()
	requests := second.requests()
	before := second.received.Load()
	if err := second.open(requests); err != nil {
		t.Fatal(err)
	}
	// The second server does not know of the first one's change: it takes back what
	// some proxies had of it. Its own second change is new to all.
	for _, service := range []int{3, 7} {
		if _, err := second.move(ctx, s, service, proxies); err != nil {
			t.Fatal(err)
		}
	}
	for _, service := range []int{3, 7} {
		if err := second.agree(second.names.id([]byte(s.clusterName(service)))); err != nil {
			t.Error(err)
		}
	}
	if sent := second.received.Load() - before; sent > cold/10 {
		t.Errorf("%d bytes were sent to proxies that were current but for three changes, %d when they had nothing", sent, cold)
	}
}
