package xds

import (
	"maps"
	"slices"

	"github.com/roostmesh/roost/xds/envoy"
)

// pushOrder is the order in which changes are sent. Routes come early: one that
// refers to something new waits for that anyway, and one that does not may say
// why its cluster is about to have no endpoint.
var pushOrder = [envoy.Types]envoy.Type{envoy.Secret, envoy.Route, envoy.VirtualHost, envoy.Cluster, envoy.Endpoint, envoy.Extension, envoy.Listener}

// next makes the response that is to be sent now, or returns nil until a
// request or a view changes that. Answers to subscriptions come first, then
// what was added or changed, type by type, and removals when nothing else is
// left to send.
func (s *state) next() *response {
	for t := range envoy.Types {
		if r := s.answer(t); r != nil {
			return r
		}
	}
	unsent := false
	for t := range envoy.Types {
		unsent = unsent || s.types[t].answers.len() > 0
	}
	for _, t := range pushOrder {
		r, more := s.push(t)
		if r != nil {
			return r
		}
		unsent = unsent || more
	}
	if unsent || !s.unpruned {
		return nil
	}
	if r := s.prune(); r != nil {
		return r
	}
	s.unpruned = false
	if !s.waiting() {
		s.excuse()
	}
	return nil
}

// answer makes the answer to new subscriptions, which waits for nothing.
func (s *state) answer(t envoy.Type) *response {
	ts := &s.types[t]
	if ts.answers.len() == 0 || len(ts.out) >= maxUnacked {
		return nil
	}
	b := s.batch()
	b.expect(ts.answers.len())
	for name := range ts.answers.m {
		r, current := s.sendable(t, name)
		if r != nil && !b.add(r) {
			break
		}
		b.owe(ts.answers.get(name))
		ts.answers.del(name)
		switch {
		case r == nil && (ts.held.get(name) == nil || ts.last(name) == nil):
			b.removed = append(b.removed, name)
		case r == nil: // it keeps the version that we cannot repeat
		case current:
			b.pay(ts, name)
		}
	}
	if len(b.resources)+len(b.removed) == 0 {
		return nil
	}
	slices.Sort(b.removed)
	return s.send(t, &b)
}

// sendable is the version of a resource that may be sent: the view's, which is the
// current one, or when the client refused that or it is gone, the one that it has
// or is getting.
func (s *state) sendable(t envoy.Type, name string) (sendable *envoy.Resource, current bool) {
	ts := &s.types[t]
	r := s.get(envoy.Name{Type: t, Name: name})
	if r != nil && !ts.refuses(r) {
		return r, true
	}
	if last := ts.last(name); last != nil && last.Body != nil && !ts.refuses(last) {
		return last, r != nil && last.Version == r.Version
	}
	if held := ts.held.get(name); held != nil && held.Body != nil && !ts.refuses(held) && r != nil {
		return held, held.Version == r.Version
	}
	return nil, false
}

// current says that this is the view's version of the resource.
func (s *state) current(r *envoy.Resource) bool {
	now := s.get(r.Name)
	return now != nil && now.Version == r.Version
}

// refuses says that this version was NACKed and is not to be sent.
func (ts *typeState) refuses(r *envoy.Resource) bool {
	f := ts.refused.get(r.Name.Name)
	return f != nil && f.version == r.Version && !f.retry
}

// push makes the next response of a type with what was added or changed. more
// says that something of it has to wait: for the ACK of the last response of
// the type, or for what it refers to.
func (s *state) push(t envoy.Type) (r *response, more bool) {
	ts := &s.types[t]
	if ts.dirty.len() == 0 && ts.suspects.len() == 0 && ts.owed == 0 {
		return nil, false
	}
	if len(ts.out) == 0 {
		if r := s.isolate(t); r != nil {
			return r, true
		}
	}
	if len(ts.out) > 0 {
		return nil, ts.suspects.len() > 0 || ts.owed > 0 || s.owesAny(t)
	}
	ready, blocked := s.due(t)
	blocked = blocked || ts.suspects.len() > 0
	if ts.owed > 0 && blocked {
		// A proxy that starts takes the first answer for all there is.
		return nil, true
	}
	if len(ready) == 0 && ts.owed == 0 {
		return nil, blocked
	}
	b := s.batch()
	b.resources = ready[:0] // it is read before it is written
	b.owe(ts.owed)
	ts.owed = 0
	for _, r := range ready {
		if !b.add(r) {
			break
		}
		b.pay(ts, r.Name.Name)
	}
	return s.send(t, &b), true
}

// owesAny says that one of the dirty resources of a type is to be sent, now or
// later.
func (s *state) owesAny(t envoy.Type) bool {
	for name := range s.types[t].dirty.m {
		if r, done := s.owes(t, name); r != nil && !done {
			return true
		}
	}
	return false
}

// due lists dirty resources of a type that may be sent now, as many as fit into a
// response, and says whether more wait for what they refer to. It forgets those
// that need nothing; what has to be removed stays dirty.
func (s *state) due(t envoy.Type) (ready []*envoy.Resource, blocked bool) {
	ts := &s.types[t]
	size := 0
	for name := range ts.dirty.m {
		if size > maxResponse && !s.sotw {
			break
		}
		r, done := s.owes(t, name)
		switch {
		case done:
			ts.dirty.del(name)
			ts.again.del(name)
		case r == nil:
		case s.waits(r):
			blocked = true
		default:
			ready = append(ready, r)
			size += len(r.Body)
		}
	}
	return ready, blocked
}

// owes says what a dirty resource needs: to be sent, nothing any more, or (nil,
// false) to be removed or to wait for its turn alone.
func (s *state) owes(t envoy.Type, name string) (r *envoy.Resource, done bool) {
	ts := &s.types[t]
	if !s.wants(t, name) {
		return nil, true
	}
	last := ts.last(name)
	forced := ts.again.has(name)
	r = s.get(envoy.Name{Type: t, Name: name})
	if r == nil {
		return nil, last == nil
	}
	if ts.refuses(r) {
		if old, _ := s.sendable(t, name); forced && old != nil {
			return old, false
		}
		return nil, true
	}
	if sus, ok := ts.suspects.m[name]; ok && sus.version == r.Version {
		return nil, !forced
	}
	if !forced && last != nil && last.Version == r.Version {
		return nil, true
	}
	return r, false
}

// isolate makes a response of one suspect alone.
func (s *state) isolate(t envoy.Type) *response {
	ts := &s.types[t]
	if ts.suspects.len() == 0 {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(ts.suspects.m)) {
		sus := ts.suspects.get(name)
		r := s.get(envoy.Name{Type: t, Name: name})
		if r != nil && s.waits(r) {
			continue
		}
		ts.suspects.del(name)
		if r == nil || r.Version != sus.version {
			// The suspected version is no more: an ordinary change.
			if s.wants(t, name) {
				ts.owe(name, sus.since)
			}
			s.unpruned = true
			continue
		}
		b := s.batch()
		b.add(r)
		b.owe(sus.since)
		b.pay(ts, name)
		return s.send(t, &b)
	}
	return nil
}

// owe marks a resource dirty since a version, or an earlier one if it was.
func (ts *typeState) owe(name string, since uint64) {
	if was, ok := ts.dirty.m[name]; !ok || was == 0 || since > 0 && since < was {
		ts.dirty.set(name, since)
	}
}

// waits says that a resource refers to a cluster that is new to this client and
// not settled. References that the client's version has, too, never wait.
func (s *state) waits(r *envoy.Resource) bool {
	if r.Type != envoy.Listener && !leads(r.Type) {
		return false
	}
	held := s.types[r.Type].held.get(r.Name.Name)
	for _, ref := range r.Refs {
		if s.unsettled(ref, r.Type) && (held == nil || !slices.Contains(held.Refs, ref)) {
			return true
		}
	}
	return false
}

// leads says that resources of a type name clusters that requests go to.
func leads(t envoy.Type) bool {
	return t == envoy.Route || t == envoy.Extension || t == envoy.VirtualHost
}

// unsettled says that a resource is, or refers to, a cluster that the client is
// to get and has neither ACKed nor NACKed.
func (s *state) unsettled(n envoy.Name, from envoy.Type) bool {
	switch n.Type {
	case envoy.Cluster:
		ts := &s.types[envoy.Cluster]
		held := ts.held.get(n.Name)
		if held != nil && !isStandIn(held) || !s.wants(envoy.Cluster, n.Name) {
			return false
		}
		r := s.get(n)
		if r == nil || held != nil && isStandIn(r) {
			return false
		}
		f := ts.refused.get(n.Name)
		return f == nil || f.version != r.Version
	case envoy.Route, envoy.Extension:
		r := s.get(n)
		if r == nil || from != envoy.Listener {
			return false
		}
		for _, ref := range r.Refs {
			if s.unsettled(ref, n.Type) {
				return true
			}
		}
	}
	return false
}

// prune makes a response of removals: resources that are gone from the view and
// that nothing the client holds, or is getting, refers to.
func (s *state) prune() *response {
	var gone map[envoy.Name]struct{}
	for t := range envoy.Types {
		ts := &s.types[t]
		if len(ts.out) > 0 {
			continue
		}
		for name := range ts.dirty.m {
			if r, done := s.owes(t, name); r == nil && !done && ts.held.get(name) != nil {
				if gone == nil {
					gone = map[envoy.Name]struct{}{}
				}
				gone[envoy.Name{Type: t, Name: name}] = struct{}{}
			}
		}
	}
	if len(gone) == 0 {
		return nil
	}
	s.spare(gone)
	for t := envoy.Types; t > 0; {
		t--
		b := s.batch()
		for n := range gone {
			if n.Type == t {
				b.removed = append(b.removed, n.Name)
				b.owe(s.types[t].dirty.get(n.Name))
				s.types[t].dirty.del(n.Name)
			}
		}
		if len(b.removed) > 0 {
			slices.Sort(b.removed)
			return s.send(t, &b)
		}
	}
	return nil
}

// spare takes out of gone what a version that the client holds, or is getting,
// refers to. A version whose content is unknown refers to all that its type may.
func (s *state) spare(gone map[envoy.Name]struct{}) {
	var awaited [envoy.Types]bool // types that the client has not yet spoken of, and may have
	for _, t := range []envoy.Type{envoy.Listener, envoy.Cluster} {
		awaited[t] = !s.types[t].started
	}
	parent := func(r *envoy.Resource) {
		if r.Type == envoy.Cluster {
			delete(gone, envoy.Name{Type: envoy.Endpoint, Name: r.Name.Name})
		}
		for _, ref := range r.Refs {
			delete(gone, ref)
			if !s.types[ref.Type].started {
				awaited[ref.Type] = true
			}
		}
		if r.Body == nil {
			maps.DeleteFunc(gone, func(n envoy.Name, _ struct{}) bool { return mayRefer(r.Type, n.Type) })
		}
	}
	for t := range envoy.Types {
		if t == envoy.Endpoint || t == envoy.Secret {
			continue
		}
		for _, r := range s.types[t].held.all() {
			parent(r)
		}
		for _, o := range s.types[t].out {
			for _, r := range o.resources {
				parent(r)
			}
		}
	}
	for t, wait := range awaited {
		if wait {
			maps.DeleteFunc(gone, func(n envoy.Name, _ struct{}) bool {
				return s.types[n.Type].resumed && mayRefer(envoy.Type(t), n.Type)
			})
		}
	}
}

// mayRefer says whether resources of one type can refer to those of another.
func mayRefer(parent, child envoy.Type) bool {
	switch parent {
	case envoy.Listener:
		return child != envoy.Listener
	case envoy.Route, envoy.Extension, envoy.VirtualHost:
		return child == envoy.Cluster || child == envoy.Secret
	case envoy.Cluster:
		return child == envoy.Endpoint || child == envoy.Secret
	}
	return false
}

// batch collects one response.
type batch struct {
	resources []*envoy.Resource
	removed   []string
	size      int
	since     uint64
	unsplit   bool // of any size
}

func (s *state) batch() batch { return batch{since: s.version, unsplit: s.sotw} }

// add takes a resource in unless the response would become too large.
func (b *batch) add(r *envoy.Resource) bool {
	if b.size+len(r.Body) > maxResponse && len(b.resources) > 0 && !b.unsplit {
		return false
	}
	b.size += len(r.Body)
	b.resources = append(b.resources, r)
	return true
}

// expect makes room for n resources, so many of them as one response may have.
func (b *batch) expect(n int) { b.resources = make([]*envoy.Resource, 0, min(n, expectAtMost)) }

func (b *batch) owe(since uint64) {
	if since > 0 && since < b.since {
		b.since = since
	}
}

// pay notes that a response holds what is owed of a resource, which is dirty no more.
func (b *batch) pay(ts *typeState, name string) {
	b.owe(ts.dirty.get(name))
	ts.dirty.del(name)
	ts.again.del(name)
}

// send notes that a response is on its way. The children of what it holds are
// to follow, changed or not: Envoy starts a changed parent without them.
func (s *state) send(t envoy.Type, b *batch) *response {
	ts := &s.types[t]
	sortByName(b.resources, func(r *envoy.Resource) string { return r.Name.Name })
	r := &response{Type: t, nonce: s.nonce(), world: s.version, resources: b.resources, removed: b.removed, since: b.since, size: b.size}
	for _, name := range b.removed {
		r.size += len(name)
	}
	ts.out = append(ts.out, r)
	s.follow(r)
	return r
}

func (s *state) follow(r *response) {
	if ts := &s.types[envoy.Endpoint]; r.Type == envoy.Cluster && !ts.started {
		ts.again.reserve(len(r.resources))
	}
	for _, res := range r.resources {
		switch r.Type {
		case envoy.Cluster:
			own := envoy.Name{Type: envoy.Endpoint, Name: res.Name.Name}
			s.repeat(own)
			for _, ref := range res.Refs {
				if ref.Type == envoy.Endpoint && ref != own {
					s.repeat(ref)
				}
			}
		case envoy.Listener:
			for _, ref := range res.Refs {
				if ref.Type == envoy.Route || ref.Type == envoy.Extension {
					s.repeat(ref)
				}
			}
		}
	}
}

// repeat has a resource sent again. Before the first request of its type the
// mark is kept: a client that resumes may say then that it has the resource.
func (s *state) repeat(n envoy.Name) {
	ts := &s.types[n.Type]
	if ts.started && !s.wants(n.Type, n.Name) {
		return
	}
	ts.again.set(n.Name, struct{}{})
	if ts.started {
		ts.owe(n.Name, s.version)
	}
}
