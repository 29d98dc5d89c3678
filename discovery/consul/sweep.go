package consul

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"
)

const (
	// A sweep waits this long for a service's own query to explain the sign; an
	// explained sign may still hide another change, and one that explains nothing
	// may have been answered by a server that lags, so that a sweep follows.
	explainWait = 4 * time.Millisecond
	sweepLater  = 2 * time.Second
	// sweepAnyway asks all shared services, without a sign.
	sweepAnyway = 30 * time.Second
	// Sweeps take at most this part of the time in the long run, however busy the
	// catalog, and this much of it at once.
	sweepPart  = 3
	sweepBurst = 2 * time.Second
)

// place is a thing of the catalog that carries an index: a node, a registration
// on it, or a check.
type place struct{ node, kind, id string }

// position is the service of a place ("": every one on its node) and its index.
type position struct {
	service string
	index   uint64
}

// sweepLoop looks after the services that have no query of their own whenever
// something in the catalog has changed.
func (w *watcher) sweepLoop(ctx context.Context) error {
	later, anyway := time.NewTimer(sweepAnyway), time.NewTicker(sweepAnyway)
	defer later.Stop()
	defer anyway.Stop()
	var debt time.Duration
	paid := time.Now()
	for {
		all := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case index := <-w.signal:
			if !pause(ctx, explainWait) {
				return ctx.Err()
			}
			if w.isExplained(index) {
				later.Reset(sweepLater)
				continue
			}
		case <-later.C:
		case <-anyway.C:
			all = true
		}
		began := time.Now()
		debt = max(0, debt-began.Sub(paid))
		if !w.sweep(ctx, all) {
			later.Reset(sweepLater)
		}
		paid = time.Now()
		debt += sweepPart * paid.Sub(began)
		if debt > sweepBurst && !pause(ctx, debt-sweepBurst) {
			return ctx.Err()
		}
	}
}

func (w *watcher) isExplained(index uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.explained[index]
}

// sweep asks the shared services that have changed, or all of them. It tells
// whether that explains the sign.
func (w *watcher) sweep(ctx context.Context, all bool) bool {
	shared := w.shared()
	if len(shared) == 0 {
		w.located = nil // what it says is too old when there are some again
		return true
	}
	if names, ok := w.locate(ctx, len(shared)); ok && !all {
		for name, sv := range shared {
			if !names[name] && sv.answered {
				delete(shared, name)
			}
		}
	}
	var group errgroup.Group
	group.SetLimit(sweepWorkers)
	for _, sv := range shared {
		group.Go(func() error {
			w.ask(ctx, sv.service)
			return nil
		})
	}
	_ = group.Wait() // asks report their own errors
	return len(shared) > 0 && !w.unsure.Load()
}

// sharedService is a service as it was when a sweep began.
type sharedService struct {
	*service
	answered bool
}

func (w *watcher) shared() map[string]sharedService {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.services) == w.own {
		return nil
	}
	out := map[string]sharedService{}
	for name, sv := range w.services {
		if sv.cancel == nil {
			out[name] = sharedService{sv, sv.answered}
		}
	}
	return out
}

// locate says which services have changed since it last looked; false when it
// cannot tell. A catalog with more nodes than there are services to ask is not
// worth the questions.
func (w *watcher) locate(ctx context.Context, worth int) (map[string]bool, bool) {
	checksToo := w.newCheck.Swap(false) || w.located == nil
	before := w.located
	if w.unsure.Swap(false) {
		before = nil
	}
	now, err := w.look(ctx, worth, checksToo)
	if err != nil || now == nil {
		w.located = nil
		return nil, false
	}
	if !checksToo {
		for p, at := range w.located {
			if p.kind == ofCheck {
				now[p] = at
			}
		}
	}
	w.located = now
	return changes(before, now), before != nil
}

// Kinds of places.
const (
	ofNode    = "node"
	ofService = "service"
	ofCheck   = "check"
)

// changes are the services of all places that differ.
func changes(before, now map[place]position) map[string]bool {
	names, nodes := map[string]bool{}, map[string]bool{}
	differ := func(a, b map[place]position) {
		for p, at := range a {
			switch {
			case at == b[p]:
			case at.service == "":
				nodes[p.node] = true
			default:
				names[at.service] = true
			}
		}
	}
	differ(before, now)
	differ(now, before)
	for p, at := range now {
		if nodes[p.node] && p.kind == ofService {
			names[at.service] = true
		}
	}
	return names
}

// look reads the indexes of all places; nil when that is not worth it.
func (w *watcher) look(ctx context.Context, worth int, checksToo bool) (map[place]position, error) {
	nodes, _, err := w.s.nodes(ctx, w.s.begin())
	if err != nil || len(nodes) > worth {
		return nil, err
	}
	var mu sync.Mutex
	now := map[place]position{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(sweepWorkers)
	if checksToo {
		group.Go(func() error {
			checks, err := w.s.allChecks(ctx)
			mu.Lock()
			defer mu.Unlock()
			for _, c := range checks {
				now[place{c.Node, ofCheck, c.CheckID}] = position{c.ServiceName, c.ModifyIndex}
			}
			return err
		})
	}
	for _, n := range nodes {
		group.Go(func() error {
			list, err := w.s.registrations(ctx, n.Node)
			mu.Lock()
			defer mu.Unlock()
			now[place{n.Node, ofNode, ""}] = position{"", n.ModifyIndex}
			for _, r := range list {
				now[place{n.Node, ofService, r.ID}] = position{r.Service, r.ModifyIndex}
			}
			return err
		})
	}
	return now, group.Wait()
}

// known asks for the instances of a service, of a Consul that is known.
func (w *watcher) known(ctx context.Context, sv *service, from cursor) ([]*api.ServiceEntry, *api.QueryMeta, error) {
	entries, meta, err := w.s.health(ctx, sv.name, from)
	if err == nil {
		err = w.verifyAnswer(ctx, sv, from, meta)
	}
	return entries, meta, err
}

// ask looks once whether a shared service has changed; one that has is given a
// query of its own, since it is likely to change again.
func (w *watcher) ask(ctx context.Context, sv *service) {
	from := w.s.begin()
	entries, meta, err := w.known(ctx, sv, from)
	if errors.Is(err, errAskAgain) {
		from = w.s.begin()
		from.consistent = true
		entries, meta, err = w.known(ctx, sv, from)
	}
	if err != nil {
		if errors.Is(err, errAskAgain) {
			w.unsure.Store(true)
		} else if !isGone(ctx, err) {
			w.failed(sv.name, err)
			w.unsure.Store(true)
			sv.failures++
			if sv.failures == hopeless {
				w.giveUp(ctx, sv.name)
			}
		}
		return
	}
	sv.busy.Lock()
	first, same := sv.index == 0, sv.index == meta.LastIndex && sv.identity == w.which()
	sv.busy.Unlock()
	if same && !w.sees(func() bool { return sv.hidden }) {
		return
	}
	if !w.answer(ctx, sv, from, entries, meta) || first {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.promote(ctx, sv)
	w.count()
}
