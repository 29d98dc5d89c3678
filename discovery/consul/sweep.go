package consul

import (
	"context"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"
)

// sweepLoop asks the services that have no query of their own whenever
// something in the catalog has changed.
func (w *watcher) sweepLoop(ctx context.Context) error {
	timer := time.NewTimer(sweepAnyway)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case index := <-w.signal:
			if !pause(ctx, explainWait) {
				return ctx.Err()
			}
			if w.isExplained(index) {
				timer.Reset(sweepLater)
				continue
			}
		case <-timer.C:
		}
		began := time.Now()
		w.sweep(ctx)
		timer.Reset(sweepAnyway)
		// At most a tenth of the time goes into sweeps, however busy the catalog.
		if !pause(ctx, max(sweepEvery, sweepShare*time.Since(began))) {
			return ctx.Err()
		}
	}
}

func (w *watcher) isExplained(index uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.explained[index]
}

func (w *watcher) sweep(ctx context.Context) {
	w.mu.Lock()
	var shared []*service
	for _, sv := range w.services {
		if sv.cancel == nil && !sv.gone {
			shared = append(shared, sv)
		}
	}
	w.mu.Unlock()
	var group errgroup.Group
	group.SetLimit(sweepWorkers)
	for _, sv := range shared {
		group.Go(func() error {
			w.ask(ctx, sv)
			return nil
		})
	}
	_ = group.Wait() // asks report their own errors
}

// ask looks once whether a shared service has changed; one that has is given a
// query of its own, since it is likely to change again.
func (w *watcher) ask(ctx context.Context, sv *service) {
	entries, next, err := w.s.health(ctx, sv.name, 0)
	if err == nil {
		err = w.verify(ctx)
	}
	if err != nil {
		if !isGone(ctx, err) {
			w.failed(sv.name, err)
		}
		return
	}
	sv.busy.Lock()
	first, same := sv.index == 0, sv.index == next && sv.epoch == w.epoch.Load()
	sv.busy.Unlock()
	if same {
		return
	}
	if w.answer(sv, entries, next) || first {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.promote(ctx, sv)
	w.count()
}

// identity is which Consul this is: the nodes that it has, each with the index
// at which it was made. A Consul that was wiped, or another one at the same
// address, makes its nodes anew.
type identity struct{ nodes map[string]nodeID }

type nodeID struct {
	id      string
	created uint64
}

// verify looks, after a failure, whether this is still the same Consul. One
// that has lost its state makes every service's next answer count as such, so
// that what is missing from it is held, not removed.
func (w *watcher) verify(ctx context.Context) error {
	if !w.suspect.Load() && w.known() {
		return nil
	}
	w.verifying.Lock()
	defer w.verifying.Unlock()
	if !w.suspect.Load() && w.known() {
		return nil
	}
	o, cancel := w.s.options(ctx, 0)
	defer cancel()
	list, _, err := w.s.client.Catalog().Nodes(o)
	if err != nil {
		return err
	}
	now := nodesOf(list)
	lost := false
	for name, id := range now {
		before, ok := w.identity.nodes[name]
		lost = lost || ok && before != id
	}
	if lost {
		w.epoch.Add(1)
		w.s.config.Log.Warn("consul has lost its state, or is another one: what it no longer lists is held while it answers", "source", w.s.config.Name)
	}
	w.mu.Lock()
	w.identity.nodes = now
	w.mu.Unlock()
	w.suspect.Store(false)
	return nil
}

func (w *watcher) known() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.identity.nodes != nil
}

func nodesOf(list []*api.Node) map[string]nodeID {
	out := make(map[string]nodeID, len(list))
	for _, n := range list {
		out[n.Node] = nodeID{n.ID, n.CreateIndex}
	}
	return out
}
