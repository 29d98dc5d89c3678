// Package replicas tells the other Roosts that share a store of this one, and
// knows of them. What this replica has to say goes in by a function; the list of
// those that live comes out, and when the last one vanished.
//
// Run owns three goroutines, which announce, report and listen, and returns after
// all have ended. Everything else may be called from any goroutine.
package replicas

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/roostmesh/roost/lb/ledger"
)

const (
	// statusEvery is how often what is for people may change; what others wait for
	// is told at once.
	statusEvery = 2 * time.Second
	retryEvery  = time.Second
)

// Store is where replicas meet.
type Store interface {
	// Announce and Replicas are those of ledger.Shared.
	Announce(ctx context.Context, r ledger.Replica) error
	Replicas(ctx context.Context, index uint64) ([]ledger.Replica, uint64, error)
	// Tell writes what this replica says of itself for people; Told reads what all
	// have told, by name.
	Tell(ctx context.Context, status []byte) error
	Told(ctx context.Context) (map[string][]byte, error)
}

// Self is what this replica tells the others, and what they wait for: it is
// small, because all of them read it at once.
type Self struct {
	Config  string // hash of what it is configured to do
	Acked   uint64 // ledger generation that all its proxies have confirmed
	Cleared uint64 // ledger generation up to which nobody of its own has a quarantined address
	Urgent  []byte // JSON
}

// Other is another replica that lives.
type Other struct {
	Name    string
	Since   time.Time
	Config  string
	Acked   uint64
	Cleared uint64
	Urgent  json.RawMessage
}

// Config is what a Group needs.
type Config struct {
	Store  Store
	Name   string // of this replica
	Self   func() Self
	Status func() []byte // what is told for people, read on demand
	Log    *slog.Logger
	Now    func() time.Time // nil: time.Now
}

// Group is the replicas of one store.
type Group struct {
	cfg     Config
	poke    chan struct{} // one slot: there is something to tell
	changed chan struct{} // one slot: the others have something new

	others atomic.Pointer[[]Other] // nil until the list is known

	mu      sync.Mutex
	gone    time.Time // when one was last seen to vanish; guarded by mu
	failure string    // why others do not hear of this one; guarded by mu
}

// New makes a Group. Nothing is started.
func New(cfg Config) *Group {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Group{cfg: cfg, poke: make(chan struct{}, 1), changed: make(chan struct{}, 1)}
}

// Poke says that Self has changed in a way that others may wait for.
func (g *Group) Poke() { nudge(g.poke) }

// Changed is poked after the others have said something new; newest wins.
func (g *Group) Changed() <-chan struct{} { return g.changed }

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Others lists the other replicas that live, by name; ok is false while that is
// not known.
func (g *Group) Others() (list []Other, ok bool) {
	p := g.others.Load()
	if p == nil {
		return nil, false
	}
	return *p, true
}

// Gone is when a replica was last seen to vanish; zero: never.
func (g *Group) Gone() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.gone
}

// Failure says why the others do not hear of this replica; "" is none.
func (g *Group) Failure() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failure
}

// Run announces and listens until ctx ends.
func (g *Group) Run(ctx context.Context) error {
	var group errgroup.Group
	group.Go(func() error { g.announce(ctx); return nil })
	group.Go(func() error { g.report(ctx); return nil })
	group.Go(func() error { g.listen(ctx); return nil })
	return group.Wait()
}

func (g *Group) announce(ctx context.Context) {
	tick := time.NewTicker(statusEvery)
	defer tick.Stop()
	var told Self
	first, failed := true, false
	for {
		now := g.cfg.Self()
		if first || failed || now.Config != told.Config || now.Acked != told.Acked || now.Cleared != told.Cleared || !bytes.Equal(now.Urgent, told.Urgent) {
			failed = g.tell(ctx, now) != nil
			if !failed {
				told, first = now, false
			}
		}
		if !g.wait(ctx, tick.C, failed) {
			return
		}
	}
}

// wait returns when there may be something to tell; false says that ctx ended.
func (g *Group) wait(ctx context.Context, tick <-chan time.Time, failed bool) bool {
	poke := g.poke
	if failed {
		poke = nil // the next tick is early enough
	}
	select {
	case <-ctx.Done():
		return false
	case <-poke:
	case <-tick:
	}
	return true
}

func (g *Group) tell(ctx context.Context, s Self) error {
	err := g.cfg.Store.Announce(ctx, ledger.Replica{Name: g.cfg.Name, Config: s.Config, Acked: s.Acked, Cleared: s.Cleared, Status: s.Urgent})
	text := ""
	if err != nil {
		text = err.Error()
	}
	g.mu.Lock()
	before := g.failure
	g.failure = text
	g.mu.Unlock()
	switch {
	case ctx.Err() != nil:
	case err != nil && before == "":
		g.cfg.Log.Warn("the other replicas do not hear of this one", "error", err)
	case err == nil && before != "":
		g.cfg.Log.Info("the other replicas hear of this one again")
	}
	return err
}

func (g *Group) listen(ctx context.Context) {
	index := uint64(0)
	for ctx.Err() == nil {
		list, next, err := g.cfg.Store.Replicas(ctx, index)
		if err != nil {
			index = 0
			if !errors.Is(err, context.Canceled) {
				g.cfg.Log.Debug("the list of replicas cannot be read", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(retryEvery):
			}
			continue
		}
		index = next
		g.take(list)
	}
}

// report tells what is for people, when it has changed.
func (g *Group) report(ctx context.Context) {
	tick := time.NewTicker(statusEvery)
	defer tick.Stop()
	var told []byte
	for {
		if now := g.cfg.Status(); !bytes.Equal(now, told) {
			// What fails is told by announce; here the next tick tries again.
			if g.cfg.Store.Tell(ctx, now) == nil {
				told = now
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Told reads what the other replicas say of themselves, by name.
func (g *Group) Told(ctx context.Context) (map[string][]byte, error) {
	all, err := g.cfg.Store.Told(ctx)
	delete(all, g.cfg.Name)
	return all, err
}

// take notes who lives, and whether somebody has vanished.
func (g *Group) take(list []ledger.Replica) {
	others := []Other{}
	alive := map[string]bool{}
	for _, r := range list {
		if r.Name == g.cfg.Name {
			continue
		}
		alive[r.Name] = true
		others = append(others, Other{r.Name, r.Since, r.Config, r.Acked, r.Cleared, r.Status})
	}
	if before, ok := g.Others(); ok {
		for _, o := range before {
			if !alive[o.Name] {
				g.mu.Lock()
				g.gone = g.cfg.Now()
				g.mu.Unlock()
				g.cfg.Log.Warn("a replica has gone", "replica", o.Name)
			}
		}
	}
	g.others.Store(&others)
	nudge(g.changed)
}
