package consul

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"go.uber.org/goleak"

	"github.com/roostmesh/roost/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newSource(t *testing.T, c Config) *Source {
	t.Helper()
	c.Name = "consul"
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func entry(id string, meta map[string]string, change ...func(*api.ServiceEntry)) *api.ServiceEntry {
	e := &api.ServiceEntry{Node: &api.Node{Node: "h1", Address: "192.0.2.1"}, Service: &api.AgentService{ID: id, Service: "shop", Address: "10.0.0.1", Port: 9001, Meta: meta, Weights: api.AgentWeights{Passing: 1, Warning: 1}}}
	for _, f := range change {
		f(e)
	}
	return e
}

// spell writes what a registration came to.
func spell(list []discovery.Instance, problems []discovery.Problem) string {
	var got []string
	for _, i := range list {
		var wants []string
		for _, w := range i.Wants {
			wants = append(wants, fmt.Sprintf("%s %d %s", w.Name, w.Dial, w.Protocol))
			if w.Guessed {
				wants = append(wants, "guessed")
			}
		}
		got = append(got, fmt.Sprintf("%s %s %s w%d %v %v", i.QualifiedName(), i.Address, i.Health, i.Weight, i.Ports, wants))
	}
	for _, p := range problems {
		got = append(got, p.Code+" "+p.Place)
	}
	return strings.Join(got, " ")
}

// TestInstances: what a registration says, and each way in which it can be
// wrong.
func TestInstances(t *testing.T) {
	acme := func(more ...string) map[string]string {
		m := map[string]string{"roost-tenant": "acme"}
		for i := 0; i+1 < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	check := func(status string) func(*api.ServiceEntry) {
		return func(e *api.ServiceEntry) { e.Checks = append(e.Checks, &api.HealthCheck{CheckID: "c", Status: status}) }
	}
	s := newSource(t, Config{})
	for _, c := range []struct {
		name, want string
		e          *api.ServiceEntry
	}{
		{"plain", "acme/shop/a@h1 10.0.0.1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme())},
		{"http is dialled at 80", "acme/shop/a@h1 10.0.0.1 passing w1 [{http 9001}] [http 80 http]", entry("a", acme("roost-protocol", "http"))},
		{"explicit port", "acme/shop/a@h1 10.0.0.1 passing w1 [{web 9001}] [web 8080 http]", entry("a", acme("roost-protocol", "http", "roost-port", "8080", "roost-port-name", "web"))},
		{"further ports", "acme/shop/a@h1 10.0.0.1 passing w1 [{tcp 9001} {grpc 31877} {metrics 9100}] [tcp 9001 tcp guessed grpc 9090 grpc metrics 9100 tcp]", entry("a", acme("roost-port-grpc", "9090:31877", "roost-port-metrics", "9100/tcp"))},
		{"another name", "acme/cart/a@h1 10.0.0.1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme("roost-service", "cart"))},
		{"node address", "acme/shop/a@h1 192.0.2.1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Address = "" })},
		{"ipv6", "acme/shop/a@h1 fd00::1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Address = "fd00::1" })},
		{"critical", "acme/shop/a@h1 10.0.0.1 critical w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), check("passing"), check("critical"))},
		{"warning weighs as it says", "acme/shop/a@h1 10.0.0.1 warning w7 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), check("warning"), func(e *api.ServiceEntry) { e.Service.Weights.Warning = 7 })},
		{"service maintenance", "acme/shop/a@h1 10.0.0.1 maintenance w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), func(e *api.ServiceEntry) {
			e.Checks = append(e.Checks, &api.HealthCheck{CheckID: api.ServiceMaintPrefix + "a", Status: "critical"})
		})},
		{"node maintenance", "acme/shop/a@h1 10.0.0.1 maintenance w1 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), func(e *api.ServiceEntry) {
			e.Checks = append(e.Checks, &api.HealthCheck{CheckID: api.NodeMaint, Status: "critical"})
		})},
		{"not a member", "", entry("a", nil)},
		{"a proxy", "", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Kind = api.ServiceKindConnectProxy })},
		{"bad tenant", "instance_invalid consul:h1/a roost-tenant", entry("a", map[string]string{"roost-tenant": "Acme"})},
		{"bad name", "instance_invalid consul:h1/a roost-service", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Service = "my_shop" })},
		{"bad address", "instance_address_invalid consul:h1/a Address", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Address = "shop.local" })},
		{"no port", "instance_invalid consul:h1/a Port", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Port = 0 })},
		{"bad protocol", "instance_invalid consul:h1/a roost-protocol", entry("a", acme("roost-protocol", "htp"))},
		{"bad number counts as absent", "acme/shop/a@h1 10.0.0.1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed] port_invalid consul:h1/a roost-port", entry("a", acme("roost-port", "many"))},
		{"bad further port", "acme/shop/a@h1 10.0.0.1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed] port_invalid consul:h1/a roost-port-x", entry("a", acme("roost-port-x", "1:2:3"))},
		{"a port twice", "acme/shop/a@h1 10.0.0.1 passing w1 [{tcp 9001}] [tcp 9001 tcp guessed] port_invalid consul:h1/a roost-port-tcp", entry("a", acme("roost-port-tcp", "9090"))},
		{"heavy", "acme/shop/a@h1 10.0.0.1 passing w65535 [{tcp 9001}] [tcp 9001 tcp guessed]", entry("a", acme(), func(e *api.ServiceEntry) { e.Service.Weights.Passing = 65535 })},
	} {
		list, problems := s.instances([]*api.ServiceEntry{c.e})
		if diff := cmp.Diff(c.want, spell(list, problems)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", c.name, diff)
		}
	}
	if list, _ := newSource(t, Config{DefaultTenant: "acme"}).instances([]*api.ServiceEntry{entry("a", nil)}); len(list) != 1 || list[0].Key.Tenant != "acme" {
		t.Errorf("with a default tenant: %+v", list)
	}
}

// fake answers like a Consul in faults that a real one cannot be brought to.
type fake struct {
	// "", 500, junk, null, nothing, sick (one service of two), zero, young (without a
	// node), lags (an older state for whom that will do)
	mode  atomic.Value
	index atomic.Uint64
	asked atomic.Int64
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.asked.Add(1)
	switch f.mode.Load() {
	case "500":
		http.Error(w, "rpc error", http.StatusInternalServerError)
		return
	case "junk":
		_, _ = w.Write([]byte("<html>"))
		return
	case "null":
		w.Header().Set("X-Consul-Index", "1000")
		_, _ = w.Write([]byte("null"))
		return
	case "nothing":
		panic(http.ErrAbortHandler)
	case "sick":
		if strings.HasSuffix(r.URL.Path, "/sick") {
			http.Error(w, "no path to datacenter", http.StatusInternalServerError)
			return
		}
		f.answer(w, r, `{"shop": [], "sick": []}`)
		return
	case "zero":
		w.Header().Set("X-Consul-Index", "0")
	case "young":
		if strings.HasPrefix(r.URL.Path, "/v1/catalog/nodes") {
			w.Header().Set("X-Consul-Index", "1")
			_, _ = w.Write([]byte("[]"))
			return
		}
	case "lags":
		if r.URL.Query().Has("stale") && strings.HasPrefix(r.URL.Path, "/v1/health/service/") {
			w.Header().Set("X-Consul-Index", "2")
			_, _ = w.Write([]byte("[]"))
			return
		}
	}
	f.answer(w, r, `{"shop": []}`)
}

func (f *fake) answer(w http.ResponseWriter, r *http.Request, services string) {
	if w.Header().Get("X-Consul-Index") == "" {
		index := f.index.Load()
		if wait := r.URL.Query().Get("index"); wait == fmt.Sprint(index) {
			select { // nothing has changed
			case <-r.Context().Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			index = f.index.Load()
		}
		w.Header().Set("X-Consul-Index", fmt.Sprint(index))
	}
	switch {
	case strings.HasPrefix(r.URL.Path, "/v1/catalog/services"):
		_, _ = w.Write([]byte(services))
	case strings.HasPrefix(r.URL.Path, "/v1/health/service/"):
		_, _ = w.Write([]byte(`[{"Node": {"Node": "h1", "Address": "10.0.0.1"}, "Service": {"ID": "a", "Service": "shop", "Address": "10.0.0.1", "Port": 80, "Meta": {"roost-tenant": "acme"}}, "Checks": []}]`))
	case strings.HasPrefix(r.URL.Path, "/v1/catalog/nodes"):
		_, _ = w.Write([]byte(`[{"Node": "h1", "ID": "one", "CreateIndex": 3}]`))
	default:
		_, _ = w.Write([]byte(`[]`))
	}
}

// faulty is a Source at a fake.
type faulty struct {
	*fake
	t       *testing.T
	ctx     context.Context
	updates chan discovery.Update
}

func newFaulty(t *testing.T, mode string) *faulty {
	t.Helper()
	f := &faulty{fake: &fake{}, t: t, updates: make(chan discovery.Update, 10_000)}
	f.mode.Store(mode)
	f.index.Store(10)
	server := httptest.NewUnstartedServer(f)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Start()
	t.Cleanup(server.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	f.ctx = ctx
	s := newSource(t, Config{Address: server.URL})
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(u discovery.Update) { f.updates <- u }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return f
}

// next waits for an Update; none may be an absence.
func (f *faulty) next(what string, is func(discovery.Update) bool) {
	f.t.Helper()
	for {
		select {
		case u := <-f.updates:
			if u.Scope == "shop" && u.Err == nil && len(u.Instances) == 0 {
				f.t.Fatalf("%s: an absence: %+v", what, u)
			}
			if is(u) {
				return
			}
		case <-f.ctx.Done():
			f.t.Fatalf("%s: not seen", what)
		}
	}
}

// TestFaults: 500, junk, null, nothing at all and an index of 0 are errors or
// harmless, never an absence, and none makes the source ask without a pause.
func TestFaults(t *testing.T) {
	f := newFaulty(t, "")
	f.next("the first pass", func(u discovery.Update) bool { return u.Complete && len(u.Scopes) == 1 })
	for _, mode := range []string{"500", "junk", "null", "nothing"} {
		f.mode.Store(mode)
		f.index.Add(1)
		before := f.asked.Load()
		f.next(mode, func(u discovery.Update) bool { return u.Err != nil })
		f.next(mode+" again", func(u discovery.Update) bool { return u.Err != nil })
		if n := f.asked.Load() - before; n > 60 {
			t.Errorf("%s: asked %d times without a pause", mode, n)
		}
		f.mode.Store("")
		f.next("after "+mode, func(u discovery.Update) bool { return u.Scope == "shop" && len(u.Instances) == 1 })
	}
	f.index.Store(4)
	f.next("the index falls", func(u discovery.Update) bool { return u.Scope == "shop" && u.Index == 4 })
	f.mode.Store("zero")
	before := f.asked.Load()
	<-time.After(500 * time.Millisecond)
	if n := f.asked.Load() - before; n > 150 {
		t.Errorf("an index of 0: asked %d times in half a second", n)
	}
}

// TestYoung: a Consul that has no node yet is no other one once it has.
func TestYoung(t *testing.T) {
	f := newFaulty(t, "young")
	nameless := func(u discovery.Update) bool {
		if u.Err == nil && u.Identity != "h1/one/3" {
			t.Errorf("an update of %q: %+v", u.Identity, u)
		}
		return errors.Is(u.Err, errNoNode)
	}
	f.next("no node", nameless)
	f.mode.Store("")
	f.next("the first pass", func(u discovery.Update) bool { return u.Complete && u.Identity == "h1/one/3" })
}

// TestLags: what a server says that reads its log after a restart is no loss.
func TestLags(t *testing.T) {
	f := newFaulty(t, "")
	f.next("the first pass", func(u discovery.Update) bool { return u.Complete })
	f.mode.Store("500")
	f.index.Add(1)
	f.next("an error", func(u discovery.Update) bool { return u.Scope == "shop" && u.Err != nil })
	f.mode.Store("lags")
	f.next("after it", func(u discovery.Update) bool { return u.Scope == "shop" && u.Index == 11 })
}

// TestOneServiceFails: it does not hold up the others for ever.
func TestOneServiceFails(t *testing.T) {
	f := newFaulty(t, "sick")
	f.next("the first pass", func(u discovery.Update) bool { return u.Complete && slices.Equal(u.Scopes, []string{"shop", "sick"}) })
}

// TestChanges: what a sweep asks, by what carries another index than before.
func TestChanges(t *testing.T) {
	before := map[place]position{
		{"h1", ofNode, ""}: {"", 1}, {"h2", ofNode, ""}: {"", 1},
		{"h1", ofService, "a"}: {"shop", 5}, {"h2", ofService, "b"}: {"cart", 6},
		{"h1", ofCheck, "serf"}: {"", 2}, {"h1", ofCheck, "c"}: {"shop", 7},
	}
	for _, c := range []struct {
		name   string
		change func(now map[place]position)
		want   string
	}{
		{"nothing", func(map[place]position) {}, ""},
		{"a registration", func(now map[place]position) { now[place{"h2", ofService, "b"}] = position{"cart", 9} }, "cart"},
		{"an index that falls", func(now map[place]position) { now[place{"h2", ofService, "b"}] = position{"cart", 2} }, "cart"},
		{"a new one", func(now map[place]position) { now[place{"h2", ofService, "n"}] = position{"new", 9} }, "new"},
		{"one that has gone", func(now map[place]position) { delete(now, place{"h1", ofService, "a"}) }, "shop"},
		{"one under another name", func(now map[place]position) { now[place{"h1", ofService, "a"}] = position{"store", 9} }, "shop store"},
		{"a check", func(now map[place]position) { now[place{"h1", ofCheck, "c"}] = position{"shop", 9} }, "shop"},
		{"a check of a node", func(now map[place]position) { now[place{"h1", ofCheck, "serf"}] = position{"", 9} }, "shop"},
		{"a node", func(now map[place]position) { now[place{"h2", ofNode, ""}] = position{"", 9} }, "cart"},
	} {
		now := maps.Clone(before)
		c.change(now)
		if got := strings.Join(slices.Sorted(maps.Keys(changes(before, now))), " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestIncarnations: which Consul goes on from which.
func TestIncarnations(t *testing.T) {
	of := func(index uint64, nodes ...string) incarnation {
		i := incarnation{nodes: map[string]bool{}, index: index}
		for _, n := range nodes {
			i.nodes[n] = true
		}
		return i
	}
	hidden := func(i incarnation) incarnation { i.limited = true; return i }
	for _, c := range []struct {
		name          string
		before, after incarnation
		want          bool
	}{
		{"the same", of(5, "a"), of(5, "a"), true},
		{"a node has come", of(5, "a"), of(9, "a", "b"), true},
		{"the oldest node has gone", of(5, "a", "b"), of(9, "b"), true},
		{"wiped", of(50, "a"), of(9, "c"), false},
		{"another one", of(5, "a"), of(900, "c"), false},
		{"restored", of(50, "a"), of(9, "a"), false},
		{"a token that sees no nodes", hidden(of(5)), hidden(of(9)), true},
		{"one that no longer sees them", of(5, "a"), hidden(of(9)), true},
		{"one that sees them again", hidden(of(5)), of(9, "a"), true},
		{"one that sees another part", hidden(of(5, "a")), hidden(of(9, "b")), true},
		{"one that sees less of an older state", of(50, "a"), hidden(of(9)), false},
	} {
		if got := c.after.continues(c.before); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// TestLateAnswer: the answer to a query that was ended says nothing.
func TestLateAnswer(t *testing.T) {
	said := 0
	w := newWatcher(newSource(t, Config{}), func(u discovery.Update) {
		if u.Scope == "shop" {
			said++
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	sv := &service{name: "shop", wanted: true}
	w.services["shop"], w.unanswered = sv, 1
	if !w.answer(ctx, sv, w.s.begin(), []*api.ServiceEntry{entry("a", meta("acme"))}, &api.QueryMeta{LastIndex: 5}) || said != 1 {
		t.Errorf("said %d", said)
	}
	cancel()
	if w.answer(ctx, sv, w.s.begin(), nil, &api.QueryMeta{LastIndex: 4}) || said != 1 || sv.index != 5 {
		t.Errorf("said %d, index %d", said, sv.index)
	}
}
