package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
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
	} {
		list, problems := s.instances([]*api.ServiceEntry{c.e})
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
		if diff := cmp.Diff(c.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", c.name, diff)
		}
	}
	if list, _ := newSource(t, Config{DefaultTenant: "acme"}).instances([]*api.ServiceEntry{entry("a", nil)}); len(list) != 1 || list[0].Key.Tenant != "acme" {
		t.Errorf("with a default tenant: %+v", list)
	}
}

// fake answers like a Consul in faults that a real one cannot be brought to.
type fake struct {
	mode  atomic.Value // "", 500, junk, zero
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
	case "zero":
		w.Header().Set("X-Consul-Index", "0")
	default:
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
		_, _ = w.Write([]byte(`{"shop": []}`))
	case strings.HasPrefix(r.URL.Path, "/v1/health/service/"):
		_, _ = w.Write([]byte(`[{"Node": {"Node": "h1", "Address": "10.0.0.1"}, "Service": {"ID": "a", "Service": "shop", "Address": "10.0.0.1", "Port": 80, "Meta": {"roost-tenant": "acme"}}, "Checks": []}]`))
	case strings.HasPrefix(r.URL.Path, "/v1/catalog/nodes"):
		_, _ = w.Write([]byte(`[{"Node": "h1", "ID": "one", "CreateIndex": 3}]`))
	default:
		_, _ = w.Write([]byte(`[]`))
	}
}

// TestFaults: 500, junk, nothing at all and an index of 0 are errors or harmless,
// never an absence, and none makes the source ask without a pause.
func TestFaults(t *testing.T) {
	f := &fake{}
	f.mode.Store("")
	f.index.Store(10)
	server := httptest.NewServer(f)
	defer server.Close()
	updates := make(chan discovery.Update, 10_000)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	s := newSource(t, Config{Address: server.URL})
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(u discovery.Update) { updates <- u }) }()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	next := func(what string, is func(discovery.Update) bool) {
		t.Helper()
		for {
			select {
			case u := <-updates:
				if u.Scope == "shop" && u.Err == nil && len(u.Instances) == 0 {
					t.Fatalf("%s: an absence: %+v", what, u)
				}
				if is(u) {
					return
				}
			case <-ctx.Done():
				t.Fatalf("%s: not seen", what)
			}
		}
	}
	next("the first pass", func(u discovery.Update) bool { return u.Complete && len(u.Scopes) == 1 })
	for _, mode := range []string{"500", "junk"} {
		f.mode.Store(mode)
		f.index.Add(1)
		before := f.asked.Load()
		next(mode, func(u discovery.Update) bool { return u.Err != nil })
		next(mode+" again", func(u discovery.Update) bool { return u.Err != nil })
		if n := f.asked.Load() - before; n > 60 {
			t.Errorf("%s: asked %d times without a pause", mode, n)
		}
		f.mode.Store("")
		next("after "+mode, func(u discovery.Update) bool { return u.Scope == "shop" && len(u.Instances) == 1 })
	}
	f.index.Store(4)
	next("the index falls", func(u discovery.Update) bool { return u.Scope == "shop" && u.Index == 4 })
	f.mode.Store("zero")
	before := f.asked.Load()
	<-time.After(500 * time.Millisecond)
	if n := f.asked.Load() - before; n > 150 {
		t.Errorf("an index of 0: asked %d times in half a second", n)
	}
}
