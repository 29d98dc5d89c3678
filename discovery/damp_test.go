package discovery

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// TestFlapping: of a thousand instances that flap ten times a second, each service
// changes at most once in half a second, its last word is told, and a steady
// service beside them does not wait. An instance that has come to rest is told at
// once again.
func TestFlapping(t *testing.T) {
	const flapping, beat, half = 1000, 100 * time.Millisecond, 500 * time.Millisecond
	run(t, Config{}, func(b *bench) {
		service := func(n int) Key { return Key{"acme", fmt.Sprintf("flaps-%d", n)} }
		tell := func(k Key, healthy bool) {
			i := Instance{ID: k.Service, Node: "h1", Key: k, Address: netip.MustParseAddr("10.0.0.1"), Ports: []Port{{Number: 80}}, Weight: 1, Health: Critical}
			if healthy {
				i.Health = Passing
			}
			b.emit(Update{Source: "s", Scope: k.Service, Instances: []Instance{i}})
		}
		groups := map[Key]*Group{}
		changes := map[Key][]time.Time{}
		look := func() {
			for k, g := range b.Catalog().Groups.All() {
				if groups[k] != g {
					groups[k] = g
					changes[k] = append(changes[k], time.Now())
				}
			}
		}
		steady := shop
		for step := range 100 {
			for n := range flapping {
				tell(service(n), step%2 == 0)
			}
			if step%30 == 7 { // a planned change now and then
				before := len(changes[steady])
				b.emit(Update{Source: "s", Scope: "shop", Instances: []Instance{at("a", fmt.Sprintf("10.0.1.%d:80", step))}})
				pass(2 * catalogEvery)
				synctest.Wait()
				if look(); len(changes[steady]) != before+1 {
					t.Errorf("step %d: the steady service waits", step)
				}
				pass(beat - 2*catalogEvery)
			} else {
				pass(beat)
			}
			synctest.Wait()
			look()
		}
		for n := range flapping {
			at := changes[service(n)]
			if n := len(at); n < 15 {
				t.Fatalf("only %d changes were told", n)
			}
			if most := flapBurst + 2 + int(100*beat/half); len(at) > most {
				t.Fatalf("service %d has changed %d times, at most %d were expected", n, len(at), most)
			}
			for i := flapBurst + 2; i < len(at); i++ { // seen once a beat
				if gap := at[i].Sub(at[i-1]); gap < half-beat {
					t.Fatalf("service %d: change %d came %s after the one before", n, i, gap)
				}
			}
		}
		pass(dampEvery + tick)
		synctest.Wait()
		for n := range flapping {
			if h := b.Catalog().Groups.Get(service(n)).Instances[0].Health; h != Critical {
				t.Fatalf("service %d is %s, and was last told to be critical", n, h)
			}
		}
		pass(flapBurst * flapEvery)
		tell(service(0), true)
		pass(2 * catalogEvery)
		synctest.Wait()
		if h := b.Catalog().Groups.Get(service(0)).Instances[0].Health; h != Passing {
			t.Errorf("a service that has been quiet for long is still damped: %s", h)
		}
	})
}

// TestDampedWithSteady: a steady instance of a service in which another one flaps
// does not wait, and what flaps goes with it.
func TestDampedWithSteady(t *testing.T) {
	run(t, Config{}, func(b *bench) {
		flap := func(n int) Instance {
			i := at("flaps", "10.0.0.9:80")
			if n%2 == 1 {
				i.Health = Critical
			}
			return i
		}
		for n := range 40 {
			b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80"), flap(n)}})
		}
		before := b.Catalog().Groups.Get(shop)
		b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80"), flap(40)}})
		if now := b.Catalog().Groups.Get(shop); now != before {
			t.Error("what flaps alone is told at once")
		}
		b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.2:80"), flap(40)}})
		if now := b.Catalog().Groups.Get(shop); now == before || now.Instances[0].Address.String() != "10.0.0.2" {
			t.Error("a steady instance waits for one that flaps")
		}
	})
}
