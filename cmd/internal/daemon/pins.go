package daemon

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/cmd/internal/pins"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds/envoy"
)

// A version of a resource that several proxies refuse is pinned: every proxy gets
// the last good one in its place, also one that starts later. It is a mark in the
// store, so that it outlives a restart and every replica applies it. It does
// nothing once the resource is built otherwise, and then its mark goes.

const (
	// settledAfter is how long after the first World every proxy that runs has
	// come and has said what it holds.
	settledAfter = time.Minute
	// unbuiltFor is how long a mark stays whose version is not built any more: what
	// a source shows may go back and forth.
	unbuiltFor = 5 * time.Second
	// judgedAtOnce bounds how many refused resources are looked at in one go.
	judgedAtOnce = 100
)

// refusals are the resources of which a version was refused since the last look.
type refusals struct {
	changed chan struct{} // one slot
	mu      sync.Mutex
	names   map[envoy.Name]bool // guarded by mu
}

func newRefusals() *refusals {
	return &refusals{changed: make(chan struct{}, 1), names: map[envoy.Name]bool{}}
}

func (f *refusals) add(n envoy.Name) {
	f.mu.Lock()
	f.names[n] = true
	f.mu.Unlock()
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

func (f *refusals) take() map[envoy.Name]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	names := f.names
	f.names = map[envoy.Name]bool{}
	return names
}

// pinning is what the reconciler knows of refused versions.
type pinning struct {
	log     func(msg string, args ...any)
	open    map[envoy.Name]bool             // a version is refused, and not pinned
	read    map[ledger.MarkKey]*pinMark     // of the ledger's marks
	inForce map[ledger.MarkKey]bool         // at the last build
	since   map[ledger.MarkKey]time.Time    // marks whose version is not built any more
	gauges  [envoy.Types]prometheus.Gauge   // resources that are pinned
	made    [envoy.Types]prometheus.Counter // pins that came into force
}

// pinMark is a mark of the ledger, understood.
type pinMark struct {
	generation uint64
	record     pins.Record
	pin        *envoy.Pin // nil: it is not understood
}

// pinState is what is told of pins. It is immutable.
type pinState struct {
	inForce []pins.Record
	denied  []pins.Verdict // versions that several proxies refuse and that are not pinned
}

func newPinning(d *Daemon) *pinning {
	p := &pinning{log: d.log.Warn, open: map[envoy.Name]bool{}, read: map[ledger.MarkKey]*pinMark{}, inForce: map[ledger.MarkKey]bool{}, since: map[ledger.MarkKey]time.Time{}}
	gauges := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "roost_xds_pinned", Help: "Resources that are kept at their last good version, because several proxies refuse the one of now."}, []string{"type"})
	made := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_pins_total", Help: "Resources that came to be pinned."}, []string{"type"})
	for t := range envoy.Types {
		p.gauges[t], p.made[t] = prometheus.NewGauge(prometheus.GaugeOpts{}), prometheus.NewCounter(prometheus.CounterOpts{})
		if pins.Pinnable(t) {
			p.gauges[t], p.made[t] = gauges.WithLabelValues(t.String()), made.WithLabelValues(t.String())
		}
	}
	if d.Registry != nil {
		d.Registry.MustRegister(gauges, made)
	}
	return p
}

// load reads the marks, and returns the pins of those that are in force. What has
// not changed keeps its pointer.
func (p *pinning) load(marks []ledger.Mark) (out []*envoy.Pin) {
	next := map[ledger.MarkKey]*pinMark{}
	for _, m := range marks {
		if m.Kind != ledger.MarkPin {
			continue
		}
		k := p.read[m.Key()]
		if k == nil || k.generation != m.Generation {
			k = p.understand(m, k)
		}
		next[m.Key()] = k
		if k.pin != nil && k.record.InForce() {
			out = append(out, k.pin)
		}
	}
	p.read = next
	return out
}

func (p *pinning) understand(m ledger.Mark, before *pinMark) *pinMark {
	k := &pinMark{generation: m.Generation}
	var err error
	if k.record, err = pins.Read(m); err == nil {
		k.pin, err = k.record.Pin()
	}
	if err != nil {
		k.pin = nil // a newer Roost's
		p.log("a mark of the ledger is not understood and does nothing", "mark", m.Name, "error", err)
	} else if before != nil && before.pin != nil && before.record.Good == k.record.Good {
		k.pin = before.pin
	}
	return k
}

// judge looks at what proxies refuse, and says whether a build has to write
// something down.
func (r *reconciler) judge() (staged bool) {
	p := r.pins
	for n := range r.d.refusals.take() {
		p.open[n] = true
	}
	if len(p.open) == 0 || r.world == nil || r.now().Before(r.patience.at) {
		return false
	}
	names := make([]envoy.Name, 0, len(p.open))
	for n := range p.open {
		if names = append(names, n); len(names) == judgedAtOnce {
			break
		}
	}
	stands := r.proxies.Stands(names...)
	settled := r.served && r.now().Sub(r.quarantine.from) >= settledAfter
	var denied []pins.Verdict
	for _, n := range names {
		verdicts := pins.Decide(n, stands[n], func(version string) *envoy.Resource { return r.world.Built(n, version) }, settled)
		if len(verdicts) == 0 {
			delete(p.open, n)
		}
		for _, v := range verdicts {
			staged = r.pin(&v) || staged
			if k := p.read[pins.Key(v.Name, v.Refused)]; k != nil && k.pin != nil && k.record.InForce() && !r.overlaid.Lawful(k.pin) {
				v.Denied = "its earlier version leads to a service that does not allow it any more"
			}
			if v.Denied != "" && len(v.By) >= pins.Several {
				denied = append(denied, v)
			}
		}
	}
	r.tellPins(func(s *pinState) { s.denied = denied })
	return staged
}

// pin stages what a verdict comes to, and says whether that is anything. Where
// replicas share the store even a first refusal is written down: the second one
// may be another's.
func (r *reconciler) pin(v *pins.Verdict) bool {
	key := pins.Key(v.Name, v.Refused)
	known := r.pins.read[key]
	if known == nil {
		switch {
		case v.Denied != "", r.d.group == nil && len(v.By) < pins.Several:
			return false
		case len(r.pins.read) >= pins.MaxRecords:
			v.Denied = fmt.Sprintf("%d resources are pinned already", pins.MaxRecords)
			return false
		}
	}
	verdict := *v // the transaction runs later
	add := func(record *pins.Record) (news bool, err error) {
		if verdict.Denied != "" {
			return record.Join(verdict.By), nil
		}
		own, err := pins.RecordOf(verdict)
		return err == nil && record.Merge(own), err
	}
	if known != nil {
		now := known.record
		now.By = slices.Clone(now.By)
		if news, err := add(&now); !news || err != nil || known.pin == nil {
			return false
		}
	}
	r.stage(func(tx *ledger.Tx) {
		record, err := pins.RecordOf(verdict)
		if err != nil {
			return
		}
		if m, ok := tx.Mark(key); ok {
			if record, err = pins.Read(m); err != nil {
				return
			}
			if news, err := add(&record); !news || err != nil {
				return
			}
		}
		if m, err := record.Mark(); err == nil {
			tx.PutMark(m)
		}
	})
	return true
}

// unbuilt lists the marks whose version nothing leads to any more.
func (r *reconciler) unbuilt() (out []ledger.MarkKey) {
	p, c := r.pins, r.catalog()
	if len(p.read) == 0 || r.world == nil || !c.Ready || slices.ContainsFunc(c.Sources, func(s discovery.SourceStatus) bool { return s.Stale }) || !r.d.alone() {
		clear(p.since)
		return nil
	}
	for key, k := range p.read {
		if k.pin == nil || r.world.Built(k.pin.Name, k.pin.Refused) != nil {
			delete(p.since, key)
			continue
		}
		since, ok := p.since[key]
		if !ok {
			p.since[key] = r.now()
		} else if r.now().Sub(since) >= unbuiltFor {
			delete(p.since, key)
			out = append(out, key)
		}
	}
	return out
}

// pinsApplied tells what the pins of a World that is new come to.
func (r *reconciler) pinsApplied(world *envoy.Translation, overlaid *envoy.Pinned) {
	p := r.pins
	before := p.inForce
	p.inForce = map[ledger.MarkKey]bool{}
	var inForce []pins.Record
	var count [envoy.Types]float64
	for key, k := range p.read {
		if k.pin == nil || !k.record.InForce() || !overlaid.Lawful(k.pin) || world.Built(k.pin.Name, k.pin.Refused) == nil {
			continue
		}
		p.inForce[key] = true
		inForce = append(inForce, k.record)
		count[k.pin.Type]++
		if !before[key] {
			p.made[k.pin.Type].Inc()
			r.d.Events.Add(events.Fact(events.ResourcePinned, "", fmt.Sprintf("%s is refused by several proxies and kept at version %s", key.Name, k.record.Good)))
		}
	}
	for key := range before {
		if !p.inForce[key] {
			r.d.Events.Add(events.Fact(events.ResourceUnpinned, "", key.Name+" is built otherwise, and not pinned any more"))
		}
	}
	for t := range envoy.Types {
		p.gauges[t].Set(count[t])
	}
	slices.SortFunc(inForce, func(a, b pins.Record) int { return strings.Compare(a.Name+a.Refused, b.Name+b.Refused) })
	r.tellPins(func(s *pinState) { s.inForce = inForce })
}

// tellPins publishes what is known of pins with a change.
func (r *reconciler) tellPins(change func(*pinState)) {
	next := &pinState{}
	if s := r.d.pinned.Load(); s != nil {
		*next = *s
	}
	change(next)
	r.d.pinned.Store(next)
}

// pinProblems are what is pinned, and what cannot be.
func (d *Daemon) pinProblems() (out []lb.Problem) {
	state, snapshot := d.pinned.Load(), d.snapshot.Load()
	if state == nil || snapshot == nil {
		return nil
	}
	for _, r := range state.inForce {
		out = append(out, r.Problem(snapshot))
	}
	for _, v := range state.denied {
		out = append(out, v.Problem(snapshot))
	}
	return out
}
