package xds

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/xds/envoy"
)

func TestTracker(t *testing.T) {
	var tr tracker
	at := func(pushed, acked uint64, n int) {
		t.Helper()
		if got, want := tr.progress(), (Progress{pushed, acked, n}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	at(0, 0, 0)
	tr.publish(3)
	at(3, 3, 0)
	a, b := tr.join(), tr.join()
	tr.publish(4)
	at(4, 4, 2) // concerns nobody
	tr.publish(7, a)
	at(4, 4, 2)
	if !tr.behind(a, 7) || tr.behind(b, 7) || tr.behind(a, 4) {
		t.Errorf("a is at %+v, b at %+v", a, b)
	}
	tr.publish(8, a, b)
	if !tr.move(b, position{8, 8}) || tr.move(b, position{8, 8}) {
		t.Error("b had one version to settle")
	}
	at(4, 4, 2)
	tr.move(a, position{8, 7})
	at(8, 7, 2)
	tr.move(a, position{2, 2}) // never back
	at(8, 7, 2)
	tr.publish(9)
	at(8, 7, 2)
	tr.leave(a)
	at(9, 9, 1)
	tr.publish(10, b)
	at(9, 9, 1)
	tr.leave(b)
	at(10, 10, 0)
	if len(tr.versions) != 1 {
		t.Errorf("kept versions %v", tr.versions)
	}
}

// TestAudience: who is named is who has subscribed, whatever came before.
func TestAudience(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var a audience
		model := map[*stream]map[string]bool{}
		types := []envoy.Type{envoy.Cluster, envoy.Endpoint}
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			all := slices.SortedFunc(maps.Keys(model), func(a, b *stream) int { return a.slot - b.slot })
			name, typ := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "name"), rapid.SampledFrom(types).Draw(rt, "type")
			what := rapid.IntRange(0, 4).Draw(rt, "what")
			if len(all) == 0 || what == 0 {
				for range rapid.SampledFrom([]int{1, 40}).Draw(rt, "come") { // over more than one word
					st := &stream{}
					a.join(st)
					model[st] = map[string]bool{}
				}
				continue
			}
			st := rapid.SampledFrom(all).Draw(rt, "stream")
			switch what {
			case 1:
				a.leave(st, func(t envoy.Type) (names []string) {
					for _, n := range []string{"a", "b", "c"} {
						if model[st][t.String()+n] {
							names = append(names, n)
						}
					}
					return names
				})
				delete(model, st)
			case 2, 3:
				a.subscribe(st, typ, []string{name}, false)
				model[st][typ.String()+name] = true
			case 4:
				if rapid.Bool().Draw(rt, "wildcard") {
					a.subscribe(st, typ, nil, true)
					model[st][typ.String()+wildcardName] = true
				} else {
					a.unsubscribe(st, typ, []string{name, wildcardName})
					delete(model[st], typ.String()+name)
					delete(model[st], typ.String()+wildcardName)
				}
			}
			got := a.of([]envoy.Name{{Type: typ, Name: name}, {Type: typ, Name: "other"}})
			want := 0
			for st, has := range model {
				if has[typ.String()+name] || has[typ.String()+wildcardName] {
					want++
					if !slices.Contains(got, st) {
						rt.Fatalf("a stream that has subscribed to %s %s is not concerned", typ, name)
					}
				}
			}
			if len(got) != want {
				rt.Fatalf("%d streams are concerned, %d have subscribed", len(got), want)
			}
			seen := map[*stream]bool{}
			for range 3 {
				for _, st := range a.some(3) {
					seen[st] = true
				}
			}
			if len(seen) != len(model) {
				rt.Fatalf("three thirds of %d streams are %d", len(model), len(seen))
			}
		}
		for st := range model {
			a.leave(st, func(envoy.Type) []string { return []string{"a", "b", "c"} })
		}
		for _, t := range types {
			if len(a.named[t]) > 0 || len(a.wildcard[t]) > 0 {
				rt.Fatalf("nobody is left, and %v %v of %s are kept", a.named[t], a.wildcard[t], t)
			}
		}
	})
}

// TestConcerned: a change is settled by those that it concerns; the others move
// on by themselves and keep no World for long.
func TestConcerned(t *testing.T) {
	h := start(t, Config{})
	h.publish("endpoint/a@1", "endpoint/b@1")
	a, b := h.dial("sidecar~acme~shop~1"), h.dial("sidecar~acme~shop~2")
	a.subscribe(envoy.Endpoint, "a")
	a.receive("endpoint: a@1", "")
	b.subscribe(envoy.Endpoint, "b")
	b.receive("endpoint: b@1", "")
	h.acked(1)
	h.publish("endpoint/a@2")
	a.receive("endpoint: a@2", "")
	h.acked(2) // without b
	for i := range 3 * lagAtMost {
		h.publish(fmt.Sprintf("endpoint/a@%d", i+3))
	}
	b.subscribe(envoy.Endpoint, "a")
	b.receive(fmt.Sprintf("endpoint: a@%d", 3*lagAtMost+2), "")
	live, _ := h.s.known()
	for _, st := range live {
		lag := 0
		st.ask(func(*state) {
			for e := st.at; e != h.s.newest.Load(); e = e.next.Load() {
				lag++
			}
		})
		if lag > lagAtMost {
			t.Errorf("%s is %d Worlds behind", st.id, lag)
		}
	}
}

// TestAudienceOfRoutes: who asks for a virtual host is concerned by routes, however
// it says so.
func TestAudienceOfRoutes(t *testing.T) {
	var a audience
	st := &stream{}
	a.join(st)
	concerned := func() bool {
		return len(a.of([]envoy.Name{{Type: envoy.Route, Name: "r"}})) == 1
	}
	if concerned() {
		t.Error("a stream is concerned before it has asked for anything")
	}
	a.subscribe(st, envoy.VirtualHost, []string{"r/a", "r/b"}, false)
	a.unsubscribe(st, envoy.VirtualHost, []string{"r/a", wildcardName})
	if !concerned() {
		t.Error("a stream with a virtual host is not concerned by its route")
	}
	a.leave(st, func(envoy.Type) []string { return nil })
	if concerned() {
		t.Error("a stream that has left is concerned")
	}
}
