package discovery

import (
	"maps"
	"slices"
	"time"
)

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
	groups, now := m.groups.Edit(), m.now()
	lists := m.listed(now)
	for key, at := range m.dirty {
		if m.waits(key, now) {
			continue
		}
		if m.late[key] {
			m.told[key] = now
			delete(m.late, key)
		}
		delete(m.dirty, key)
		list := lists[key]
		if len(list) == 0 {
			groups.Delete(key)
			continue
		}
		if old := m.groups.Get(key); old != nil && at.source == "" {
			at = touched{old.Source, old.Index, old.Seen}
		}
		slices.SortStableFunc(list, compareInstances)
		list = slices.CompactFunc(list, func(a, b *Instance) bool { return idOf(a) == idOf(b) })
		groups.Set(key, &Group{Key: key, Instances: list, Source: at.source, Index: at.index, Seen: at.seen})
	}
	m.groups = groups.Table()
}

// listed are the instances of the dirty services that do not wait. Each scope that has some is gone
// through once: one may list the instances of many services.
func (m *merge) listed(now time.Time) map[Key][]*Instance {
	scopes := map[where]bool{}
	for key := range m.dirty {
		if m.waits(key, now) {
			continue
		}
		for ref := range m.where[key] {
			scopes[ref] = true
		}
	}
	lists := make(map[Key][]*Instance, len(m.dirty))
	for ref := range scopes {
		for _, i := range m.sources[ref.source].scopes[ref.scope].Instances {
			if _, dirty := m.dirty[i.Key]; dirty {
				lists[i.Key] = append(lists[i.Key], i)
			}
		}
	}
	return lists
}

func (m *merge) sourceProblems(s *sourceState) []Problem {
	var problems []Problem
	if s.status.Stale {
		problems = append(problems, Problem{Code: "source_stale", Severity: SeverityWarning, Object: s.status.Name, Place: s.status.Name,
			Message: "does not answer; its last good state is served: " + s.status.LastError,
			Fix:     "look at the source; nothing has to be done here when it answers again", Since: s.status.Since})
	}
	if s.status.Held > 0 {
		problems = append(problems, heldProblem(s))
	}
	for _, name := range slices.Sorted(maps.Keys(s.troubled)) {
		problems = append(problems, s.scopes[name].problems...)
	}
	return problems
}

func sameProblem(a, b Problem) bool {
	return a.Code == b.Code && a.Object == b.Object && a.Place == b.Place && a.Message == b.Message
}
