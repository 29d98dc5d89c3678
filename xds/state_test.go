package xds

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/roostmesh/roost/xds/envoy"
)

// fakeWorld is a World that shows every proxy all of a map, which nobody
// changes any more.
type fakeWorld struct {
	version   uint64
	resources map[envoy.Name]*envoy.Resource
}

func (w fakeWorld) Version() uint64             { return w.version }
func (w fakeWorld) View(envoy.Proxy) envoy.View { return w }
func (w fakeWorld) Limited() bool               { return false }

// Get finds a resource. A route whose content is made up has all hosts, with the
// route's versions.
func (w fakeWorld) Get(n envoy.Name) *envoy.Resource {
	if n.Type != envoy.VirtualHost {
		return w.resources[n]
	}
	name, _ := envoy.RouteOf(n.Name)
	route := w.resources[envoy.Name{Type: envoy.Route, Name: name}]
	if route == nil {
		return nil
	}
	if _, err := route.Message(); err == nil {
		return envoy.NewHosts(route).Get(n)
	}
	return &envoy.Resource{Name: n, Version: route.Version, Body: route.Body, Refs: route.Refs}
}

func (w fakeWorld) All(t envoy.Type) iter.Seq[*envoy.Resource] {
	return func(yield func(*envoy.Resource) bool) {
		for _, n := range slices.SortedFunc(maps.Keys(w.resources), func(a, b envoy.Name) int { return strings.Compare(a.Name, b.Name) }) {
			if n.Type == t && !yield(w.resources[n]) {
				return
			}
		}
	}
}

// with returns the next World, changed: a nil resource is removed.
func (w fakeWorld) with(changed map[envoy.Name]*envoy.Resource) (fakeWorld, envoy.Change) {
	next := fakeWorld{w.version + 1, maps.Clone(w.resources)}
	if next.resources == nil {
		next.resources = map[envoy.Name]*envoy.Resource{}
	}
	var c envoy.Change
	for n, r := range changed {
		c.Names = append(c.Names, n)
		next.resources[n] = r
		if r == nil {
			delete(next.resources, n)
		}
	}
	return next, c
}

// name reads TYPE/NAME.
func name(t testing.TB, s string) envoy.Name {
	t.Helper()
	kind, n, _ := strings.Cut(s, "/")
	typ, ok := envoy.TypeNamed(kind)
	if !ok {
		t.Fatalf("%q: no type", s)
	}
	return envoy.Name{Type: typ, Name: n}
}

// resource reads TYPE/NAME@VERSION[,REF...].
func resource(t testing.TB, s string) *envoy.Resource {
	t.Helper()
	parts := strings.Split(s, ",")
	id, version, _ := strings.Cut(parts[0], "@")
	r := &envoy.Resource{Name: name(t, id), Version: version, Body: []byte(s)}
	for _, ref := range parts[1:] {
		r.Refs = append(r.Refs, name(t, ref))
	}
	return r
}

// script drives a state: each line is a command, or "> " and what comes out.
//
//	world RESOURCE... -TYPE/NAME...   the next World: these set, those removed
//	views RESOURCE...                 the same, as a change of who sees what
//	sub|unsub TYPE NAME...            a request; * is the wildcard, none the old wildcard
//	resume TYPE NAME=VERSION... [+NAME...]  a first request with initial versions
//	ack N, nack N TEXT, retry, reconnect
type script struct {
	t     *testing.T
	s     *state
	world fakeWorld
	sent  map[string]*response
	news  []string
}

func (x *script) run(text string) {
	var want, got []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		want = append(want, line)
		if strings.HasPrefix(line, ">") || strings.HasPrefix(line, "!") {
			continue
		}
		got = append(got, line)
		x.do(line)
		got = append(got, x.news...)
		x.news = nil
		got = append(got, x.out()...)
	}
	if d := cmp.Diff(want, got); d != "" {
		x.t.Errorf("-want +got:\n%s", d)
	}
}

func (x *script) out() (lines []string) {
	for r := x.s.next(); r != nil; r = x.s.next() {
		x.sent[r.nonce] = r
		line := fmt.Sprintf("> %s %s:", r.nonce, r.Type)
		for _, res := range r.resources {
			line += " " + res.Name.Name + "@" + res.Version
		}
		for _, n := range r.removed {
			line += " -" + n
		}
		lines = append(lines, line)
	}
	return lines
}

func (x *script) do(line string) {
	verb, rest, _ := strings.Cut(line, " ")
	args := strings.Fields(rest)
	switch verb {
	case "world", "views":
		x.change(verb, args)
	case "sub", "unsub", "resume":
		x.subscribe(verb, args)
	case "ack", "nack":
		r := x.sent[args[0]]
		if r == nil {
			x.t.Fatalf("%s: no such response", line)
		}
		q := &discovery.DeltaDiscoveryRequest{ResponseNonce: r.nonce}
		if verb == "nack" {
			_, said, _ := strings.Cut(rest, " ")
			q.ErrorDetail = &rpcstatus.Status{Message: strings.ReplaceAll(said, `\n`, "\n")}
		}
		for _, j := range x.s.request(r.Type, decoded(q), time.Time{}) {
			x.news = append(x.news, "! "+j.Type.String()+" "+j.Name.Name+"@"+j.version)
		}
	case "retry":
		x.s.retry()
	case "reconnect":
		x.s = newState(x.world, x.world.version, x.s.sets, x.s)
	default:
		x.t.Fatalf("%q: no such command", line)
	}
}

func (x *script) change(verb string, args []string) {
	changed := map[envoy.Name]*envoy.Resource{}
	for _, a := range args {
		if n, gone := strings.CutPrefix(a, "-"); gone {
			changed[name(x.t, n)] = nil
		} else {
			r := resource(x.t, a)
			changed[r.Name] = r
		}
	}
	next, c := x.world.with(changed)
	x.world = next
	if verb == "views" {
		c = envoy.Change{Views: true}
	}
	if x.s == nil {
		x.s = newState(next, next.version, newSets(), nil)
		return
	}
	x.s.update(next, next.version, c)
}

func (x *script) subscribe(verb string, args []string) {
	typ, _ := envoy.TypeNamed(args[0])
	q := &discovery.DeltaDiscoveryRequest{}
	for _, a := range args[1:] {
		n, version, resumed := strings.Cut(a, "=")
		switch {
		case verb == "unsub":
			q.ResourceNamesUnsubscribe = append(q.ResourceNamesUnsubscribe, n)
		case resumed:
			if q.InitialResourceVersions == nil {
				q.InitialResourceVersions = map[string]string{}
			}
			q.InitialResourceVersions[n] = version
			if !typ.Wildcard() {
				q.ResourceNamesSubscribe = append(q.ResourceNamesSubscribe, n)
			}
		default:
			q.ResourceNamesSubscribe = append(q.ResourceNamesSubscribe, strings.TrimPrefix(n, "+"))
		}
	}
	x.s.request(typ, decoded(q), time.Time{})
}

func TestState(t *testing.T) {
	for _, c := range stateCases {
		t.Run(c.name, func(t *testing.T) {
			x := &script{t: t, sent: map[string]*response{}}
			x.run(c.script)
		})
	}
}

// TestProgress follows which World versions are sent and settled.
func TestProgress(t *testing.T) {
	x := &script{t: t, sent: map[string]*response{}}
	at := func(pushed, acked uint64) {
		t.Helper()
		if got, want := x.s.progress(), (position{pushed, acked}); got != want {
			t.Errorf("progress %v, want %v", got, want)
		}
	}
	x.run("world cluster/a@1 endpoint/a@1")
	at(1, 1)
	x.run("sub cluster *\n> 1 cluster: a@1")
	at(1, 0)
	x.run("ack 1")
	at(1, 1)
	x.run("world endpoint/a@2") // nobody asked for it
	at(2, 2)
	x.run("sub endpoint a\n> 2 endpoint: a@2\nworld endpoint/a@3\nworld cluster/b@1\n> 3 cluster: b@1")
	at(2, 1)
	x.run("ack 3")
	at(2, 1)
	x.run("ack 2\n> 4 endpoint: a@3")
	at(4, 2)
	x.run("nack 4 bad\n! endpoint a@3")
	at(4, 4)
	x.run("sub listener *\n> 5 listener:\nack 5\nworld listener/l@1,cluster/a\n> 6 listener: l@1\nack 6")
	at(5, 5)
	x.run("world listener/l@2\n> 7 listener: l@2\nnack 7 bad\n! listener l@2\nworld -cluster/a")
	at(7, 7) // a refused parent keeps its child: nothing more can be done
}

func TestSplit(t *testing.T) {
	changed := map[envoy.Name]*envoy.Resource{}
	for i := range 5 {
		r := resource(t, fmt.Sprintf("cluster/%d@1", i))
		r.Body = make([]byte, maxResponse/2)
		if i == 4 {
			r.Body = make([]byte, 2*maxResponse)
		}
		changed[r.Name] = r
	}
	w, _ := fakeWorld{}.with(changed)
	s := newState(w, 1, newSets(), nil)
	s.request(envoy.Cluster, &request{}, time.Time{})
	sent := map[string]int{}
	for responses := 0; len(sent) < len(changed); responses++ {
		r := s.next()
		if r == nil || responses == len(changed) {
			t.Fatalf("after %d responses %v was sent", responses, sent)
		}
		if r.size > maxResponse && len(r.resources) > 1 {
			t.Errorf("a response of %d resources has %d bytes", len(r.resources), r.size)
		}
		for _, res := range r.resources {
			sent[res.Name.Name]++
		}
		if early := s.next(); early != nil {
			t.Errorf("before the first is ACKed %d more are sent", len(early.resources))
		}
		s.request(envoy.Cluster, &request{nonce: r.nonce}, time.Time{})
	}
	for name, n := range sent {
		if n != 1 {
			t.Errorf("%s was sent %d times", name, n)
		}
	}
	if r := s.next(); r != nil {
		t.Errorf("all is there, and %d resources are sent", len(r.resources))
	}
}

// TestProgressOfSkippedWorlds: a stream that goes over several Worlds at once
// has settled none of them before what changed in the first is ACKed.
func TestProgressOfSkippedWorlds(t *testing.T) {
	x := &script{t: t, sent: map[string]*response{}}
	x.run("world cluster/a@1 cluster/b@1\nsub cluster *\n> 1 cluster: a@1 b@1\nack 1")
	if got, want := x.s.progress(), (position{1, 1}); got != want {
		t.Fatalf("progress %v, want %v", got, want)
	}
	second, c2 := x.world.with(map[envoy.Name]*envoy.Resource{name(t, "cluster/a"): resource(t, "cluster/a@2")})
	third, c3 := second.with(map[envoy.Name]*envoy.Resource{name(t, "cluster/b"): resource(t, "cluster/b@2")})
	x.world = third
	x.s.update(third, third.version, c2, c3)
	if got, want := x.s.progress(), (position{1, 1}); got != want {
		t.Errorf("before it is sent: progress %v, want %v", got, want)
	}
	x.run("retry\n> 2 cluster: a@2 b@2")
	if got, want := x.s.progress(), (position{3, 1}); got != want {
		t.Errorf("before the ACK: progress %v, want %v", got, want)
	}
	x.run("ack 2")
	if got, want := x.s.progress(), (position{3, 3}); got != want {
		t.Errorf("after the ACK: progress %v, want %v", got, want)
	}
}
