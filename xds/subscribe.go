package xds

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/xds/envoy"
)

// request takes one request of the client: first what it says about a response,
// then its subscriptions. It returns what was refused for the first time.
func (s *state) request(t envoy.Type, q *request, now time.Time) []rejection {
	ts := &s.types[t]
	rejected := s.settle(t, q, now)
	for _, name := range q.unsubscribe {
		s.unsubscribe(t, name)
	}
	if ts.started {
		for _, name := range q.subscribe {
			s.subscribe(t, name)
		}
		return rejected
	}
	all := s.asksForAll(t, q.subscribe)
	ts.started = true
	s.begin(t, all, q.subscribe, q.versions)
	return rejected
}

// begin takes the first request of a type; all says that it asks for all of it. What the client says it has is
// compared like a change; every other name is answered.
func (s *state) begin(t envoy.Type, all bool, subscribe []string, versions []holding) {
	ts := &s.types[t]
	subscribe = slices.DeleteFunc(subscribe, func(name string) bool { return name == wildcardName })
	if whole := s.whole(t, subscribe, versions); whole != nil {
		ts.held, subscribe, versions = whole, nil, nil
		ts.resumed = true
	}
	sortByName(versions, func(h holding) string { return h.name })
	sortByName(subscribe, func(name string) string { return name })
	var has []*envoy.Resource
	for _, v := range versions { // both lists are in order
		for len(subscribe) > 0 && subscribe[0] < v.name {
			s.subscribe(t, subscribe[0])
			subscribe = subscribe[1:]
		}
		named := len(subscribe) > 0 && subscribe[0] == v.name
		if named {
			subscribe = subscribe[1:]
		}
		if v.name != wildcardName && (named || all) {
			has = append(has, s.resume(t, v, named))
		}
	}
	s.hold(t, has...)
	if len(versions) == 0 {
		ts.named.reserve(len(subscribe))
		ts.answers.reserve(len(subscribe))
	}
	for _, name := range subscribe {
		s.subscribe(t, name)
	}
	if all {
		s.subscribe(t, wildcardName)
	}
	ts.resumed = ts.resumed || len(versions) > 0
	if ts.resumed {
		ts.owed = 0
	}
	ts.earlier = nil
	for name := range ts.again.m {
		if !s.wants(t, name) {
			ts.again.del(name)
		}
	}
	s.unpruned = true
}

// whole returns all that the view has of a type where just that is what the client
// says it has, and nothing of it has to be sent again: most clients that come back.
// Otherwise it returns nil. Lists that differ have another sum of fingerprints.
func (s *state) whole(t envoy.Type, subscribe []string, versions []holding) *holdings {
	named := t.Wildcard() && len(subscribe) == 0 || !t.Wildcard() && len(subscribe) == len(versions)
	if len(versions) == 0 || !named || s.types[t].again.len() > 0 || !t.Wildcard() && t != envoy.Endpoint {
		return nil
	}
	var names, theirs, ours uint64
	for _, name := range subscribe {
		names += fingerprint(name, "")
	}
	for _, v := range versions {
		if len(subscribe) > 0 {
			names -= fingerprint(v.name, "")
		}
		theirs += fingerprint(v.name, v.version)
	}
	if names != 0 {
		return nil
	}
	all := make([]*envoy.Resource, 0, len(versions))
	for r := range s.view.All(t) {
		if len(all) == len(versions) {
			return nil
		}
		all = append(all, r)
		ours += fingerprintOf(r)
	}
	if ours != theirs || len(all) != len(versions) {
		return nil
	}
	return s.sets.keep(&holdings{all, ours})
}

// resume finds a version that the client has from an earlier stream.
func (s *state) resume(t envoy.Type, v holding, named bool) *envoy.Resource {
	ts := &s.types[t]
	if named && t.Wildcard() {
		name := strings.Clone(v.name)
		ts.named.set(name, struct{}{})
		s.renamed(t, name)
	}
	r := s.recall(t, v.name, v.version)
	if now := s.get(r.Name); now == nil || now.Version != r.Version || ts.again.has(v.name) {
		ts.dirty.set(r.Name.Name, s.version)
	}
	return r
}

// recall finds the content of a version that the client says it has.
func (s *state) recall(t envoy.Type, name, version string) *envoy.Resource {
	n := envoy.Name{Type: t, Name: name}
	if r := s.get(n); r != nil && r.Version == version {
		return r
	}
	if r := s.types[t].earlier.get(name); r != nil && r.Version == version {
		return r
	}
	return &envoy.Resource{Name: envoy.Name{Type: t, Name: strings.Clone(name)}, Version: strings.Clone(version)}
}

// asksForAll says whether a request that subscribes to some names asks for all of
// a type: the first one may do so without a word.
func (s *state) asksForAll(t envoy.Type, subscribe []string) bool {
	return t.Wildcard() && (slices.Contains(subscribe, wildcardName) || len(subscribe) == 0 && !s.types[t].started)
}

// subscribed counts what the client has asked for by name.
func (s *state) subscribed(t envoy.Type) int {
	n := s.types[t].named.len()
	if !t.Wildcard() {
		n += s.types[t].held.len()
	}
	return n
}

// subscriptions lists what the client has asked for by name, in no order.
func (s *state) subscriptions(t envoy.Type) []string {
	ts := &s.types[t]
	names := slices.Collect(maps.Keys(ts.named.m))
	if !t.Wildcard() {
		for _, r := range ts.held.all() {
			names = append(names, r.Name.Name)
		}
	}
	return names
}

func (s *state) subscribe(t envoy.Type, name string) {
	ts := &s.types[t]
	switch {
	case name != wildcardName:
		name = strings.Clone(name) // a request's shares the memory of all of it
		if !s.named(t, name) {
			ts.named.set(name, struct{}{})
			s.renamed(t, name)
		}
		ts.answers.set(name, s.version)
	case t.Wildcard():
		ts.wildcard, ts.owed = true, s.version
		s.markAll(t)
	}
}

// markAll marks what the client has not of all that the wildcard covers. Both lists
// are in order.
func (s *state) markAll(t envoy.Type) {
	ts := &s.types[t]
	held, all := ts.held.all(), slices.Collect(s.view.All(t))
	ts.dirty.reserve(len(all) - len(held))
	for _, r := range all {
		for len(held) > 0 && held[0].Name.Name < r.Name.Name {
			held = held[1:]
		}
		if len(held) == 0 || held[0] != r || ts.again.has(r.Name.Name) {
			s.compare(t, r.Name.Name, r, true, s.version)
		}
	}
}

// unsubscribe forgets a name: the client drops what it has of it. One that the
// wildcard still covers is answered instead, as the protocol asks.
func (s *state) unsubscribe(t envoy.Type, name string) {
	ts := &s.types[t]
	s.unpruned = true
	if name == wildcardName {
		ts.wildcard, ts.owed = false, 0
		for _, name := range s.names(t) {
			if !ts.named.has(name) {
				s.forget(t, name)
			}
		}
		return
	}
	if !s.named(t, name) {
		return
	}
	ts.named.del(name)
	s.renamed(t, name)
	if ts.wildcard {
		ts.answers.set(name, s.version)
		return
	}
	s.forget(t, name)
}

// forget drops all but a refusal, which stays in force on this stream.
func (s *state) forget(t envoy.Type, name string) {
	ts := &s.types[t]
	if ts.held.get(name) != nil {
		ts.held = s.sets.without(ts.held, name)
	}
	ts.answers.del(name)
	ts.dirty.del(name)
	ts.again.del(name)
	ts.suspects.del(name)
}

// names lists what a stream has to do with, ordered.
func (s *state) names(t envoy.Type) []string {
	ts := &s.types[t]
	all := map[string]struct{}{}
	if ts.wildcard {
		for r := range s.view.All(t) {
			all[r.Name.Name] = struct{}{}
		}
	}
	collect(all, ts.named.m)
	for _, r := range ts.held.all() {
		all[r.Name.Name] = struct{}{}
	}
	for name := range ts.flying() {
		all[name] = struct{}{}
	}
	collect(all, ts.answers.m)
	collect(all, ts.dirty.m)
	collect(all, ts.suspects.m)
	collect(all, ts.refused.m)
	return slices.Sorted(maps.Keys(all))
}

func collect[V any](all map[string]struct{}, names map[string]V) {
	for name := range names {
		all[name] = struct{}{}
	}
}

// wants says whether the client is to have the resource when it exists.
func (s *state) wants(t envoy.Type, name string) bool {
	return s.types[t].wildcard || s.named(t, name)
}

// named says whether the client has asked for the resource by its name.
func (s *state) named(t envoy.Type, name string) bool {
	ts := &s.types[t]
	return ts.named.has(name) || !t.Wildcard() && ts.held.get(name) != nil
}

// hold notes that the client has versions of resources that it is to have.
func (s *state) hold(t envoy.Type, list ...*envoy.Resource) {
	ts := &s.types[t]
	ts.held = s.sets.with(ts.held, list...)
	if !t.Wildcard() {
		for _, r := range list {
			ts.named.del(r.Name.Name)
		}
	}
}

// letGo notes that the client has dropped resources, and is still to have those
// that there are again.
func (s *state) letGo(t envoy.Type, names []string) {
	ts := &s.types[t]
	if !t.Wildcard() {
		for _, name := range names {
			if ts.held.get(name) != nil {
				ts.named.set(name, struct{}{})
			}
		}
	}
	ts.held = s.sets.without(ts.held, names...)
}
