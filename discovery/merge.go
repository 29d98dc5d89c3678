package discovery

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// merge is the Aggregator's state, owned by its loop.
type merge struct {
	config  Config
	sources map[string]*sourceState
	groups  map[Key]*Group
	dirty   map[Key]touched
	where   map[Key]map[where]bool // the scopes that have instances of a service
	version uint64
	now     func() time.Time
}

// where is one scope of one source.
type where struct{ source, scope string }

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
	m := &merge{config: config, sources: map[string]*sourceState{}, groups: map[Key]*Group{}, dirty: map[Key]touched{}, where: map[Key]map[where]bool{}, now: time.Now}
	for _, s := range config.Sources {
		m.source(s.Name())
	}
	return m
}

func (m *merge) source(name string) *sourceState {
	s := m.sources[name]
	if s == nil {
		s = &sourceState{status: SourceStatus{Name: name}, scopes: map[string]*scopeState{}, held: map[instanceID]*heldInstance{}, troubled: map[string]bool{}}
		m.sources[name] = s
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
		if m.where[i.Key] == nil {
			m.where[i.Key] = map[where]bool{}
		}
		m.where[i.Key][at] = true
	}
	if len(next.problems) > 0 {
		s.troubled[name] = true
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
	listed := make(map[string]bool, len(u.Scopes))
	for _, scope := range u.Scopes {
		listed[scope] = true
	}
	for scope := range s.scopes {
		if listed[scope] {
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
	s.unsaved = s.unsaved || changed || next.Index != old.Index || next.Identity != old.Identity
	if s.status.Held != len(s.held) {
		s.status.Held, changed = len(s.held), true
	}
	if len(next.Instances) == 0 && len(next.problems) == 0 {
		next = nil
	}
	m.set(s, u.Scope, next)
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
	m.set(s, h.scope, kept)
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
	for key, at := range m.dirty {
		var list []*Instance
		for ref := range m.where[key] {
			for _, i := range m.sources[ref.source].scopes[ref.scope].Instances {
				if i.Key == key {
					list = append(list, i)
				}
			}
		}
		if len(list) == 0 {
			delete(groups, key)
			continue
		}
		slices.SortStableFunc(list, compareInstances)
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
	for _, name := range slices.Sorted(maps.Keys(s.troubled)) {
		problems = append(problems, s.scopes[name].problems...)
	}
	return problems
}

func sameProblem(a, b Problem) bool {
	return a.Code == b.Code && a.Object == b.Object && a.Place == b.Place && a.Message == b.Message
}
