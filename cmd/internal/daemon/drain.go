package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/changes"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/drain"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds/envoy"
)

// A drain takes one instance out of service for good: it gets no new traffic and
// finishes what it has in flight, for its service's drain time at most; then
// proxies let go of it. It is a mark in the store, so that it outlives a restart
// and every replica acts on it. An instance in maintenance drains by itself, on
// each replica alone.

// drainWish is what a drain's mark says.
type drainWish struct {
	Timeout float64 `json:"timeout"` // seconds
	Place   string  `json:"place"`   // where the instance was: elsewhere under its name is another one
	Phase   string  `json:"phase"`   // phaseDraining phaseClosing phaseDrained
}

const (
	phaseDraining = "draining"
	phaseClosing  = "closing"
	phaseDrained  = "drained"

	// absentFor is how long a mark stays whose instance this process has never
	// seen: a source may be slow.
	absentFor = time.Minute
)

// drains is the reconciler's knowledge of which instances are on their way out.
type drains struct {
	d       *Daemon
	now     func() time.Time
	started time.Time
	seen    map[string]bool     // marked instances that a catalog has shown; by qualified name
	running map[string]*running // by qualified name
	over    map[string]string   // instances in maintenance that have been let go, with their place
}

func newDrains(d *Daemon, now func() time.Time) *drains {
	return &drains{d: d, now: now, started: now(), seen: map[string]bool{}, running: map[string]*running{}, over: map[string]string{}}
}

// phases is what Build is told: how far each marked instance is. Marks that mean
// nothing any more are left out, and found by stale.
func (d *drains) phases(c *discovery.Catalog, marks []ledger.Mark) map[lb.Key]map[string]lb.Drain {
	var out map[lb.Key]map[string]lb.Drain
	set := func(i *discovery.Instance, phase lb.Drain) {
		if out == nil {
			out = map[lb.Key]map[string]lb.Drain{}
		}
		if out[i.Key] == nil {
			out[i.Key] = map[string]lb.Drain{}
		}
		out[i.Key][i.QualifiedName()] = max(phase, out[i.Key][i.QualifiedName()])
	}
	for _, m := range marks {
		i := instanceNamed(c, m)
		w, err := wishOf(m)
		if i == nil || err != nil || w.Place != changes.Place(i) {
			continue
		}
		d.seen[m.Name] = true
		switch w.Phase {
		case phaseDrained:
			set(i, lb.Drained)
		case phaseClosing:
			set(i, lb.Closing)
		default:
			set(i, lb.Draining)
		}
	}
	for name, where := range d.over {
		i := find(c, name)
		if i == nil || i.Health != discovery.Maintenance || changes.Place(i) != where {
			delete(d.over, name)
			continue
		}
		set(i, lb.Drained)
	}
	return out
}

func drainKey(i *discovery.Instance) ledger.MarkKey {
	return ledger.MarkKey{Kind: ledger.MarkDrain, Name: i.QualifiedName()}
}

func wishOf(m ledger.Mark) (w drainWish, err error) {
	err = json.Unmarshal(m.Data, &w)
	return w, err
}

func instanceNamed(c *discovery.Catalog, m ledger.Mark) *discovery.Instance {
	if m.Kind != ledger.MarkDrain {
		return nil
	}
	return find(c, m.Name)
}

// find finds an instance by its qualified name.
func find(c *discovery.Catalog, name string) *discovery.Instance {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) < 3 {
		return nil
	}
	g := c.Groups.Get(lb.Key{Tenant: parts[0], Service: parts[1]})
	if g == nil {
		return nil
	}
	n := slices.IndexFunc(g.Instances, func(i *discovery.Instance) bool { return i.QualifiedName() == name })
	if n < 0 {
		return nil
	}
	return g.Instances[n]
}

// stale lists the marks whose instance has left or has come back elsewhere: what
// is there under the name later is not meant.
func (d *drains) stale(c *discovery.Catalog, marks []ledger.Mark) (out []ledger.MarkKey) {
	if !c.Ready || slices.ContainsFunc(c.Sources, func(s discovery.SourceStatus) bool { return s.Stale }) {
		return nil // absence proves nothing
	}
	for _, m := range marks {
		if m.Kind != ledger.MarkDrain {
			continue
		}
		i := instanceNamed(c, m)
		w, err := wishOf(m)
		switch {
		case i == nil && !d.seen[m.Name] && d.now().Sub(d.started) < absentFor:
		case err != nil, i == nil, w.Place != changes.Place(i):
			delete(d.seen, m.Name)
			out = append(out, m.Key())
		}
	}
	return out
}

// follow starts a drainer for each instance that has begun to drain, and ends
// those of instances that no longer do.
func (d *drains) follow(ctx context.Context, s *lb.Snapshot) {
	draining := map[string]bool{}
	for svc, e := range onTheirWay(s) {
		name := e.Instance.QualifiedName()
		// Another replica may say first that it is over: this one's drainer then
		// ends by itself, and says what it has found.
		draining[name] = true
		if e.Drain != lb.Drained && d.running[name] == nil {
			d.running[name] = d.start(ctx, s, svc, e)
		}
	}
	for name, r := range d.running {
		if !draining[name] {
			r.cancel(drain.ErrGivenUp)
			delete(d.running, name)
		}
	}
	for _, m := range d.d.ledger.Marks() {
		draining[m.Name] = draining[m.Name] || m.Kind == ledger.MarkDrain
	}
	d.d.outcomes.Keep(draining)
}

// onTheirWay lists the endpoints that drain or have drained.
func onTheirWay(s *lb.Snapshot) iter.Seq2[*lb.Service, *lb.Endpoint] {
	return func(yield func(*lb.Service, *lb.Endpoint) bool) {
		for _, svc := range s.Draining {
			for _, e := range svc.Endpoints {
				if e.Drain != lb.NotDraining && !yield(svc, e) {
					return
				}
			}
		}
	}
}

// running is a drain that is waited for.
type running struct {
	*drain.Drain
	cancel context.CancelCauseFunc
}

// config is what every drain of this replica has.
func (d *drains) config() drain.Config {
	c := drain.Config{
		Proxies: d.d.XDS, Outcomes: d.d.outcomes,
		Acked: func() uint64 {
			p := d.d.progress.Load()
			if p == nil {
				return 0
			}
			return p.Acked
		},
		Close: func(ctx context.Context, instance string) error {
			return d.d.do(ctx, func(r *reconciler) error {
				r.phase(instance, phaseClosing)
				return nil
			})
		},
	}
	if d.d.group != nil {
		c.Replicas = d.d.group
	}
	return c
}

func (d *drains) start(ctx context.Context, s *lb.Snapshot, svc *lb.Service, e *lb.Endpoint) *running {
	timeout, mark := svc.Spec.DrainTime(), uint64(0)
	if m, ok := d.d.ledger.Mark(drainKey(e.Instance)); ok {
		if w, err := wishOf(m); err == nil {
			mark, timeout = m.Generation, time.Duration(w.Timeout*float64(time.Second))
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	r := &running{drain.New(d.config(), drain.Wish{Version: s.Version, Service: svc, Endpoint: e, Timeout: timeout, Mark: mark}), cancel}
	d.d.drainers.Go(func() {
		defer cancel(nil)
		if r.Run(ctx) != nil {
			return
		}
		_ = d.d.do(ctx, func(rec *reconciler) error { // when Roost stops, its next start goes on
			rec.drained(e.Instance, mark > 0)
			return nil
		})
	})
	return r
}

// drainCheck is where proxies ask whether to close an instance's connections. One
// in another network namespace does not reach it.
func (d *Daemon) drainCheck(c *config.Config) netip.AddrPort {
	if len(c.XDS.Sockets) > 0 {
		return netip.AddrPort{}
	}
	at := c.XDS.Address
	if len(d.xdsOn) > 0 {
		if bound, err := netip.ParseAddrPort(d.xdsOn[0].Addr().String()); err == nil {
			at = bound
		}
	}
	if at.Addr().IsUnspecified() {
		at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	}
	return at
}

// publishClosing tells the health service whose connections are to be closed.
func (d *Daemon) publishClosing(s *lb.Snapshot) {
	closing := map[string]bool{}
	for _, e := range onTheirWay(s) {
		if e.Drain == lb.Closing {
			closing[envoy.DrainName(e.Instance.QualifiedName())] = true
		}
	}
	d.closing.Store(&closing)
}

// isClosing answers the health service.
func (d *Daemon) isClosing(name string) bool {
	closing := d.closing.Load()
	return closing != nil && (*closing)[name]
}

// drained lets go of an instance after its drain.
func (r *reconciler) drained(i *discovery.Instance, marked bool) {
	if !marked {
		r.drains.over[i.QualifiedName()] = changes.Place(i)
		return
	}
	r.phase(i.QualifiedName(), phaseDrained)
}

// phase moves a drain's mark on.
func (r *reconciler) phase(name, next string) {
	key := ledger.MarkKey{Kind: ledger.MarkDrain, Name: name}
	r.stage(func(tx *ledger.Tx) {
		m, ok := tx.Mark(key)
		if !ok {
			return
		}
		w, err := wishOf(m)
		if err != nil || w.Phase == phaseDrained || w.Phase == next {
			return
		}
		w.Phase = next
		if m.Data, err = json.Marshal(w); err == nil {
			tx.PutMark(m)
		}
	})
}

// The errors of drains that a caller tells apart.
var (
	ErrUnknownInstance = errors.New("there is no such instance")
	ErrNotDraining     = errors.New("the instance does not drain")
)

// AmbiguousError says that several instances have a name.
type AmbiguousError struct {
	Name       string
	Candidates []string // full names
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%d instances are called %s: say which one: %s", len(e.Candidates), e.Name, strings.Join(e.Candidates, ", "))
}

// Instance finds an instance by its full name, tenant/service/id[@node], or by
// its bare id. The error wraps ErrUnknownInstance or is an *AmbiguousError.
func Instance(c *discovery.Catalog, name string) (*discovery.Instance, error) {
	if i := find(c, name); i != nil {
		return i, nil
	}
	var found []*discovery.Instance
	for _, g := range c.Groups.All() {
		for _, i := range g.Instances {
			if name == i.Name() || name == i.ID || name == i.ID+"@"+i.Node {
				found = append(found, i)
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%w: %s; `roost instances` lists them", ErrUnknownInstance, name)
	case 1:
		return found[0], nil
	}
	e := &AmbiguousError{Name: name}
	for _, i := range found {
		e.Candidates = append(e.Candidates, i.QualifiedName())
	}
	slices.Sort(e.Candidates)
	return nil, e
}

// Drain takes an instance out of service and returns when every proxy has let go
// of it or its time is over. timeout 0 is the service's. The error wraps
// ErrUnknownInstance, is an *AmbiguousError, or says that the wish could not be
// written down.
func (d *Daemon) Drain(ctx context.Context, name string, timeout time.Duration) (drain.Result, error) {
	var waiting *running
	var full string
	begun := time.Now()
	err := d.do(ctx, func(r *reconciler) error {
		i, err := Instance(r.catalog(), name)
		if err != nil {
			return err
		}
		full = i.QualifiedName()
		limit := timeout
		if svc := d.snapshot.Load().Services.Get(i.Key); limit == 0 && svc != nil {
			limit = svc.Spec.DrainTime()
		}
		data, err := json.Marshal(drainWish{limit.Seconds(), changes.Place(i), phaseDraining})
		if err != nil {
			return err
		}
		key := drainKey(i)
		r.stage(func(tx *ledger.Tx) {
			if m, ok := tx.Mark(key); ok {
				if w, err := wishOf(m); err == nil && w.Place == changes.Place(i) {
					return // it drains, or has drained, already
				}
			}
			tx.PutMark(ledger.Mark{Kind: key.Kind, Name: key.Name, Data: data})
		})
		return nil
	})
	if err != nil {
		return drain.Result{}, err
	}
	if err := d.look(ctx, func(r *reconciler) { waiting = r.drains.running[full] }); err != nil {
		return drain.Result{}, err
	}
	if waiting == nil { // it has drained before, or no proxy can have it
		return drain.Done(full, begun), nil
	}
	return waiting.Result(ctx)
}

// Undrain puts an instance back into service. The error wraps ErrUnknownInstance
// or ErrNotDraining, or is an *AmbiguousError.
func (d *Daemon) Undrain(ctx context.Context, name string) (full string, err error) {
	err = d.do(ctx, func(r *reconciler) error {
		i, err := Instance(r.catalog(), name)
		if err != nil {
			return err
		}
		full = i.QualifiedName()
		key := drainKey(i)
		_, marked := d.ledger.Mark(key)
		switch {
		case !marked && i.Health == discovery.Maintenance:
			return fmt.Errorf("%w by Roost: it is in maintenance at its source; end that there (`consul maint -disable`)", ErrNotDraining)
		case !marked:
			return fmt.Errorf("%w: %s", ErrNotDraining, full)
		}
		r.stage(func(tx *ledger.Tx) { tx.DeleteMark(key) })
		return nil
	})
	return full, err
}
