package xds

import (
	"maps"
	"slices"
	"strconv"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

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
	// unsplit has responses be as large as they get: a client of the state of the
	// world removes what is not in them.
	unsplit bool
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
	started  bool                // the first request has come
	resumed  bool                // and said that the client has some of the type
	wildcard bool                // subscribed to all of a wildcard type
	owed     uint64              // since: the answer to the wildcard subscription, even an empty one
	named    map[string]struct{} // subscribed by name

	// held is what the client has: the last version that it ACKed. One whose
	// version is known but not its content has no Body: its Refs are unknown.
	held map[string]*envoy.Resource
	// earlier is what the previous stream of this proxy may have left it with; it gives content
	// to the versions that the first request names, and is dropped then.
	earlier map[string]*envoy.Resource

	out    []*response       // sent, neither ACKed nor NACKed, oldest first
	flight map[string]flying // the newest of out by resource name

	answers  map[string]uint64   // since: subscribed and not answered yet
	dirty    map[string]uint64   // since: may differ from what the view says
	again    map[string]struct{} // dirty, and sent even when unchanged: their parent was sent
	suspects map[string]suspect  // one of them spoiled a response: each goes alone
	refused  map[string]*refusal

	lastError string // of the last NACK, until nothing is refused any more
}

// flying is a resource on its way; res is nil for a removal.
type flying struct {
	nonce string
	res   *envoy.Resource
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
	world     uint64 // its version
	resources []*envoy.Resource
	removed   []string
	since     uint64
}

// rejection tells that the client refused a version for the first time.
type rejection struct {
	envoy.Name
	version, message string
}

// newState starts a stream on a view. past is the state of the proxy's previous
// stream, or nil: its refusals stay in force, and what it held is known.
func newState(view envoy.View, version uint64, past *state) *state {
	s := &state{view: view, version: version}
	for t := range envoy.Types {
		s.types[t] = typeState{
			named: map[string]struct{}{}, held: map[string]*envoy.Resource{}, flight: map[string]flying{},
			answers: map[string]uint64{}, dirty: map[string]uint64{}, again: map[string]struct{}{},
			suspects: map[string]suspect{}, refused: map[string]*refusal{},
		}
		if past == nil {
			continue
		}
		ts, was := &s.types[t], &past.types[t]
		ts.earlier = was.mayHave()
		for name, r := range was.refused {
			if now := view.Get(envoy.Name{Type: t, Name: name}); now != nil && now.Version == r.version {
				ts.refused[name] = &refusal{version: r.version, message: r.message, since: r.since, retry: retryable(t, r.message)}
				ts.lastError = r.message
			}
		}
	}
	return s
}

// request takes one request of the client: first what it says about a response,
// then its subscriptions. It returns what was refused for the first time.
func (s *state) request(t envoy.Type, q *discovery.DeltaDiscoveryRequest, now time.Time) []rejection {
	ts := &s.types[t]
	rejected := s.settle(t, q, now)
	for _, name := range q.GetResourceNamesUnsubscribe() {
		s.unsubscribe(t, name)
	}
	subscribe := q.GetResourceNamesSubscribe()
	if ts.started {
		for _, name := range subscribe {
			s.subscribe(t, name)
		}
		return rejected
	}
	ts.started = true
	s.begin(t, subscribe, q.GetInitialResourceVersions())
	return rejected
}

// begin takes the first request of a type. What the client says it has is
// compared like a change; every other name is answered.
func (s *state) begin(t envoy.Type, subscribe []string, versions map[string]string) {
	ts := &s.types[t]
	if t.Wildcard() && len(subscribe) == 0 {
		s.subscribe(t, wildcardName)
	}
	for _, name := range subscribe {
		s.subscribe(t, name)
	}
	for name, version := range versions {
		if name == wildcardName || !s.wants(t, name) {
			continue
		}
		ts.held[name] = s.recall(t, name, version)
		ts.dirty[name] = s.version
		delete(ts.answers, name)
	}
	if len(versions) > 0 {
		ts.resumed, ts.owed = true, 0
	}
	ts.earlier = nil
	for name := range ts.again {
		if !s.wants(t, name) {
			delete(ts.again, name)
		}
	}
	s.unpruned = true
}

// recall finds the content of a version that the client says it has.
func (s *state) recall(t envoy.Type, name, version string) *envoy.Resource {
	n := envoy.Name{Type: t, Name: name}
	if r := s.view.Get(n); r != nil && r.Version == version {
		return r
	}
	if r := s.types[t].earlier[name]; r != nil && r.Version == version {
		return r
	}
	return &envoy.Resource{Name: n, Version: version}
}

func (s *state) subscribe(t envoy.Type, name string) {
	ts := &s.types[t]
	switch {
	case name != wildcardName:
		ts.named[name] = struct{}{}
		ts.answers[name] = s.version
	case t.Wildcard():
		ts.wildcard, ts.owed = true, s.version
		for r := range s.view.All(t) {
			s.mark(t, r.Name.Name, s.version)
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
			if _, ok := ts.named[name]; !ok {
				ts.forget(name)
			}
		}
		return
	}
	if _, ok := ts.named[name]; !ok {
		return
	}
	delete(ts.named, name)
	if ts.wildcard {
		ts.answers[name] = s.version
		return
	}
	ts.forget(name)
}

// forget drops all but a refusal, which stays in force on this stream.
func (ts *typeState) forget(name string) {
	delete(ts.held, name)
	delete(ts.answers, name)
	delete(ts.dirty, name)
	delete(ts.again, name)
	delete(ts.suspects, name)
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
	maps.Copy(all, ts.named)
	collect(all, ts.held)
	collect(all, ts.flight)
	collect(all, ts.answers)
	collect(all, ts.dirty)
	collect(all, ts.suspects)
	collect(all, ts.refused)
	return slices.Sorted(maps.Keys(all))
}

func collect[V any](all map[string]struct{}, names map[string]V) {
	for name := range names {
		all[name] = struct{}{}
	}
}

// wants says whether the client is to have the resource when it exists.
func (s *state) wants(t envoy.Type, name string) bool {
	ts := &s.types[t]
	if ts.wildcard {
		return true
	}
	_, ok := ts.named[name]
	return ok
}

// update moves the stream to a newer World. What differs is owed from the first
// World on that the stream has skipped: it may have changed there.
func (s *state) update(view envoy.View, version uint64, changes ...envoy.Change) {
	since := s.version + 1
	s.view, s.version = view, version
	for _, c := range changes {
		if c.Views {
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
	r := s.view.Get(envoy.Name{Type: t, Name: name})
	if f := ts.refused[name]; f != nil && (r == nil || r.Version != f.version) {
		delete(ts.refused, name)
		ts.calm()
	}
	if !s.wants(t, name) {
		return
	}
	if r == nil {
		s.unpruned = true
	}
	if last := ts.last(name); last == r || last != nil && r != nil && last.Version == r.Version {
		if _, forced := ts.again[name]; !forced {
			delete(ts.dirty, name)
			return
		}
	}
	ts.owe(name, since)
}

// last is what the client has once it has taken all that is on its way.
func (ts *typeState) last(name string) *envoy.Resource {
	if f, ok := ts.flight[name]; ok {
		return f.res
	}
	return ts.held[name]
}

// mayHave is what the client is left with when its stream ends: what it was sent
// may have arrived though its ACK has not.
func (ts *typeState) mayHave() map[string]*envoy.Resource {
	if !ts.started {
		return ts.earlier
	}
	all := maps.Clone(ts.held)
	for name, f := range ts.flight {
		if all[name] == nil && f.res != nil {
			all[name] = f.res
		}
	}
	return all
}

// resumes says that the client goes on with what it had from another stream.
func (s *state) resumes() bool {
	return slices.ContainsFunc(s.types[:], func(ts typeState) bool { return ts.resumed })
}

func (ts *typeState) calm() {
	if len(ts.refused) == 0 {
		ts.lastError = ""
	}
}

func (s *state) nonce() string {
	s.nonces++
	return strconv.FormatUint(s.nonces, 10)
}
