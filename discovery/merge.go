package discovery

import (
	"maps"
	"slices"
	"time"
)

// merge is the Aggregator's state, owned by its loop.
type merge struct {
	config  Config
	metrics *metrics
	sources map[string]*sourceState
	groups  Table[Key, *Group]
	dirty   map[Key]touched
	where   map[Key]map[where]bool // the scopes that have instances of a service
	damp    damper                 // nil: nothing is damped
	late    map[Key]bool           // dirty for what flaps alone
	told    map[Key]time.Time      // when a service that flaps was told
	version uint64
	now     func() time.Time
}

// where is one scope of one source.
type where struct{ source, scope string }

// touched says what changed a group last; the zero value: a mark alone.
type touched struct {
	source string
	index  uint64
	seen   time.Time
}

type instanceID struct {
	key      Key
	id, node string
}

func idOf(i *Instance) instanceID { return instanceID{i.Key, i.ID, i.Node} }

type heldInstance struct {
	instance *Instance // as it is served
	listed   *Instance // as the source lists it now; nil: not at all
	scope    string
	probing
}

type sourceState struct {
	status   SourceStatus
	scopes   map[string]*scopeState
	held     map[instanceID]*heldInstance
	returned time.Time       // when one that was held was last listed again
	limited  map[string]bool // scopes of which the last answer said Regressed
	reason   string          // why the guard last tripped
	guard    guard
	top      uint64          // the highest index of its scopes
	serving  map[string]int  // instances that take traffic, of each tenant
	total    int             // and of all
	troubled map[string]bool // scopes with Problems
	said     time.Time       // when LastError was last published
	unsaved  bool
	complete bool
}

// scopeState is what a source says of one scope; it is replaced, never written
// to, so that it can be kept on disk meanwhile.
type scopeState struct {
	Instances []*Instance `json:"instances"`
	Index     uint64      `json:"index"`
	Identity  string      `json:"identity,omitempty"`
	problems  []Problem
}

func newMerge(config Config) *merge {
	m := &merge{config: config, metrics: newMetrics(config.Registerer), sources: map[string]*sourceState{}, dirty: map[Key]touched{}, where: map[Key]map[where]bool{}, late: map[Key]bool{}, told: map[Key]time.Time{}, now: time.Now}
	for _, s := range config.Sources {
		m.source(s.Name())
	}
	return m
}

func (m *merge) source(name string) *sourceState {
	s := m.sources[name]
	if s == nil {
		s = &sourceState{status: SourceStatus{Name: name}, scopes: map[string]*scopeState{}, held: map[instanceID]*heldInstance{}, limited: map[string]bool{},
			guard: newGuard(slices.Contains(m.config.Guard, name)), serving: map[string]int{}, troubled: map[string]bool{}}
		m.sources[name] = s
		if s.guard.on { // the series are there before the first loss
			m.metrics.held.WithLabelValues(name).Set(0)
			m.metrics.massLoss.WithLabelValues(name).Add(0)
		}
	}
	return s
}

// sayAgain bounds how often another error of a source that is stale already is
// worth a new Catalog: each of its scopes has an error of its own.
const sayAgain = 10 * time.Second

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
	text, now := u.Err.Error(), m.now()
	if s.status.Stale && (s.status.LastError == text || now.Sub(s.said) < sayAgain) {
		return false
	}
	s.said = now
	if !s.status.Stale {
		s.status.Stale, s.status.Since = true, now
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
// is never written to. What is held stays stale: the source's answer was that
// it does not list it.
func (m *merge) markStale(s *sourceState, stale bool) {
	for name, scope := range s.scopes {
		marked := *scope
		marked.Instances = nil
		for _, i := range scope.Instances {
			h := s.held[idOf(i)]
			if wanted := stale || h != nil; i.Stale != wanted {
				c := *i
				c.Stale = wanted
				i = &c
				if h != nil {
					h.instance = i
				}
				m.touch(i.Key, touched{})
			}
			marked.Instances = append(marked.Instances, i)
		}
		s.scopes[name] = &marked
	}
}

// set replaces a scope, nil removes it, and keeps the indexes true.
func (m *merge) set(s *sourceState, name string, next *scopeState) {
	at := where{s.status.Name, name}
	if old := s.scopes[name]; old != nil {
		for _, i := range old.Instances {
			s.count(i, -1)
			if delete(m.where[i.Key], at); len(m.where[i.Key]) == 0 {
				delete(m.where, i.Key)
			}
		}
	}
	delete(s.troubled, name)
	if next == nil {
		delete(s.scopes, name)
		return
	}
	s.scopes[name] = next
	for _, i := range next.Instances {
		s.count(i, 1)
		if m.where[i.Key] == nil {
			m.where[i.Key] = map[where]bool{}
		}
		m.where[i.Key][at] = true
	}
	if len(next.problems) > 0 {
		s.troubled[name] = true
	}
}

func (s *sourceState) count(i *Instance, by int) {
	if !i.Health.Serving() {
		return
	}
	s.total += by
	if s.serving[i.Key.Tenant] += by; s.serving[i.Key.Tenant] == 0 {
		delete(s.serving, i.Key.Tenant)
	}
}

func (m *merge) touch(k Key, t touched) {
	if old, ok := m.dirty[k]; ok && t.source == "" {
		t = old
	}
	m.dirty[k] = t
	delete(m.late, k)
}

func (m *merge) completed(s *sourceState, u Update) bool {
	changed := !s.status.Ready
	s.status.Ready, s.complete = true, true
	listed := make(map[string]bool, len(u.Scopes))
	for _, scope := range u.Scopes {
		listed[scope] = true
	}
	for scope := range s.limited {
		if !listed[scope] && !u.Regressed {
			delete(s.limited, scope)
		}
	}
	for scope := range s.scopes {
		if listed[scope] {
			continue
		}
		changed = m.replace(s, Update{Source: u.Source, Scope: scope, Complete: true, Index: u.Index, Seen: u.Seen, Identity: u.Identity, Regressed: u.Regressed}) || changed
	}
	return changed
}

// replacement is a scope on its way from one state to the next.
type replacement struct {
	*merge
	s       *sourceState
	u       Update
	now     time.Time
	before  map[instanceID]*Instance // what the update has not listed so far
	next    *scopeState
	at      touched
	changed bool
	lost    []*loss
}

// replace swaps one scope's instances. Where the source's state was lost, what is
// missing is held instead of removed; where too much is missing, too.
func (m *merge) replace(s *sourceState, u Update) bool {
	old := s.scopes[u.Scope]
	if old == nil {
		old = &scopeState{}
	}
	r := &replacement{merge: m, s: s, u: u, now: m.now(), before: make(map[instanceID]*Instance, len(old.Instances)), at: touched{u.Source, u.Index, u.Seen},
		next: &scopeState{Index: u.Index, Identity: u.Identity, problems: u.Problems}}
	for _, i := range old.Instances {
		r.before[idOf(i)] = i
	}
	r.changed = len(u.Problems) != len(old.problems) || !slices.EqualFunc(u.Problems, old.problems, sameProblem)
	another := u.Index != 0 && u.Index < old.Index || u.Identity != "" && old.Identity != "" && u.Identity != old.Identity
	if another { // its indexes begin anew
		s.guard.forget()
		s.top = u.Index
	}
	for n := range u.Instances {
		i := u.Instances[n]
		i.Source = u.Source
		i.Weight = max(i.Weight, 1)
		r.list(&i)
	}
	// The same state cannot lack what it had: the source hides it.
	unmoved := s.guard.on && !u.Complete && u.Index != 0 && u.Index == old.Index
	r.miss(another || u.Regressed || unmoved)
	s.limit(u.Scope, u.Regressed)
	s.unsaved = s.unsaved || r.changed || r.next.Index != old.Index || r.next.Identity != old.Identity
	if len(r.next.Instances) == 0 && len(r.next.problems) == 0 {
		r.next = nil
	}
	m.set(s, u.Scope, r.next)
	for _, l := range r.lost {
		s.guard.lost(l, s.top)
	}
	if len(r.lost) > 0 {
		m.guardLosses(s, r.lost)
	}
	s.top = max(s.top, u.Index)
	return m.tally(s) || r.changed
}

// list takes over an instance that the update lists.
func (r *replacement) list(i *Instance) {
	s, id := r.s, idOf(i)
	b := r.before[id]
	delete(r.before, id)
	h := s.held[id]
	if h != nil && i.NodeDown {
		h.listed = i
		r.next.Instances = append(r.next.Instances, h.instance)
		return
	}
	if h != nil {
		delete(s.held, id)
		s.returned = r.now
	}
	if s.guard.on && !i.NodeDown && !s.guard.back(id) && b == nil && s.complete {
		s.guard.gained(id, r.now)
	}
	if s.guard.on && i.NodeDown && b != nil && b.Health.Serving() {
		r.lost = append(r.lost, &loss{instance: b, scope: r.u.Scope, index: r.u.Index, at: r.now, nodeDown: true, listed: i})
	}
	if b != nil && sameInstance(b, i) {
		r.next.Instances = append(r.next.Instances, b)
		return
	}
	r.next.Instances = append(r.next.Instances, i)
	r.changed = true
	r.note(i, r.at, b == nil)
}

// miss removes, or holds, what the update does not list.
func (r *replacement) miss(proves bool) {
	s := r.s
	hold := proves && s.guard.armed(r.now)
	for id, i := range r.before {
		if h := s.held[id]; h != nil || hold {
			if h == nil {
				s.reason = "its state was lost or restored, or it hides a part of it"
			}
			r.next.Instances = append(r.next.Instances, r.hold(s, r.u.Scope, i, nil, r.at))
			continue
		}
		r.changed = true
		r.note(i, r.at, false)
		if l := s.guard.byID[id]; l != nil {
			l.listed = nil // its node is gone altogether
		}
		if s.guard.on && i.Health.Serving() {
			r.lost = append(r.lost, &loss{instance: i, scope: r.u.Scope, index: r.u.Index, at: r.now})
		}
	}
}

func (s *sourceState) limit(scope string, limited bool) {
	if limited {
		s.limited[scope] = true
	} else {
		delete(s.limited, scope)
	}
}

// tally brings the status up to date and tells whether the number of held
// instances has changed.
func (m *merge) tally(s *sourceState) bool {
	if s.status.Held == len(s.held) {
		return false
	}
	if s.status.Held = len(s.held); s.status.Held == 0 {
		s.status.HeldSince, s.status.HeldWhy, s.returned = time.Time{}, "", time.Time{}
	}
	m.metrics.held.WithLabelValues(s.status.Name).Set(float64(s.status.Held))
	return true
}

// hold keeps i, which the source lists as listed or, where that is nil, no longer.
func (m *merge) hold(s *sourceState, scope string, i, listed *Instance, at touched) *Instance {
	id := idOf(i)
	if h := s.held[id]; h != nil {
		h.listed = listed
		return h.instance
	}
	if len(s.held) == 0 {
		s.status.HeldSince, s.returned = m.now(), time.Time{}
		m.metrics.massLoss.WithLabelValues(s.status.Name).Inc()
		m.config.Log.Warn("source lost instances without a deregistration of each, they are held", "source", s.status.Name, "why", s.reason, "first", i.QualifiedName())
	}
	s.status.HeldWhy = s.reason
	kept := *i
	kept.Stale, kept.Held = true, true
	s.held[id] = &heldInstance{instance: &kept, listed: listed, scope: scope}
	m.touch(i.Key, at)
	return &kept
}

// letGo ends the holding of instances, and tells whether there were any: what the
// source says of them holds.
func (m *merge) letGo(s *sourceState, ids []instanceID) bool {
	going := map[string]map[instanceID]*heldInstance{}
	for _, id := range ids {
		h := s.held[id]
		if going[h.scope] == nil {
			going[h.scope] = map[instanceID]*heldInstance{}
		}
		going[h.scope][id] = h
		delete(s.held, id)
	}
	for name, scoped := range going {
		scope := s.scopes[name]
		next := *scope
		next.Instances = nil
		for _, i := range scope.Instances {
			h := scoped[idOf(i)]
			if h == nil {
				next.Instances = append(next.Instances, i)
				continue
			}
			if h.listed != nil {
				listed := *h.listed
				listed.Stale = s.status.Stale
				next.Instances = append(next.Instances, &listed)
			}
			m.touch(i.Key, touched{s.status.Name, scope.Index, m.now()})
		}
		m.set(s, name, &next)
		s.unsaved = true
	}
	if len(ids) > 0 {
		m.config.Log.Info("held instances are let go", "source", s.status.Name, "number", len(ids), "left", len(s.held))
	}
	return m.tally(s)
}

// releaseHeld lets go of all that is held of a source ("": of all), and lets pass
// what it loses within the next window.
func (m *merge) releaseHeld(name string) bool {
	changed := false
	for source, s := range m.sources {
		if name != "" && source != name {
			continue
		}
		s.guard.forget()
		s.guard.disarmed = m.now().Add(lossWindow)
		changed = m.letGo(s, slices.Collect(maps.Keys(s.held))) || changed
	}
	return changed
}
