package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

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
	// Probe tells whether a held instance still answers; nil dials TCP.
	Probe func(ctx context.Context, at netip.AddrPort) error
	// ProbeEvery is the pause between probes of held instances (default 2 s).
	ProbeEvery time.Duration
}

const (
	defaultProbeEvery = 2 * time.Second
	probeTimeout      = time.Second
	deadAfterProbes   = 3
	// A change is kept within saveTick, but no more often than saveEvery.
	saveTick  = 100 * time.Millisecond
	saveEvery = time.Second
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
	a.catalog.Store(&Catalog{Groups: map[Key]*Group{}})
	return a
}

// Catalog returns the newest Catalog; never nil.
func (a *Aggregator) Catalog() *Catalog { return a.catalog.Load() }

// Changed is poked after a new Catalog was published; newest wins.
func (a *Aggregator) Changed() <-chan struct{} { return a.changed }

// Release lets go of the instances of source that are held although the
// source no longer lists them.
func (a *Aggregator) Release(source string) { a.release <- source }

// Run starts the sources and merges what they emit until ctx ends. The error
// of a source that ended by itself is returned.
func (a *Aggregator) Run(ctx context.Context) error {
	m := newMerge(a.config)
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
	dead := make(chan probeResult, 64)
	group.Go(func() error { return a.loop(ctx, m, dead, group) })
	err := group.Wait()
	m.save()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (a *Aggregator) loop(ctx context.Context, m *merge, results chan probeResult, group *errgroup.Group) error {
	probe := time.NewTicker(a.config.ProbeEvery)
	defer probe.Stop()
	save := time.NewTicker(saveTick)
	var saved time.Time
	defer save.Stop()
	for {
		changed := false
		select {
		case <-ctx.Done():
			return nil
		case <-a.queue.poke:
			for _, u := range a.take() {
				changed = m.apply(u) || changed
			}
		case name := <-a.release:
			changed = m.releaseHeld(name)
		case r := <-results:
			changed = m.probed(r)
		case <-probe.C:
			a.startProbes(ctx, m, results, group)
		case now := <-save.C:
			if now.Sub(saved) >= saveEvery && m.save() {
				saved = now
			}
		}
		if changed {
			a.publish(m.catalog())
		}
	}
}

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

type probeResult struct {
	source string
	id     instanceID
	alive  bool
}

func (a *Aggregator) startProbes(ctx context.Context, m *merge, results chan probeResult, group *errgroup.Group) {
	for source, s := range m.sources {
		for id, h := range s.held {
			if h.probing {
				continue
			}
			h.probing = true
			at := netip.AddrPortFrom(h.instance.Address, firstPort(h.instance))
			group.Go(func() error {
				ctx, cancel := context.WithTimeout(ctx, probeTimeout)
				defer cancel()
				r := probeResult{source: source, id: id, alive: a.config.Probe(ctx, at) == nil}
				select {
				case results <- r:
				case <-ctx.Done():
				}
				return nil
			})
		}
	}
}

func firstPort(i *Instance) uint16 {
	if len(i.Ports) == 0 {
		return 0
	}
	return i.Ports[0].Number
}

func dial(ctx context.Context, at netip.AddrPort) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	return conn.Close()
}

// merge is the Aggregator's state, owned by its loop.
type merge struct {
	config  Config
	sources map[string]*sourceState
	groups  map[Key]*Group
	dirty   map[Key]touched
	version uint64
	now     func() time.Time
}

type touched struct {
	index uint64
	seen  time.Time
}

type instanceID struct {
	key      Key
	id, node string
}

func idOf(i *Instance) instanceID { return instanceID{i.Key, i.ID, i.Node} }

type heldInstance struct {
	instance *Instance
	scope    string
	failed   int
	probing  bool
}

type sourceState struct {
	status   SourceStatus
	scopes   map[string]*scopeState
	held     map[instanceID]*heldInstance
	unsaved  bool
	complete bool
}

type scopeState struct {
	Instances []*Instance `json:"instances"`
	Index     uint64      `json:"index"`
	Identity  string      `json:"identity,omitempty"`
	problems  []Problem
}

func newMerge(config Config) *merge {
	m := &merge{config: config, sources: map[string]*sourceState{}, groups: map[Key]*Group{}, dirty: map[Key]touched{}, now: time.Now}
	for _, s := range config.Sources {
		m.source(s.Name())
	}
	return m
}

func (m *merge) source(name string) *sourceState {
	s := m.sources[name]
	if s == nil {
		s = &sourceState{status: SourceStatus{Name: name}, scopes: map[string]*scopeState{}, held: map[instanceID]*heldInstance{}}
		m.sources[name] = s
	}
	return s
}

// apply takes one Update and tells whether a new Catalog is due.
func (m *merge) apply(u Update) bool {
	s := m.source(u.Source)
	if u.Err != nil {
		return m.fail(s, u)
	}
	changed := m.recover(s)
	if u.Complete {
		changed = m.completed(s, u) || changed
	}
	if u.Scope == "" {
		return changed
	}
	return m.replace(s, u) || changed
}

func (m *merge) fail(s *sourceState, u Update) bool {
	text := u.Err.Error()
	if s.status.Stale && s.status.LastError == text {
		return false
	}
	if !s.status.Stale {
		s.status.Stale, s.status.Since = true, m.now()
		m.config.Log.Warn("source is stale, its last good state stays", "source", u.Source, "error", text)
		m.markStale(s, true)
	}
	s.status.LastError = text
	return true
}

func (m *merge) recover(s *sourceState) bool {
	if !s.status.Stale {
		return false
	}
	s.status.Stale, s.status.Since = false, m.now()
	m.config.Log.Info("source answers again", "source", s.status.Name)
	m.markStale(s, false)
	return true
}

// markStale copies each instance of s with the new mark; a published Instance
// is never written to.
func (m *merge) markStale(s *sourceState, stale bool) {
	for _, scope := range s.scopes {
		for n, i := range scope.Instances {
			if i.Stale == stale {
				continue
			}
			marked := *i
			marked.Stale = stale
			scope.Instances[n] = &marked
			m.touch(i.Key, touched{})
		}
	}
}

func (m *merge) touch(k Key, t touched) {
	if old, ok := m.dirty[k]; ok && t.seen.IsZero() {
		t = old
	}
	m.dirty[k] = t
}

func (m *merge) completed(s *sourceState, u Update) bool {
	changed := !s.status.Ready
	s.status.Ready, s.complete = true, true
	for scope := range s.scopes {
		if slices.Contains(u.Scopes, scope) {
			continue
		}
		changed = m.replace(s, Update{Source: u.Source, Scope: scope, Index: u.Index, Seen: u.Seen, Identity: u.Identity, Regressed: u.Regressed}) || changed
	}
	return changed
}

// replace swaps one scope's instances. Where the source's index fell, what is
// missing is held instead of removed.
func (m *merge) replace(s *sourceState, u Update) bool {
	old := s.scopes[u.Scope]
	if old == nil {
		old = &scopeState{}
	}
	before := map[instanceID]*Instance{}
	for _, i := range old.Instances {
		before[idOf(i)] = i
	}
	regressed := u.Regressed || u.Index != 0 && u.Index < old.Index || u.Identity != "" && old.Identity != "" && u.Identity != old.Identity
	next := &scopeState{Index: u.Index, Identity: u.Identity, problems: u.Problems}
	changed := len(u.Problems) != len(old.problems) || !slices.EqualFunc(u.Problems, old.problems, sameProblem)
	at := touched{u.Index, u.Seen}
	for n := range u.Instances {
		i := u.Instances[n]
		i.Source = u.Source
		i.Weight = max(i.Weight, 1)
		id := idOf(&i)
		delete(s.held, id)
		if b := before[id]; b != nil && sameInstance(b, &i) {
			next.Instances = append(next.Instances, b)
		} else {
			next.Instances = append(next.Instances, &i)
			changed = true
			m.touch(i.Key, at)
		}
		delete(before, id)
	}
	for id, i := range before {
		if h := s.held[id]; h != nil || regressed {
			next.Instances = append(next.Instances, m.hold(s, u.Scope, i, at))
			changed = changed || h == nil
			continue
		}
		changed = true
		m.touch(i.Key, at)
	}
	s.scopes[u.Scope] = next
	if len(next.Instances) == 0 && len(next.problems) == 0 {
		delete(s.scopes, u.Scope)
	}
	s.unsaved = s.unsaved || changed || next.Index != old.Index || next.Identity != old.Identity
	s.status.Held = len(s.held)
	return changed
}

func (m *merge) hold(s *sourceState, scope string, i *Instance, at touched) *Instance {
	id := idOf(i)
	if h := s.held[id]; h != nil {
		return h.instance
	}
	kept := *i
	kept.Stale = true
	s.held[id] = &heldInstance{instance: &kept, scope: scope}
	m.touch(i.Key, at)
	m.config.Log.Warn("source lost an instance without a deregistration, it is held", "source", s.status.Name, "instance", i.QualifiedName())
	return &kept
}

func (m *merge) probed(r probeResult) bool {
	s := m.sources[r.source]
	h := s.held[r.id]
	if h == nil {
		return false
	}
	h.probing = false
	if r.alive {
		h.failed = 0
		return false
	}
	if h.failed++; h.failed < deadAfterProbes {
		return false
	}
	return m.letGo(s, r.id)
}

func (m *merge) letGo(s *sourceState, id instanceID) bool {
	h := s.held[id]
	delete(s.held, id)
	s.status.Held = len(s.held)
	scope := s.scopes[h.scope]
	if scope == nil {
		return false
	}
	kept := &scopeState{Index: scope.Index, Identity: scope.Identity, problems: scope.problems}
	for _, i := range scope.Instances {
		if idOf(i) != id {
			kept.Instances = append(kept.Instances, i)
		}
	}
	s.scopes[h.scope] = kept
	s.unsaved = true
	m.touch(id.key, touched{scope.Index, m.now()})
	m.config.Log.Info("held instance is gone", "source", s.status.Name, "instance", h.instance.QualifiedName())
	return true
}

func (m *merge) releaseHeld(name string) bool {
	changed := false
	for source, s := range m.sources {
		if name != "" && source != name {
			continue
		}
		for id := range s.held {
			changed = m.letGo(s, id) || changed
		}
	}
	return changed
}

// catalog builds the next Catalog; groups that nothing touched keep their
// pointer.
func (m *merge) catalog() *Catalog {
	m.version++
	if len(m.dirty) > 0 {
		m.regroup()
	}
	c := &Catalog{Version: m.version, Groups: m.groups, Ready: true}
	for _, name := range slices.Sorted(maps.Keys(m.sources)) {
		s := m.sources[name]
		c.Sources = append(c.Sources, s.status)
		c.Ready = c.Ready && s.status.Ready
		c.Problems = append(c.Problems, m.sourceProblems(s)...)
	}
	return c
}

func (m *merge) regroup() {
	groups := maps.Clone(m.groups)
	fresh := map[Key][]*Instance{}
	for _, name := range slices.Sorted(maps.Keys(m.sources)) {
		for _, scope := range m.sources[name].scopes {
			for _, i := range scope.Instances {
				if _, ok := m.dirty[i.Key]; ok {
					fresh[i.Key] = append(fresh[i.Key], i)
				}
			}
		}
	}
	for key, at := range m.dirty {
		list := fresh[key]
		if len(list) == 0 {
			delete(groups, key)
			continue
		}
		slices.SortFunc(list, compareInstances)
		list = slices.CompactFunc(list, func(a, b *Instance) bool { return idOf(a) == idOf(b) })
		groups[key] = &Group{Key: key, Instances: list, Index: at.index, Seen: at.seen}
	}
	m.groups = groups
	clear(m.dirty)
}

func (m *merge) sourceProblems(s *sourceState) []Problem {
	var problems []Problem
	if s.status.Stale {
		problems = append(problems, Problem{Code: "source_stale", Severity: SeverityWarning, Object: s.status.Name, Place: s.status.Name,
			Message: "does not answer; its last good state is served: " + s.status.LastError,
			Fix:     "look at the source; nothing has to be done here when it answers again", Since: s.status.Since})
	}
	if s.status.Held > 0 {
		problems = append(problems, Problem{Code: "mass_loss_held", Severity: SeverityWarning, Object: s.status.Name, Place: s.status.Name,
			Message: fmt.Sprintf("its state was lost or restored: %d instances that it no longer lists are kept while they answer", s.status.Held),
			Fix:     "register the instances again, or let go of them by stopping them", Since: s.status.Since})
	}
	for _, name := range slices.Sorted(maps.Keys(s.scopes)) {
		problems = append(problems, s.scopes[name].problems...)
	}
	return problems
}

func sameProblem(a, b Problem) bool {
	return a.Code == b.Code && a.Object == b.Object && a.Place == b.Place && a.Message == b.Message
}
