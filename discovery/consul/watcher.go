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
	// A service that has failed this often, while Consul answers otherwise, holds
	// up the first pass no longer.
	hopeless = 6
)

// watcher is one run of a Source.
type watcher struct {
	s         *Source
	emit      func(discovery.Update)
	verifying sync.Mutex // one look at a time; guards last
	last      incarnation
	verified  atomic.Uint64 // the suspicions that the last look has settled
	group     *errgroup.Group

	signal   chan uint64        // one slot: something has changed, at this index
	located  map[place]position // what the last sweep saw; the sweep loop's own
	newCheck atomic.Bool        // a check has changed since the last sweep
	unsure   atomic.Bool        // the last sweep has missed something: ask all

	mu         sync.Mutex          // guards what follows
	identity   string              // which Consul this is; "": not known yet
	services   map[string]*service //
	own        int                 // services with a query of their own
	unanswered int                 // services that hold up the first pass
	clock      uint64              // grows with each promotion
	listed     bool                // the list has answered once
	limited    bool                // the list's last answer lacked what the token may not see
	hidden     int                 // services of which the token may not see everything
	changed    bool                // the set of services, or their problems, since the last Complete
	problems   string              // of the whole source, as last emitted
	// explained are the indexes of late answers of services' own queries: a
	// sign with such an index needs no sweep.
	explained map[uint64]bool
}

// service is one watched Consul service. Its fields are guarded by the
// watcher's mu; index, asking and identity, of its last answer, by busy; failures, of
// its asks in sweeps, belongs to those.
type service struct {
	name string

	wanted   bool // the list has it
	entries  int  // of its last answer
	empty    bool // its last answer had no member
	hidden   bool // its last answer lacked what the token may not see
	answered bool // or given up for the first pass
	gone     bool
	cancel   context.CancelFunc // of its own query; nil: it shares the sweep
	used     uint64             // clock of its last promotion

	busy     sync.Mutex
	index    uint64
	asking   *asking
	identity string

	failures int
}

func newWatcher(s *Source, emit func(discovery.Update)) *watcher {
	return &watcher{s: s, emit: emit, signal: make(chan uint64, 1), changed: true, explained: map[uint64]bool{}, services: map[string]*service{}}
}

func (w *watcher) run(ctx context.Context) error {
	w.group, ctx = errgroup.WithContext(ctx)
	w.group.Go(func() error { return w.watchList(ctx) })
	w.group.Go(func() error { return w.s.watchToken(ctx) })
	if !w.s.multiplexed {
		w.group.Go(func() error { return w.watchChecks(ctx) })
		w.group.Go(func() error { return w.sweepLoop(ctx) })
	}
	return w.group.Wait()
}

// loop asks again and again: ask gets the index to wait for and returns the
// next. Errors back off; answers are bounded by a token bucket.
func (w *watcher) loop(ctx context.Context, scope string, from cursor, ask func(from cursor) (uint64, error)) error {
	limiter := rate.NewLimiter(rate.Every(answersEvery), answersBurst)
	for failures := 0; ; {
		if now := w.s.begin(); from.asking != now.asking {
			from = now
		}
		next, err := ask(from)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errAskAgain):
			from.index, from.consistent = 0, true
		case err != nil:
			failures++
			w.failed(scope, err)
			if failures == hopeless {
				w.giveUp(ctx, scope)
			}
			from = w.s.begin()
			if !pause(ctx, backoff(failures)) {
				return ctx.Err()
			}
			continue
		case next < from.index:
			from = w.s.begin() // the contract: start again
		default:
			from.index, from.consistent = next, false
		}
		if failures > 0 && scope == "" {
			w.emit(discovery.Update{Source: w.s.config.Name, Seen: time.Now()}) // it answers again
		}
		failures = 0
		if err := limiter.Wait(ctx); err != nil {
			return err
		}
	}
}

func (w *watcher) failed(scope string, err error) {
	w.s.metrics.errors.Inc()
	w.s.suspicions.Add(1)
	w.emit(discovery.Update{Source: w.s.config.Name, Scope: scope, Err: err})
}

// giveUp lets the first pass end without a service that fails while Consul
// answers otherwise.
func (w *watcher) giveUp(ctx context.Context, scope string) {
	if scope == "" || w.verify(ctx, w.s.begin()) != nil {
		return
	}
	w.mu.Lock()
	if sv := w.services[scope]; sv != nil {
		w.heard(sv)
	}
	w.mu.Unlock()
	w.complete(0)
}

// heard counts down the services that hold up the first pass; mu is held.
func (w *watcher) heard(sv *service) {
	if !sv.answered {
		sv.answered = true
		w.unanswered--
	}
}

func (w *watcher) watchList(ctx context.Context) error {
	return w.loop(ctx, "", w.s.begin(), func(from cursor) (uint64, error) {
		from.brief = w.sees(func() bool { return w.limited })
		names, meta, err := w.s.list(ctx, from)
		if err != nil {
			return 0, err
		}
		if meta.LastIndex < from.index {
			w.s.suspicions.Add(1)
		}
		if err := w.verify(ctx, from); err != nil {
			return 0, err
		}
		w.take(ctx, names, meta.ResultsFilteredByACLs)
		w.poke(meta.LastIndex)
		w.complete(meta.LastIndex)
		return meta.LastIndex, nil
	})
}

func (w *watcher) watchChecks(ctx context.Context) error {
	return w.loop(ctx, "", w.s.begin(), func(from cursor) (uint64, error) {
		next, err := w.s.checks(ctx, from)
		if err == nil {
			w.newCheck.Store(true)
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

// take starts watching new names. Those that have left end at once when their
// own last answer says so, too, or as soon as one does.
func (w *watcher) take(ctx context.Context, names map[string]bool, limited bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listed, w.limited = true, limited
	for name, sv := range w.services {
		sv.wanted = names[name]
		if sv.empty && !sv.wanted {
			w.end(sv)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if w.services[name] == nil {
			sv := &service{name: name, wanted: true}
			w.services[name] = sv
			w.unanswered++
			w.changed = true
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

// demoteOldest takes its own query from the service that changed longest ago;
// mu is held.
func (w *watcher) demoteOldest() {
	var oldest *service
	for _, sv := range w.services {
		if sv.cancel != nil && (oldest == nil || sv.used < oldest.used) {
			oldest = sv
		}
	}
	if oldest != nil {
		w.demote(oldest)
	}
}

func (w *watcher) demote(sv *service) {
	if sv.cancel != nil {
		sv.cancel()
		sv.cancel = nil
		w.own--
	}
}

// end stops watching a service that has left the catalog; mu is held.
func (w *watcher) end(sv *service) {
	sv.gone = true
	delete(w.services, sv.name)
	w.demote(sv)
	w.heard(sv)
	w.mark(sv, false)
	w.changed = true
}

// mark notes whether the token may see all of a service; mu is held.
func (w *watcher) mark(sv *service, hidden bool) {
	if hidden != sv.hidden {
		sv.hidden = hidden
		if hidden {
			w.hidden++
		} else {
			w.hidden--
		}
	}
}

// sourceScope carries the Problems of the whole source; no service has a colon
// in its name.
const sourceScope = ":source"

// count publishes how the watching itself fares; mu is held.
func (w *watcher) count() {
	shared := len(w.services) - w.own
	w.s.metrics.watches.Set(float64(len(w.services)))
	w.s.metrics.shared.Set(float64(shared))
	text := ""
	var problems []discovery.Problem
	if shared > 0 {
		problems = append(problems, w.s.problemBudget(len(w.services), w.own))
	}
	if w.hidden > 0 || w.limited {
		problems = append(problems, w.s.problemHidden(w.hidden))
	}
	for _, p := range problems {
		text += p.Message
	}
	if text != w.problems {
		w.problems, w.changed = text, true
		w.emit(discovery.Update{Source: w.s.config.Name, Scope: sourceScope, Problems: problems, Seen: time.Now()})
	}
}

var errGone = errors.New("service has left the catalog")

// follow watches one service until it is demoted or gone. It goes on from the
// last answer, whoever got it.
func (w *watcher) follow(ctx context.Context, sv *service) {
	sv.busy.Lock()
	from := cursor{index: sv.index, asking: sv.asking}
	sv.busy.Unlock()
	err := w.loop(ctx, sv.name, from, func(from cursor) (uint64, error) {
		from.brief = w.sees(func() bool { return sv.hidden })
		entries, meta, err := w.s.health(ctx, sv.name, from)
		if err != nil {
			return 0, err
		}
		if meta.LastIndex == from.index && !from.brief {
			return from.index, nil // the wait was over, or a wake-up without a change
		}
		if meta.QueryBackend == api.QueryBackendStreaming && meta.DefaultACLPolicy == "deny" && w.sees(func() bool { return len(entries) < sv.entries }) {
			// A stream does not say whether it hides what it lacks; the answer to a query
			// that does not block does.
			entries, meta, err = w.s.health(ctx, sv.name, cursor{asking: from.asking, consistent: true})
			if err != nil {
				return 0, err
			}
		}
		if err := w.verifyAnswer(ctx, sv, from, meta); err != nil {
			return 0, err
		}
		if !w.answer(ctx, sv, from, entries, meta) {
			return 0, errGone
		}
		return meta.LastIndex, nil
	})
	_ = err // the end of ctx
}

// sees asks something under mu.
func (w *watcher) sees(what func() bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return what()
}

// answer emits what one service's answer says. The answer to a query that was
// ended meanwhile may be older than what has been said since, and says nothing:
// false.
func (w *watcher) answer(ctx context.Context, sv *service, from cursor, entries []*api.ServiceEntry, meta *api.QueryMeta) bool {
	sv.busy.Lock()
	defer sv.busy.Unlock()
	identity := w.which()
	u := discovery.Update{Source: w.s.config.Name, Scope: sv.name, Index: meta.LastIndex, Identity: said(identity), Seen: time.Now(), Regressed: meta.ResultsFilteredByACLs}
	u.Instances, u.Problems = w.s.instances(entries)
	if !w.say(ctx, sv, u, len(entries)) {
		return false
	}
	sv.index, sv.asking, sv.identity = meta.LastIndex, from.asking, identity
	w.complete(meta.LastIndex)
	return true
}

// say emits u and notes what it means for the watching of sv; false when nobody
// is to hear of sv any more.
func (w *watcher) say(ctx context.Context, sv *service, u discovery.Update, entries int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if ctx.Err() != nil || sv.gone {
		return false
	}
	w.emit(u)
	w.heard(sv)
	if sv.cancel != nil {
		if len(w.explained) >= keepExplained {
			clear(w.explained)
		}
		w.explained[u.Index] = true
	}
	sv.entries = entries
	sv.empty = len(u.Instances) == 0 && len(u.Problems) == 0
	w.mark(sv, u.Regressed)
	if sv.empty && !sv.wanted {
		w.end(sv)
	}
	w.count()
	return true
}

// complete ends the first pass, and tells of every later change of the set,
// when each service of it has answered.
func (w *watcher) complete(index uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.listed || !w.changed || w.unanswered > 0 {
		return
	}
	w.changed = false
	scopes := slices.AppendSeq(make([]string, 0, len(w.services)+1), maps.Keys(w.services))
	if w.problems != "" {
		scopes = append(scopes, sourceScope)
	}
	slices.Sort(scopes)
	w.emit(discovery.Update{Source: w.s.config.Name, Complete: true, Scopes: scopes, Index: index, Identity: said(w.identity), Regressed: w.limited, Seen: time.Now()})
}
