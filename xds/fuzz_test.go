package xds

import (
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"pgregory.net/rapid"

	"github.com/roostmesh/roost/xds/envoy"
)

// envoyModel is a client that behaves like Envoy: it applies responses of a
// type in order, ACKs or NACKs each, and keeps its old version of what it
// refuses. It checks every response that it gets.
type envoyModel struct {
	t       *rapid.T
	s       *state
	world   fakeWorld
	sotw    bool         // as a client of the state of the world: without placeholders
	few     []envoy.Type // that it has to do with
	wild    [envoy.Types]bool
	started [envoy.Types]bool
	named   [envoy.Types]map[string]bool
	asked   [envoy.Types]map[string]bool // subscribed, not answered
	inbox   [envoy.Types][]*response
	held    map[envoy.Name]*envoy.Resource
	refused map[envoy.Name]*envoy.Resource
}

var modelNames = []string{"a", "b", "c"}

// modelTypes are what a run is about: everything, or what clients ask for on demand.
var modelTypes = [][]envoy.Type{
	{envoy.Secret, envoy.Cluster, envoy.Endpoint, envoy.Extension, envoy.Listener, envoy.Route, envoy.VirtualHost},
	{envoy.Cluster, envoy.Endpoint},
	{envoy.Cluster, envoy.Route, envoy.VirtualHost},
}

func newModel(t *rapid.T) *envoyModel {
	m := &envoyModel{t: t, held: map[envoy.Name]*envoy.Resource{}, refused: map[envoy.Name]*envoy.Resource{}}
	m.world, _ = fakeWorld{}.with(nil)
	m.s = newState(m.world, m.world.version, newSets(), nil)
	m.sotw = rapid.Bool().Draw(t, "sotw")
	m.s.sotw = m.sotw
	m.few = rapid.SampledFrom(modelTypes).Draw(t, "few")
	for ty := range envoy.Types {
		m.named[ty], m.asked[ty] = map[string]bool{}, map[string]bool{}
	}
	return m
}

// get is what the client is to have of a name that it wants.
func (m *envoyModel) get(n envoy.Name) *envoy.Resource {
	if r := m.world.Get(n); r != nil || m.sotw || n.Type != envoy.VirtualHost && !m.named[envoy.Cluster][n.Name] {
		return r
	}
	return envoy.Placeholder(n)
}

// forgive ends the refusals of versions that are no more.
func (m *envoyModel) forgive() {
	for n, r := range m.refused {
		if now := m.get(n); now == nil || now.Version != r.Version {
			delete(m.refused, n)
		}
	}
}

func (m *envoyModel) wants(n envoy.Name) bool { return m.wild[n.Type] || m.named[n.Type][n.Name] }

// bad says how the model refuses a version: not at all, naming it as Envoy's
// managers do, without a name, or because its address is taken.
func bad(r *envoy.Resource) string {
	h := fnv.New32()
	_, _ = fmt.Fprint(h, r.Name, r.Version)
	switch h.Sum32() % 8 {
	case 0:
		return "list"
	case 1:
		return "unnamed"
	case 2:
		if r.Type == envoy.Listener {
			return "taken"
		}
	}
	return ""
}

func (m *envoyModel) refs(n envoy.Name) []envoy.Name {
	var may []envoy.Type
	switch n.Type {
	case envoy.Cluster:
		may = []envoy.Type{envoy.Endpoint, envoy.Secret}
	case envoy.Route, envoy.Extension:
		may = []envoy.Type{envoy.Cluster}
	case envoy.Listener:
		may = []envoy.Type{envoy.Cluster, envoy.Route, envoy.Extension, envoy.Secret}
	default:
		return nil
	}
	var refs []envoy.Name
	for range rapid.IntRange(0, 2).Draw(m.t, "refs") {
		refs = append(refs, envoy.Name{Type: rapid.SampledFrom(may).Draw(m.t, "ref type"), Name: rapid.SampledFrom(modelNames).Draw(m.t, "ref")})
	}
	return refs
}

// change makes a new World with a few changes.
func (m *envoyModel) change() {
	changed := map[envoy.Name]*envoy.Resource{}
	for range rapid.IntRange(1, 4).Draw(m.t, "changes") {
		n := m.name()
		if n.Type == envoy.VirtualHost {
			n.Type = envoy.Route
			n.Name, _ = envoy.RouteOf(n.Name)
		}
		if rapid.IntRange(0, 3).Draw(m.t, "remove") == 0 {
			changed[n] = nil
			continue
		}
		v := fmt.Sprint(rapid.IntRange(1, 6).Draw(m.t, "version"))
		r := &envoy.Resource{Name: n, Version: v, Refs: m.refs(n)}
		r.Version = v + fmt.Sprint(r.Refs) // the version is the content
		r.Body = []byte(r.Version)
		changed[n] = r
	}
	w, c := m.world.with(changed)
	if rapid.Bool().Draw(m.t, "views") {
		c = envoy.Change{Views: true}
	}
	m.world = w
	m.forgive()
	m.t.Logf("world %d: %v views %v", w.version, changed, c.Views)
	m.s.update(w, w.version, c)
}

func (m *envoyModel) name() envoy.Name {
	return modelName(rapid.SampledFrom(m.few).Draw(m.t, "type"), rapid.SampledFrom(modelNames).Draw(m.t, "name"))
}

// modelName is a name of a type; a virtual host has one of a route's.
func modelName(t envoy.Type, name string) envoy.Name {
	if t == envoy.VirtualHost {
		name += "/host"
	}
	return envoy.Name{Type: t, Name: name}
}

func (m *envoyModel) subscribe() {
	n := m.name()
	q := &discovery.DeltaDiscoveryRequest{}
	switch rapid.IntRange(0, 3).Draw(m.t, "how") {
	case 0:
		if m.wild[n.Type] && rapid.Bool().Draw(m.t, "end wildcard") {
			q.ResourceNamesUnsubscribe = []string{wildcardName}
			m.wild[n.Type] = false
		} else if n.Type.Wildcard() {
			m.wild[n.Type] = true
			q.ResourceNamesSubscribe = []string{wildcardName}
		}
	case 1:
		q.ResourceNamesUnsubscribe = []string{n.Name}
		if m.named[n.Type][n.Name] && m.wild[n.Type] {
			m.asked[n.Type][n.Name] = true
		}
		delete(m.named[n.Type], n.Name)
	default:
		q.ResourceNamesSubscribe = []string{n.Name}
		m.named[n.Type][n.Name], m.asked[n.Type][n.Name] = true, true
	}
	if !m.started[n.Type] && len(q.ResourceNamesSubscribe) == 0 {
		m.wild[n.Type] = n.Type.Wildcard()
	}
	m.started[n.Type] = true
	m.forgive()
	for h := range m.held {
		if !m.wants(h) {
			delete(m.held, h)
		}
	}
	for a := range m.asked[n.Type] {
		if !m.wants(envoy.Name{Type: n.Type, Name: a}) {
			delete(m.asked[n.Type], a)
		}
	}
	m.t.Logf("request %s %v", n.Type, q)
	m.s.request(n.Type, decoded(q), time.Time{})
}

// reconnect starts a new stream: what was on its way is lost, what is held is
// named.
func (m *envoyModel) reconnect() {
	for n, r := range m.refused {
		if retryable(n.Type, bad(r)+textOf(r)) {
			delete(m.refused, n)
		}
	}
	m.s = newState(m.world, m.world.version, m.s.sets, m.s)
	m.s.sotw = m.sotw
	for t := range envoy.Types {
		m.inbox[t], m.asked[t] = nil, map[string]bool{}
		if !m.started[t] {
			continue
		}
		q := &discovery.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{}}
		if m.wild[t] {
			q.ResourceNamesSubscribe = append(q.ResourceNamesSubscribe, wildcardName)
		}
		for name := range m.named[t] {
			q.ResourceNamesSubscribe = append(q.ResourceNamesSubscribe, name)
			m.asked[t][name] = true
		}
		for n, r := range m.held {
			if n.Type == t {
				q.InitialResourceVersions[n.Name] = r.Version
				delete(m.asked[t], n.Name)
			}
		}
		m.wild[t] = m.wild[t] || t.Wildcard() && len(q.ResourceNamesSubscribe) == 0
		m.t.Logf("resume %s %v", t, q)
		m.s.request(t, decoded(q), time.Time{})
	}
}

func textOf(r *envoy.Resource) string {
	if bad(r) == "taken" {
		return textInUse
	}
	return ""
}

func (m *envoyModel) retry() {
	for n, r := range m.refused {
		if textOf(r) != "" {
			delete(m.refused, n)
		}
	}
	m.s.retry()
}

// receive takes what the server has to say now, and checks it.
func (m *envoyModel) receive() {
	for r := m.s.next(); r != nil; r = m.s.next() {
		m.t.Logf("response %s %s: %v removed %v", r.Type, r.nonce, r.resources, r.removed)
		m.check(r)
		for _, res := range r.resources {
			delete(m.asked[r.Type], res.Name.Name)
		}
		for _, name := range r.removed {
			delete(m.asked[r.Type], name)
		}
		m.inbox[r.Type] = append(m.inbox[r.Type], r)
	}
	for t := range envoy.Types {
		for name := range m.asked[t] {
			if m.held[envoy.Name{Type: t, Name: name}] == nil {
				m.t.Fatalf("%s %s: subscribed and not answered", t, name)
			}
		}
	}
}

func (m *envoyModel) check(r *response) {
	answer := len(m.inbox[r.Type]) == 0
	for _, res := range r.resources {
		asked := m.asked[r.Type][res.Name.Name]
		if len(m.inbox[r.Type]) > 0 && !asked {
			m.t.Fatalf("%s: second response in flight holds %s, which nobody asked for", r.Type, res.Name.Name)
		}
		if !m.wants(res.Name) {
			m.t.Fatalf("%v was not subscribed", res.Name)
		}
		if f := m.refused[res.Name]; f != nil && f.Version == res.Version {
			m.t.Fatalf("%v@%s: sent again after a NACK", res.Name, res.Version)
		}
		if !asked {
			m.checkMade(res, m.held[res.Name], res.Refs)
		}
	}
	for _, name := range r.removed {
		if !answer && !m.asked[r.Type][name] {
			m.t.Fatalf("%s %s: removed while a response is in flight", r.Type, name)
		}
		n := envoy.Name{Type: r.Type, Name: name}
		if m.get(n) != nil && m.refused[n] == nil {
			m.t.Fatalf("%v: removed, but the client is to have it", n)
		}
		if m.held[n] == nil || slices.ContainsFunc(m.inbox[n.Type], func(o *response) bool { return slices.Contains(o.removed, name) }) {
			continue
		}
		if m.get(n) != nil {
			m.t.Fatalf("%v: removed, but it exists", n)
		}
		if p := m.parent(n); p != nil {
			m.t.Fatalf("%v: removed while %v refers to it", n, p)
		}
	}
}

// checkMade checks make before break: new references lead to settled clusters.
func (m *envoyModel) checkMade(res, old *envoy.Resource, refs []envoy.Name) {
	if res.Type != envoy.Listener && !leads(res.Type) {
		return
	}
	for _, ref := range refs {
		if old != nil && slices.Contains(old.Refs, ref) {
			continue
		}
		to := m.get(ref)
		switch {
		case to == nil:
		case ref.Type == envoy.Cluster:
			f := m.refused[ref]
			held := m.held[ref]
			settled := held != nil && (!isStandIn(held) || isStandIn(to))
			if m.wants(ref) && !settled && (f == nil || f.Version != to.Version) {
				m.t.Fatalf("%v@%s: sent before the new %v is settled", res.Name, res.Version, ref)
			}
		case ref.Type == envoy.Route || ref.Type == envoy.Extension:
			m.checkMade(res, nil, to.Refs)
		}
	}
}

// parent finds what the client holds, or will, that refers to n.
func (m *envoyModel) parent(n envoy.Name) *envoy.Name {
	all := slices.Collect(maps.Values(m.held))
	for t := range envoy.Types {
		for _, r := range m.inbox[t] {
			all = append(all, r.resources...)
		}
	}
	for _, r := range all {
		if r.Name != n && (slices.Contains(r.Refs, n) || r.Type == envoy.Cluster && n == envoy.Name{Type: envoy.Endpoint, Name: r.Name.Name}) {
			return &r.Name
		}
	}
	return nil
}

// process applies the oldest response of a type and answers it; quiet leaves
// the answer out, as when the stream breaks then.
func (m *envoyModel) process(t envoy.Type, quiet bool) {
	if len(m.inbox[t]) == 0 {
		return
	}
	r := m.inbox[t][0]
	m.inbox[t] = m.inbox[t][1:]
	q := &discovery.DeltaDiscoveryRequest{ResponseNonce: r.nonce}
	list := ""
	unnamed := false
	for _, res := range r.resources {
		switch bad(res) {
		case "list":
			list += res.Name.Name + ": bad\n"
		case "taken":
			list += res.Name.Name + ": cannot bind '127.0.0.1:80': " + textInUse + "\n"
		case "unnamed":
			unnamed = true
		}
	}
	switch {
	case unnamed:
		q.ErrorDetail = &rpcstatus.Status{Message: "?"}
	case list != "":
		q.ErrorDetail = &rpcstatus.Status{Message: "Error adding/updating " + t.String() + "(s) " + list}
	}
	for _, res := range r.resources {
		switch refused := bad(res) != "" && (!unnamed || len(r.resources) == 1); {
		case refused:
			if now := m.get(res.Name); now != nil && now.Version == res.Version && m.wants(res.Name) && !quiet {
				m.refused[res.Name] = res
			}
		case q.ErrorDetail == nil, !unnamed && t.Wildcard():
			if m.wants(res.Name) {
				m.held[res.Name] = res
			}
		}
	}
	if q.ErrorDetail == nil {
		for _, name := range r.removed {
			delete(m.held, envoy.Name{Type: t, Name: name})
		}
	}
	m.t.Logf("%s %s: quiet %v: %v", t, r.nonce, quiet, q)
	if !quiet {
		m.s.request(t, decoded(q), time.Time{})
	}
}

// settle answers until nothing is left, and compares.
func (m *envoyModel) settle() {
	m.receive()
	for n := 0; ; n++ {
		if n > 10000 {
			m.t.Fatalf("never settles")
		}
		busy := false
		for t := range envoy.Types {
			if len(m.inbox[t]) > 0 {
				m.process(t, false)
				m.receive()
				busy = true
			}
		}
		if !busy {
			break
		}
	}
	if p := m.s.progress(); p.pushed != m.world.version || p.acked != m.world.version {
		m.t.Fatalf("progress %v at rest, want %d", p, m.world.version)
	}
	for n := range m.all() {
		want, got, f := m.get(n), m.held[n], m.refused[n]
		if want != nil && m.started[n.Type] && m.wants(n) && (got == nil || got.Version != want.Version) && (f == nil || f.Version != want.Version) {
			m.t.Fatalf("%v: client has %v, want %s", n, got, want.Version)
		}
	}
	for n := range m.held {
		if m.get(n) == nil && m.parent(n) == nil && !m.unknownParent(n) {
			m.t.Fatalf("%v: client keeps it, but it is gone and nothing refers to it", n)
		}
	}
	for t := range envoy.Types {
		if c := m.s.count(t); m.started[t] && (c.Sent != c.Acked+c.Rejected || c.Acked < 0) {
			m.t.Fatalf("%s: %+v at rest", t, c)
		}
	}
}

// unknownParent says that the server must think that something refers to n.
func (m *envoyModel) unknownParent(n envoy.Name) bool {
	for t := range envoy.Types {
		if !mayRefer(t, n.Type) {
			continue
		}
		for _, r := range m.s.types[t].held.all() {
			if r.Body == nil {
				return true
			}
		}
		if m.s.types[n.Type].resumed && !m.s.types[t].started {
			return true
		}
	}
	return false
}

func stateProperty(t *rapid.T) {
	m := newModel(t)
	for range rapid.IntRange(1, 60).Draw(t, "steps") {
		switch rapid.IntRange(0, 11).Draw(t, "step") {
		case 0, 1, 2:
			m.change()
		case 3, 4, 5:
			m.subscribe()
		case 6:
			m.retry()
		case 7:
			m.process(envoy.Type(rapid.IntRange(0, int(envoy.Types)-1).Draw(t, "lost")), true)
			m.reconnect()
		case 8:
			m.settle()
		default:
			m.process(envoy.Type(rapid.IntRange(0, int(envoy.Types)-1).Draw(t, "type")), false)
		}
		m.receive()
	}
	m.settle()
}

// TestStateModel runs the state against the model of Envoy.
func TestStateModel(t *testing.T) { rapid.Check(t, stateProperty) }

// FuzzState is the same for the fuzzer.
func FuzzState(f *testing.F) {
	for seed := range uint64(20) {
		data := make([]byte, 1<<17) // enough for the longest run: a shorter one would be skipped
		_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(data)
		f.Add(data)
	}
	f.Fuzz(rapid.MakeFuzz(stateProperty))
}
