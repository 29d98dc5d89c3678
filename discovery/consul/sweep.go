package consul

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
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
	first, same := sv.index == 0, sv.index == next && sv.identity == w.which()
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

// verify looks, at the start and after a failure, which Consul this is. One
// that was wiped, or another one at the same address, has another identity, and
// what is missing from it is held, not removed.
func (w *watcher) verify(ctx context.Context) error {
	if !w.suspect.Load() && w.which() != "" {
		return nil
	}
	w.verifying.Lock()
	defer w.verifying.Unlock()
	if !w.suspect.Load() && w.which() != "" {
		return nil
	}
	o, cancel := w.s.options(ctx, 0)
	defer cancel()
	nodes, _, err := w.s.client.Catalog().Nodes(o)
	if err != nil {
		return fmt.Errorf("nodes: %w", err)
	}
	now := identityOf(nodes)
	w.mu.Lock()
	before := w.identity
	w.identity = now
	w.mu.Unlock()
	w.suspect.Store(false)
	if before != "" && before != now {
		w.s.config.Log.Warn("consul has lost its state, or is another one: what it no longer lists is held while it answers", "source", w.s.config.Name, "was", before, "is", now)
	}
	return nil
}

// which is the identity of the Consul that answers; "" before it is known.
func (w *watcher) which() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.identity
}

// identityOf is the oldest node of a catalog with the index at which it was
// made: a Consul that was wiped makes its nodes anew.
func identityOf(nodes []*api.Node) string {
	if len(nodes) == 0 {
		return "no nodes"
	}
	oldest := slices.MinFunc(nodes, func(a, b *api.Node) int {
		return cmp.Or(cmp.Compare(a.CreateIndex, b.CreateIndex), strings.Compare(a.Node, b.Node))
	})
	return fmt.Sprintf("%s/%s/%d", oldest.Node, oldest.ID, oldest.CreateIndex)
}
