package xds

import (
	"iter"
	"slices"
	"strconv"
	"time"

	"github.com/roostmesh/roost/xds/envoy"
)

// maxResponse bounds the bodies of one response, in bytes; one resource alone
// may be larger. Go's gRPC clients refuse messages over 4 MB.
const maxResponse = 1 << 20

// maxUnacked bounds the responses of a type that a client has not answered; what
// it asks for beyond that waits, and is one response then.
const maxUnacked = 32

// wildcardName subscribes to everything of a wildcard type.
const wildcardName = "*"

// state is the delta xDS protocol of one stream: requests, views and refusals
// go in, responses come out. It has no goroutine, no clock, no lock and no I/O;
// whoever touches it holds the lock of its stream.
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
	// sotw says that the client speaks the state of the world. Responses are as
	// large as they get, as it removes what is not in them, and it is told what
	// there is not: see standIn.
	sotw bool
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
	// too, and is not listed here: see state.named.
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
	size      int       // of its bodies and names, in bytes
	at        time.Time // when it was sent
}

// rejection tells that the client refused a version for the first time.
type rejection struct {
	envoy.Name
	version, message string
}

// newState starts a stream on a view. past is the state of the proxy's previous
// stream, or nil: its refusals stay in force, and what it held is known.
func newState(view envoy.View, version uint64, sets *sets, past *state) *state {
	s := &state{view: view, version: version, sets: sets}
	if past == nil {
		return s
	}
	for t := range envoy.Types {
		ts, was := &s.types[t], &past.types[t]
		ts.earlier = past.mayHave(t)
		for name, r := range was.refused.m {
			now := view.Get(envoy.Name{Type: t, Name: name})
			if now == nil {
				now = past.standIn(envoy.Name{Type: t, Name: name})
			}
			if now != nil && now.Version == r.version {
				ts.refused.set(name, &refusal{version: r.version, message: r.message, since: r.since, retry: retryable(t, r.message)})
				ts.lastError = r.message
			}
		}
	}
	return s
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
	s.markHosts(changes, since)
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
	s.compare(t, name, s.get(envoy.Name{Type: t, Name: name}), wanted, since)
}

// compare marks a resource, which the view has as r, where it differs from what
// the client has.
func (s *state) compare(t envoy.Type, name string, r *envoy.Resource, wanted bool, since uint64) {
	ts := &s.types[t]
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
	i, ok := slices.BinarySearchFunc(r.resources, name, compareName)
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

// lateSince says that a response of before some time has not been answered.
func (s *state) lateSince(t time.Time) bool {
	for i := range s.types {
		if slices.ContainsFunc(s.types[i].out, func(r *response) bool { return r.at.Before(t) }) {
			return true
		}
	}
	return false
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
