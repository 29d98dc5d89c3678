package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

// Source tells what one registry knows. Run emits an Update for every change
// and returns when ctx ends; emit never blocks for long and may be called from
// any goroutine that Run waits for.
type Source interface {
	Name() string
	Run(ctx context.Context, emit func(Update)) error
}

// Config is what an Aggregator needs.
type Config struct {
	Sources []Source
	Log     *slog.Logger
	// Dir keeps the last good state of the sources named in Remember ("" keeps
	// nothing): those that can be away when Roost starts.
	Dir      string
	Remember []string
	// Guard names the sources of which a mass loss is held. One whose input is
	// itself an act of the operator, as a file is, is not named.
	Guard []string
	// Probe tells whether a held instance still answers; nil dials TCP.
	Probe func(ctx context.Context, at netip.AddrPort) error
	// ProbeEvery is the first pause between probes of a held instance that
	// answers (default 2 s).
	ProbeEvery time.Duration
	Registerer prometheus.Registerer
}

const (
	defaultProbeEvery = 2 * time.Second
	// tick bounds how late a probe or a write begins.
	tick = 100 * time.Millisecond
	// A change is kept at the next tick, but no more often than saveEvery, and at
	// most a tenth of the time goes into that.
	saveEvery = time.Second
	saveRest  = 9
)

// Aggregator merges sources into a Catalog. Its state is owned by the
// goroutine of Run; Catalog and Changed may be used from anywhere.
type Aggregator struct {
	config  Config
	catalog atomic.Pointer[Catalog]
	changed chan struct{}
	release chan string
	queue   struct {
		mu      sync.Mutex
		pending []Update
		poke    chan struct{}
	}
}

// NewAggregator returns an Aggregator whose Catalog is empty and not ready.
func NewAggregator(config Config) *Aggregator {
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.ProbeEvery == 0 {
		config.ProbeEvery = defaultProbeEvery
	}
	if config.Probe == nil {
		config.Probe = dial
	}
	a := &Aggregator{config: config, changed: make(chan struct{}, 1), release: make(chan string, 16)}
	a.queue.poke = make(chan struct{}, 1)
	a.catalog.Store(&Catalog{})
	return a
}

// Catalog returns the newest Catalog; never nil.
func (a *Aggregator) Catalog() *Catalog { return a.catalog.Load() }

// Changed is poked after a new Catalog was published; newest wins.
func (a *Aggregator) Changed() <-chan struct{} { return a.changed }

// Release lets go of the instances of source ("": of every source) that are held
// although the source lost them, and of those that it loses within the next
// seconds.
func (a *Aggregator) Release(source string) { a.release <- source }

// Run starts the sources and merges what they emit until ctx ends. The error
// of a source that ended by itself is returned.
func (a *Aggregator) Run(ctx context.Context) error {
	m := newMerge(a.config)
	m.damp = damper{}
	m.load()
	a.publish(m.catalog())
	group, ctx := errgroup.WithContext(ctx)
	for _, source := range a.config.Sources {
		group.Go(func() error {
			err := source.Run(ctx, a.emit)
			if err != nil && ctx.Err() == nil {
				return fmt.Errorf("source %s: %w", source.Name(), err)
			}
			return nil
		})
	}
	group.Go(func() error { return a.loop(ctx, m, group) })
	err := group.Wait()
	a.config.keep(m.due())
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (a *Aggregator) loop(ctx context.Context, m *merge, group *errgroup.Group) error {
	probes := newProber(a.config, group)
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	var saving chan []string // nil: nothing is being written
	var began, rested time.Time
	window := window{timer: time.NewTimer(0)}
	defer window.timer.Stop()
	for {
		changed := false
		select {
		case <-window.timer.C:
			changed, window.waiting = window.waiting, false
		case <-ctx.Done():
			if saving != nil {
				m.again(<-saving)
			}
			return nil
		case <-a.queue.poke:
			for _, u := range a.take() {
				changed = m.apply(u) || changed
			}
		case name := <-a.release:
			changed = m.releaseHeld(name)
		case r := <-probes.results:
			changed = m.probed(probes.more(r)...)
		case now := <-ticker.C:
			changed = m.tick() || m.overdue(now)
			probes.start(ctx, m)
			if saving != nil || now.Before(rested) {
				break
			}
			if list := m.due(); len(list) > 0 {
				saving, began = make(chan []string, 1), now
				group.Go(func() error {
					saving <- a.config.keep(list)
					return nil
				})
			}
		case failed := <-saving:
			m.again(failed)
			rested = time.Now().Add(max(saveEvery, saveRest*time.Since(began)))
			saving = nil
		}
		if now := time.Now(); changed && window.open(now) {
			a.publish(m.catalog())
			window.published(now)
			probes.start(ctx, m)
		}
	}
}

// catalogEvery is the least time between two Catalogs: what comes meanwhile is in
// one. The first change after a pause does not wait.
const catalogEvery = 5 * time.Millisecond

// window says when the next Catalog may be published.
type window struct {
	timer   *time.Timer // wakes the loop when it opens
	last    time.Time
	waiting bool // for it to open
}

func (w *window) open(now time.Time) bool {
	if left := catalogEvery - now.Sub(w.last); left > 0 {
		if !w.waiting {
			w.waiting = true
			w.timer.Reset(left)
		}
		return false
	}
	return true
}

func (w *window) published(now time.Time) { w.last, w.waiting = now, false }

func (a *Aggregator) emit(u Update) {
	a.queue.mu.Lock()
	a.queue.pending = append(a.queue.pending, u)
	a.queue.mu.Unlock()
	select {
	case a.queue.poke <- struct{}{}:
	default:
	}
}

func (a *Aggregator) take() []Update {
	a.queue.mu.Lock()
	defer a.queue.mu.Unlock()
	pending := a.queue.pending
	a.queue.pending = nil
	return pending
}

func (a *Aggregator) publish(c *Catalog) {
	a.catalog.Store(c)
	select {
	case a.changed <- struct{}{}:
	default:
	}
}
