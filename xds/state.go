package xds

import (
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/roostmesh/roost/xds/envoy"
)

// maxResponse bounds the bodies of one response, in bytes; one resource alone
// may be larger. Go's gRPC clients refuse messages over 4 MB.
const maxResponse = 2 << 20

// wildcardName subscribes to everything of a wildcard type.
const wildcardName = "*"

// state is the delta xDS protocol of one stream: requests, views and refusals
// go in, responses come out. It has no goroutine, no clock and no I/O; its
// stream's owner goroutine is the only one that touches it.
type state struct {
	types   [envoy.Types]typeState
	view    envoy.View
	version uint64 // of the World of view
	nonces  uint64 // responses made so far
	// unpruned says that a removal may have become possible since the last
	// fruitless search, which costs a walk over everything held.
	unpruned bool
	taken    taken // by the last request
	sets     *sets // shared with other streams
}

// taken are the clusters whose endpoints a request ACKed, as the World of a
// version has them.
type taken struct {
	version  uint64
	clusters []string
}

// typeState is the part of a state that concerns one type. Numbers named since
// are the World version from which on something is owed; 0 owes nothing.
type typeState struct {
	started  bool   // the first request has come
	resumed  bool   // and said that the client has some of the type
	wildcard bool   // subscribed to all of a wildcard type
	owed     uint64 // since: the answer to the wildcard subscription, even an empty one
	// named are subscribed by name. Of a type without a wildcard what is held was,
	// too, and is not listed here: see subscribed.
	named bag[struct{}]

	// held is what the client has: the last version that it ACKed. One whose
	// version is known but not its content has no Body: its Refs are unknown.
	held *holdings
	// earlier is what the previous stream of this proxy may have left it with; it gives content
	// to the versions that the first request names, and is dropped then.
	earlier *holdings

	out []*response // sent, neither ACKed nor NACKed, oldest first

	answers  bag[uint64]   // since: subscribed and not answered yet
	dirty    bag[uint64]   // since: may differ from what the view says
	again    bag[struct{}] // dirty, and sent even when unchanged: their parent was sent
	suspects bag[suspect]  // one of them spoiled a response: each goes alone
	refused  bag[*refusal]

	lastError string // of the last NACK, until nothing is refused any more
}

type suspect struct {
	version string
	since   uint64
}

// refusal is a NACKed version.
type refusal struct {
	version string
	message string
	since   time.Time
	retry   bool // released: the same bytes are sent once more
}

// response is one DeltaDiscoveryResponse.
type response struct {
	envoy.Type
	nonce     string
	world     uint64            // its version
	resources []*envoy.Resource // by name
	removed   []string          // in order
	since     uint64
	size      int // of its bodies and names, in bytes
}

// rejection tells that the client refused a version for the first time.
type rejection struct {
	envoy.Name
	version, message string
}

// newState starts a stream on a view. past is the state of the proxy's previous
// stream, or nil: its refusals stay in force, and what it held is known.
func newState(view envoy.View, version uint64, past *state) *state {
	s := &state{view: view, version: version, sets: newSets()}
	if past != nil {
		s.sets = past.sets
	}
	for t := range envoy.Types {
		if past == nil {
			continue
		}
		ts, was := &s.types[t], &past.types[t]
		ts.earlier = past.mayHave(t)
		for name, r := range was.refused.m {
			if now := view.Get(envoy.Name{Type: t, Name: name}); now != nil && now.Version == r.version {
				ts.refused.set(name, &refusal{version: r.version, message: r.message, since: r.since, retry: retryable(t, r.message)})
				ts.lastError = r.message
			}
		}
	}
	return s
}

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
	ts.started = true
	s.begin(t, q.subscribe, q.versions)
	return rejected
}

// begin takes the first request of a type. What the client says it has is
// compared like a change; every other name is answered.
func (s *state) begin(t envoy.Type, subscribe []string, versions []holding) {
	ts := &s.types[t]
	all := t.Wildcard() && len(subscribe) == 0 || t.Wildcard() && slices.Contains(subscribe, wildcardName)
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
		ours += fingerprint(r.Name.Name, r.Version)
	}
	if ours != theirs || len(all) != len(versions) {
		return nil
	}
	return s.sets.of(all)
}

// resume finds a version that the client has from an earlier stream.
func (s *state) resume(t envoy.Type, v holding, named bool) *envoy.Resource {
	ts := &s.types[t]
	r := s.recall(t, v.name, v.version)
	if named && t.Wildcard() {
		ts.named.set(r.Name.Name, struct{}{})
	}
	if now := s.view.Get(r.Name); now != r || ts.again.has(v.name) {
		ts.dirty.set(r.Name.Name, s.version)
	}
	return r
}

// recall finds the content of a version that the client says it has.
func (s *state) recall(t envoy.Type, name, version string) *envoy.Resource {
	n := envoy.Name{Type: t, Name: name}
	if r := s.view.Get(n); r != nil && r.Version == version {
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
		name = s.own(t, name)
		if !s.subscribed(t, name) {
			ts.named.set(name, struct{}{})
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
	held := ts.held.all()
	if len(held) == 0 {
		ts.dirty.reserve(expectAtMost)
	}
	for r := range s.view.All(t) {
		for len(held) > 0 && held[0].Name.Name < r.Name.Name {
			held = held[1:]
		}
		if len(held) == 0 || held[0] != r || ts.again.has(r.Name.Name) {
			s.mark(t, r.Name.Name, s.version)
		}
	}
}

// own is a name that may be kept: a request's shares the memory of all of it.
func (s *state) own(t envoy.Type, name string) string {
	if r := s.view.Get(envoy.Name{Type: t, Name: name}); r != nil {
		return r.Name.Name
	}
	return strings.Clone(name)
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
	if !s.subscribed(t, name) {
		return
	}
	ts.named.del(name)
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
	return s.types[t].wildcard || s.subscribed(t, name)
}

// subscribed says whether the client has asked for the resource by its name.
func (s *state) subscribed(t envoy.Type, name string) bool {
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

// update moves the stream to a newer World. What differs is owed from the first
// World on that the stream has skipped: it may have changed there.
func (s *state) update(view envoy.View, version uint64, changes ...envoy.Change) {
	since := s.version + 1
	before := s.view
	s.view, s.version = view, version
	for _, c := range changes {
		listeners := slices.ContainsFunc(c.Names, func(n envoy.Name) bool { return n.Type == envoy.Listener })
		if c.Views || listeners && (before.Limited() || view.Limited()) {
			s.updateAll(since)
			return
		}
	}
	for _, c := range changes {
		for _, n := range c.Names {
			s.mark(n.Type, n.Name, since)
		}
	}
}

func (s *state) updateAll(since uint64) {
	for t := range envoy.Types {
		for _, name := range s.names(t) {
			s.mark(t, name, since)
		}
	}
}

// mark notes that a resource may differ from what the client has. A refusal
// ends with the version that it was about, whether or not it is wanted now.
func (s *state) mark(t envoy.Type, name string, since uint64) {
	ts := &s.types[t]
	wanted := s.wants(t, name)
	if !wanted && !ts.refused.has(name) {
		return
	}
	r := s.view.Get(envoy.Name{Type: t, Name: name})
	if f := ts.refused.get(name); f != nil && (r == nil || r.Version != f.version) {
		ts.refused.del(name)
		ts.calm()
	}
	if !wanted {
		return
	}
	if r == nil {
		s.unpruned = true
	}
	if last := ts.last(name); last == r || last != nil && r != nil && last.Version == r.Version {
		if forced := ts.again.has(name); !forced {
			ts.dirty.del(name)
			return
		}
	}
	ts.owe(name, since)
}

// last is what the client has once it has taken all that is on its way.
func (ts *typeState) last(name string) *envoy.Resource {
	if r, ok := ts.onItsWay(name); ok {
		return r
	}
	return ts.held.get(name)
}

// onItsWay is the newest version of a resource that was sent and not answered; nil
// is a removal.
func (ts *typeState) onItsWay(name string) (r *envoy.Resource, ok bool) {
	for _, o := range slices.Backward(ts.out) {
		if r, ok = o.find(name); ok {
			return r, true
		}
	}
	return nil, false
}

// flying lists what is on its way, the newest version of each name; nil is a
// removal.
func (ts *typeState) flying() iter.Seq2[string, *envoy.Resource] {
	return func(yield func(string, *envoy.Resource) bool) {
		for i, o := range slices.Backward(ts.out) {
			newer := func(name string) bool {
				return slices.ContainsFunc(ts.out[i+1:], func(o *response) bool {
					_, ok := o.find(name)
					return ok
				})
			}
			for _, r := range o.resources {
				if !newer(r.Name.Name) && !yield(r.Name.Name, r) {
					return
				}
			}
			for _, name := range o.removed {
				if !newer(name) && !yield(name, nil) {
					return
				}
			}
		}
	}
}

// find returns what a response says of a resource; nil is a removal.
func (r *response) find(name string) (*envoy.Resource, bool) {
	i, ok := slices.BinarySearchFunc(r.resources, name, func(r *envoy.Resource, name string) int { return strings.Compare(r.Name.Name, name) })
	if ok {
		return r.resources[i], true
	}
	_, ok = slices.BinarySearch(r.removed, name)
	return nil, ok
}

// mayHave is what the client is left with when its stream ends: what it was sent
// may have arrived though its ACK has not.
func (s *state) mayHave(t envoy.Type) *holdings {
	ts := &s.types[t]
	if !ts.started {
		return ts.earlier
	}
	var more []*envoy.Resource
	for name, r := range ts.flying() {
		if r != nil && ts.held.get(name) == nil {
			more = append(more, r)
		}
	}
	return s.sets.with(ts.held, more...)
}

// resumes says that the client goes on with what it had from another stream.
func (s *state) resumes() bool {
	return slices.ContainsFunc(s.types[:], func(ts typeState) bool { return ts.resumed })
}

func (ts *typeState) calm() {
	if ts.refused.len() == 0 {
		ts.lastError = ""
	}
}

// unacked counts the bytes that were sent and neither ACKed nor NACKed.
func (s *state) unacked() (n int) {
	for t := range s.types {
		for _, r := range s.types[t].out {
			n += r.size
		}
	}
	return n
}

func (s *state) nonce() string {
	s.nonces++
	return strconv.FormatUint(s.nonces, 10)
}
