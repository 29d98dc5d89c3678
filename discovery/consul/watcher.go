package consul

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/roostmesh/roost/discovery"
)

const (
	// A query may answer this often in the long run, and this often at once: a
	// storm costs no more.
	answersEvery = 20 * time.Millisecond
	answersBurst = 25
	// keepExplained bounds what is remembered of late answers.
	keepExplained = 4096
	// A sweep waits this long for a service's own query to explain the sign; an
	// explained sign may still hide another change, so that a sweep follows it
	// after a while.
	explainWait = 4 * time.Millisecond
	sweepLater  = 2 * time.Second
	// sweepEvery bounds how often the shared services are asked; sweepAnyway
	// asks them without a sign.
	sweepEvery  = 50 * time.Millisecond
	sweepShare  = 9
	sweepAnyway = 30 * time.Second
)

// watcher is one run of a Source.
type watcher struct {
	s    *Source
	emit func(discovery.Update)
	// suspect says that a query has failed since the last look at which Consul
	// this is; epoch grows when it turns out to have lost its state.
	suspect atomic.Bool
	signal  chan uint64 // one slot: something has changed, at this index

	verifying sync.Mutex // one look at a time

	mu       sync.Mutex
	identity string              // which Consul this is; "": not known yet; guarded by mu
	services map[string]*service // guarded by mu
	own      int                 // services with a query of their own; guarded by mu
	clock    uint64              // grows with each promotion; guarded by mu
	listed   bool                // the list has answered once; guarded by mu
	scopes   []string            // of the last Complete; guarded by mu
	// explained are the indexes of late answers of services' own queries: a
	// sign with such an index needs no sweep; guarded by mu.
	explained map[uint64]bool
	group     *errgroup.Group
	problem   string // of the budget, as last emitted; guarded by mu
}

// service is one watched Consul service. Its fields are guarded by the
// watcher's mu; index and identity, of its last answer, by busy.
type service struct {
	name string

	wanted   bool // the list has it
	answered bool
	gone     bool
	cancel   context.CancelFunc // of its own query; nil: it shares the sweep
	used     uint64             // clock of its last promotion

	busy     sync.Mutex
	index    uint64
	identity string
}

func newWatcher(s *Source, emit func(discovery.Update)) *watcher {
	return &watcher{s: s, emit: emit, signal: make(chan uint64, 1), explained: map[uint64]bool{}, services: map[string]*service{}}
}

func (w *watcher) run(ctx context.Context) error {
	w.group, ctx = errgroup.WithContext(ctx)
	w.group.Go(func() error { return w.watchList(ctx) })
	if !w.s.multiplexed {
		w.group.Go(func() error { return w.watchChecks(ctx) })
		w.group.Go(func() error { return w.sweepLoop(ctx) })
	}
	return w.group.Wait()
}

// loop asks again and again: ask gets the index to wait for and returns the
// next. Errors back off; answers are bounded by a token bucket.
func (w *watcher) loop(ctx context.Context, scope string, ask func(index uint64) (uint64, error)) error {
	limiter := rate.NewLimiter(rate.Every(answersEvery), answersBurst)
	var index uint64
	for failures := 0; ; {
		next, err := ask(index)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			failures++
			w.failed(scope, err)
			index = 0
			if !pause(ctx, backoff(failures)) {
				return ctx.Err()
			}
			continue
		case next < index:
			index = 0 // the contract: start again
		default:
			index = next
		}
		failures = 0
		if err := limiter.Wait(ctx); err != nil {
			return err
		}
	}
}

func (w *watcher) failed(scope string, err error) {
	w.s.metrics.errors.Inc()
	w.suspect.Store(true)
	w.emit(discovery.Update{Source: w.s.config.Name, Scope: scope, Err: err})
}

func (w *watcher) watchList(ctx context.Context) error {
	return w.loop(ctx, "", func(index uint64) (uint64, error) {
		names, next, err := w.s.list(ctx, index)
		if err != nil {
			return 0, err
		}
		if err := w.verify(ctx); err != nil {
			return 0, err
		}
		w.take(ctx, names)
		w.poke(next)
		w.complete(next)
		return next, nil
	})
}

func (w *watcher) watchChecks(ctx context.Context) error {
	return w.loop(ctx, "", func(index uint64) (uint64, error) {
		next, err := w.s.checks(ctx, index)
		if err == nil {
			w.poke(next)
		}
		return next, err
	})
}

// poke tells the sweep of a change; the newest index wins.
func (w *watcher) poke(index uint64) {
	for {
		select {
		case w.signal <- index:
			return
		case <-w.signal:
		}
	}
}

// take starts watching new names, and marks those that have left: they end when
// their own answer confirms it.
func (w *watcher) take(ctx context.Context, names map[string]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listed = true
	for name, sv := range w.services {
		sv.wanted = names[name]
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if w.services[name] == nil {
			sv := &service{name: name, wanted: true}
			w.services[name] = sv
			if w.s.multiplexed || w.own < w.s.config.MaxConnections-reserved {
				w.promote(ctx, sv)
			}
		}
	}
	w.count()
}

// promote gives a service a query of its own; mu is held.
func (w *watcher) promote(ctx context.Context, sv *service) {
	if sv.cancel != nil || sv.gone {
		return
	}
	if !w.s.multiplexed && w.own >= w.s.config.MaxConnections-reserved {
		w.demoteOldest()
	}
	w.own++
	w.clock++
	sv.used = w.clock
	ctx, sv.cancel = context.WithCancel(ctx)
	w.group.Go(func() error {
		w.follow(ctx, sv)
		return nil
	})
}

// demoteOldest takes its own query from the service that changed longest ago.
func (w *watcher) demoteOldest() {
	var oldest *service
	for _, sv := range w.services {
		if sv.cancel != nil && (oldest == nil || sv.used < oldest.used) {
			oldest = sv
		}
	}
	if oldest != nil {
		oldest.cancel()
		oldest.cancel = nil
		w.own--
	}
}

func (w *watcher) count() {
	w.s.metrics.watches.Set(float64(len(w.services)))
	w.s.metrics.shared.Set(float64(len(w.services) - w.own))
	text := ""
	var problems []discovery.Problem
	if shared := len(w.services) - w.own; shared > 0 {
		p := w.s.problemBudget(len(w.services), w.own)
		text, problems = p.Message, []discovery.Problem{p}
	}
	if text != w.problem {
		w.problem = text
		w.emit(discovery.Update{Source: w.s.config.Name, Scope: budgetScope, Problems: problems, Seen: time.Now()})
	}
}

// budgetScope carries the Problem of the connection budget; no service has a
// colon in its name.
const budgetScope = ":budget"

// follow watches one service until it is demoted or gone.
func (w *watcher) follow(ctx context.Context, sv *service) {
	err := w.loop(ctx, sv.name, func(index uint64) (uint64, error) {
		entries, next, err := w.s.health(ctx, sv.name, index)
		if err != nil {
			return 0, err
		}
		if next == index {
			return next, nil // the wait was over, or a wake-up without a change
		}
		if err := w.verify(ctx); err != nil {
			return 0, err
		}
		if w.answer(sv, entries, next) {
			return 0, errGone
		}
		return next, nil
	})
	_ = err // the end of ctx
}

var errGone = errors.New("service has left the catalog")

// answer emits what one service's answer says, and tells whether the service
// is gone for good.
func (w *watcher) answer(sv *service, entries []*api.ServiceEntry, index uint64) (gone bool) {
	sv.busy.Lock()
	defer sv.busy.Unlock()
	u := discovery.Update{Source: w.s.config.Name, Scope: sv.name, Index: index, Identity: w.which(), Seen: time.Now()}
	u.Instances, u.Problems = w.s.instances(entries)
	sv.index, sv.identity = index, u.Identity
	w.emit(u)
	w.mu.Lock()
	sv.answered = true
	if sv.cancel != nil {
		if len(w.explained) >= keepExplained {
			clear(w.explained)
		}
		w.explained[index] = true
	}
	if len(u.Instances) == 0 && len(u.Problems) == 0 && !sv.wanted && !sv.gone {
		sv.gone = true
		delete(w.services, sv.name)
		if sv.cancel != nil {
			w.own--
			sv.cancel()
			sv.cancel = nil
		}
		w.count()
	}
	gone = sv.gone
	w.mu.Unlock()
	w.complete(index)
	return gone
}

// complete ends the first pass, and tells of every later change of the set,
// when each service of it has answered.
func (w *watcher) complete(index uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.listed {
		return
	}
	scopes := []string{}
	if w.problem != "" {
		scopes = append(scopes, budgetScope)
	}
	for name, sv := range w.services {
		if !sv.answered {
			return
		}
		scopes = append(scopes, name)
	}
	slices.Sort(scopes)
	if w.scopes != nil && slices.Equal(scopes, w.scopes) {
		return
	}
	w.scopes = scopes
	w.emit(discovery.Update{Source: w.s.config.Name, Complete: true, Scopes: slices.Clone(scopes), Index: index, Identity: w.identity, Seen: time.Now()})
}
