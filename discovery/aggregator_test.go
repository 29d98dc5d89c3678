package discovery

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var shop = Key{Tenant: "acme", Service: "shop"}

func at(id, address string) Instance {
	ap := netip.MustParseAddrPort(address)
	return Instance{ID: id, Node: "h1", Key: shop, Address: ap.Addr(), Ports: []Port{{Number: ap.Port()}}, Weight: 1, Health: Passing}
}

// script is a Source that emits what it is given.
type script struct{ updates chan Update }

func (s script) Name() string { return "s" }

func (s script) Run(ctx context.Context, emit func(Update)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case u := <-s.updates:
			u.Source = "s"
			emit(u)
		}
	}
}

// bench runs an Aggregator inside a synctest bubble.
type bench struct {
	*Aggregator
	say  func(Update)
	dead sync.Map // netip.AddrPort
}

func run(t *testing.T, c Config, f func(b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bench{}
		source := script{make(chan Update)}
		c.Sources = append(c.Sources, source)
		if c.Probe == nil {
			c.Probe = func(_ context.Context, at netip.AddrPort) error {
				if _, dead := b.dead.Load(at); dead {
					return errors.New("refused")
				}
				return nil
			}
		}
		b.Aggregator = NewAggregator(c)
		b.say = func(u Update) { source.updates <- u; pass(catalogEvery); synctest.Wait() }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.Run(ctx) }()
		synctest.Wait()
		f(b)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// pass lets the bubble's time pass.
func pass(d time.Duration) { <-time.After(d) }

func (b *bench) ids() string {
	var out []string
	if g := b.Catalog().Groups.Get(shop); g != nil {
		for _, i := range g.Instances {
			id := i.ID
			if i.Stale {
				id += "?"
			}
			out = append(out, id)
		}
	}
	return strings.Join(out, " ")
}

func (b *bench) want(t *testing.T, what, ids string) {
	t.Helper()
	if got := b.ids(); got != ids {
		t.Errorf("%s: %q, want %q", what, got, ids)
	}
}

func TestFailureIsNotAbsence(t *testing.T) {
	run(t, Config{}, func(b *bench) {
		if b.Catalog().Ready {
			t.Error("ready before the source has answered")
		}
		b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}, Index: 5})
		b.say(Update{Complete: true, Scopes: []string{"shop"}, Index: 5})
		if !b.Catalog().Ready {
			t.Error("not ready after the first pass")
		}
		version := b.Catalog().Version
		group := b.Catalog().Groups.Get(shop)
		b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}, Index: 6})
		if c := b.Catalog(); c.Version != version || c.Groups.Get(shop) != group {
			t.Error("an unchanged answer was published")
		}
		b.say(Update{Scope: "shop", Err: errors.New("500")})
		b.want(t, "after an error", "a?")
		if p := b.Catalog().Problems; len(p) != 1 || p[0].Code != "source_stale" || !strings.Contains(p[0].Message, "500") {
			t.Errorf("problems %+v", p)
		}
		b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80"), at("b", "10.0.0.2:80")}, Index: 7})
		b.want(t, "after it answers again", "a b")
		b.say(Update{Scope: "shop", Instances: nil, Index: 8})
		b.want(t, "after a deregistration", "")
	})
}

// TestLostStateIsHeld: where the source's state was lost, what is missing is
// kept while it answers, dropped when it does not, and released when asked.
func TestLostStateIsHeld(t *testing.T) {
	full := Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80"), at("b", "10.0.0.2:80")}, Index: 50, Identity: "one"}
	for name, loss := range map[string]Update{
		"index falls":      {Scope: "shop", Index: 3, Identity: "one"},
		"another identity": {Scope: "shop", Index: 90, Identity: "two"},
		"said so":          {Scope: "shop", Index: 60, Regressed: true},
		"scope is gone":    {Complete: true, Index: 3, Identity: "two"},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, Config{}, func(b *bench) {
				b.say(full)
				b.say(Update{Complete: true, Scopes: []string{"shop"}, Index: 50, Identity: "one"})
				b.say(loss)
				b.want(t, "after the loss", "a? b?")
				if s := b.Catalog().Sources[0]; s.Held != 2 {
					t.Errorf("held %d", s.Held)
				}
				b.dead.Store(netip.MustParseAddrPort("10.0.0.2:80"), true)
				pass(time.Minute) // probes run
				synctest.Wait()
				b.want(t, "after probes", "a?")
				b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}, Index: 91, Identity: "two"})
				b.want(t, "registered again", "a")
				b.say(Update{Scope: "shop", Index: 92, Identity: "two"})
				b.want(t, "deregistered", "")
			})
		})
	}
	run(t, Config{}, func(b *bench) {
		b.say(full)
		b.say(Update{Scope: "shop", Index: 3})
		b.Release("s")
		synctest.Wait()
		b.want(t, "released", "")
	})
}

// TestProbesAreQuick: they begin at once, and more than are probed at a time are
// through soon.
func TestProbesAreQuick(t *testing.T) {
	for name, c := range map[string]struct {
		n      int
		within time.Duration
		probe  func(ctx context.Context) error
	}{
		"refused":     {1, 700 * time.Millisecond, func(context.Context) error { return syscall.ECONNREFUSED }},
		"silent":      {1, 5 * time.Second, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		"many silent": {700, 10 * time.Second, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
	} {
		t.Run(name, func(t *testing.T) {
			probe := func(ctx context.Context, _ netip.AddrPort) error { return c.probe(ctx) }
			run(t, Config{Probe: probe}, func(b *bench) {
				var list []Instance
				for n := range c.n {
					list = append(list, at(fmt.Sprint(n), "10.0.0.1:80"))
				}
				b.say(Update{Scope: "shop", Instances: list, Index: 50})
				b.say(Update{Scope: "shop", Index: 3})
				if s := b.Catalog().Sources[0]; s.Held != c.n {
					t.Errorf("%d are held", s.Held)
				}
				pass(c.within)
				synctest.Wait()
				if s := b.Catalog().Sources[0]; s.Held != 0 {
					t.Errorf("%d are still held after %v", s.Held, c.within)
				}
			})
		})
	}
}

// TestLastGoodState: a restart goes on with what was kept, marked stale; a file
// that cannot be read is as none.
func TestLastGoodState(t *testing.T) {
	dir := t.TempDir()
	c := Config{Dir: dir, Remember: []string{"s"}}
	run(t, c, func(b *bench) {
		b.say(Update{Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}, Index: 5, Identity: "one"})
		b.say(Update{Complete: true, Scopes: []string{"shop"}, Index: 5, Identity: "one"})
		pass(2 * time.Second) // it is kept
		synctest.Wait()
	})
	run(t, c, func(b *bench) {
		b.want(t, "after a restart", "a?")
		if !b.Catalog().Ready {
			t.Error("the kept state does not count as the first answer")
		}
		b.say(Update{Scope: "shop", Index: 70, Identity: "two"})
		b.want(t, "another Consul", "a?")
	})
	if err := os.WriteFile(filepath.Join(dir, "s.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, c, func(b *bench) {
		if b.Catalog().Ready || b.ids() != "" {
			t.Errorf("a damaged file: ready %v with %q", b.Catalog().Ready, b.ids())
		}
	})
}

func TestStaticReplaces(t *testing.T) {
	static := NewStatic("config", []Instance{at("a", "10.0.0.1:80")})
	ctx, cancel := context.WithCancel(t.Context())
	updates, done := make(chan Update), make(chan error, 1)
	go func() { done <- static.Run(ctx, func(u Update) { updates <- u }) }()
	for _, want := range []string{"a", "b"} {
		if u := <-updates; len(u.Instances) != 1 || u.Instances[0].ID != want || !u.Complete {
			t.Errorf("update %+v, want %s", u, want)
		}
		if want == "a" {
			static.Set([]Instance{at("b", "10.0.0.2:80")})
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
