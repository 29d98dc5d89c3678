package xds

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/xds/envoy"
)

// The names of these tests are threads of other projects, whose mistakes they are
// about.

// TestThreadControlPlane245: a cluster that changes takes its endpoints along,
// though they have not changed; go-control-plane #583 is the same with endpoints
// that are versioned apart, envoy #13009 says that Envoy does not ask for them.
func TestThreadControlPlane245(t *testing.T) {
	for name, text := range map[string]string{
		"245": `
		world cluster/a@1 endpoint/a@1
		sub cluster *
		> 1 cluster: a@1
		sub endpoint a
		> 2 endpoint: a@1
		ack 2
		ack 1
		world cluster/a@2
		> 3 cluster: a@2
		> 4 endpoint: a@1
		ack 4
		ack 3`,
		"583, after a reconnect with all there is": `
		world cluster/a@1 endpoint/a@1
		resume cluster a=1 +*
		resume endpoint a=1
		world cluster/a@2
		> 1 cluster: a@2
		> 2 endpoint: a@1`,
		"13009, the client asks for nothing and two changes come at once": `
		world cluster/a@1 cluster/b@1 endpoint/a@1 endpoint/b@1
		sub cluster *
		> 1 cluster: a@1 b@1
		sub endpoint a b
		> 2 endpoint: a@1 b@1
		ack 2
		ack 1
		world cluster/a@2 cluster/b@2
		> 3 cluster: a@2 b@2
		> 4 endpoint: a@1 b@1`,
	} {
		t.Run(name, func(t *testing.T) {
			x := &script{t: t, sent: map[string]*response{}}
			x.run(text)
		})
	}
}

// TestThreadKuma12098: endpoints that are on their way, or have just been ACKed,
// when their cluster changes are sent once more after it: their version alone would
// say that the client has them.
func TestThreadKuma12098(t *testing.T) {
	x := &script{t: t, sent: map[string]*response{}}
	x.run(`
		world cluster/a@1 endpoint/a@1
		sub cluster *
		> 1 cluster: a@1
		ack 1
		sub endpoint a
		> 2 endpoint: a@1
		world cluster/a@2
		> 3 cluster: a@2
		ack 2
		> 4 endpoint: a@1
		ack 4
		ack 3
		world cluster/a@3
		> 5 cluster: a@3
		> 6 endpoint: a@1`)
}

// TestThreadContour6743: a control plane that has restarted does not take a proxy
// for current because it counts its versions anew: they say what is in them.
func TestThreadContour6743(t *testing.T) {
	h := start(t, Config{})
	w := realWorld{h}
	changed := map[envoy.Name]*envoy.Resource{}
	w.endpoint(changed, "a", 80)
	w.publish(changed)
	c := h.dial(testID)
	c.subscribe(envoy.Endpoint, "a")
	first, err := c.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	again := start(t, Config{})
	w = realWorld{again}
	changed = map[envoy.Name]*envoy.Resource{}
	w.endpoint(changed, "a", 81) // also its World number 1
	w.publish(changed)
	c = again.dial(testID)
	c.send(envoy.Endpoint, &discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"a"}, InitialResourceVersions: map[string]string{"a": first.GetResources()[0].GetVersion()}})
	second, err := c.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if was, is := first.GetResources()[0].GetVersion(), second.GetResources()[0].GetVersion(); was == is {
		t.Errorf("two contents have version %s", was)
	}
}

// TestEnvoyWalk takes a real Envoy through random changes. Whatever comes, each is
// settled soon, an address that nothing changes answers all the time, and in the
// end the Envoy has what the Server says it has, and has refused nothing.
// ROOST_XDS_SEED repeats a walk.
func TestEnvoyWalk(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("ROOST_XDS_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("ROOST_XDS_SEED=%d", seed)
	walk := &envoyWalk{realWorld: realWorld{start(t, Config{})}, random: rand.New(rand.NewPCG(seed, 0)), ports: map[string]int{}}
	for _, said := range []string{"one", "two"} {
		walk.backends = append(walk.backends, backend(t, said))
	}
	for i := range 4 {
		p, release := heldPort(t)
		release()
		walk.ports[fmt.Sprintf("s%d", i)] = p
	}
	anchor, release := heldPort(t)
	release()
	walk.shop(anchor, walk.backends[0])
	e := binaries.StartEnvoy(t, fmt.Appendf(nil, bootstrap, testID, "DELTA_GRPC", port(t, walk.address)))
	t.Cleanup(e.Stop)
	at := fmt.Sprintf("http://127.0.0.1:%d/", anchor)
	says(walk.ctx, t, at, "one")
	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		failed <- asked(at, stop)
	}()
	for range 300 {
		walk.step()
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("the address that nothing changes: %v", err)
	}
	walk.judge(e.Admin)
}

// asked asks an address all the time and returns the first failure.
func asked(url string, stop <-chan struct{}) error {
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		res, err := client.Get(url)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || string(body) != "one" {
			return fmt.Errorf("%s %q %w", res.Status, body, err)
		}
	}
}

// envoyWalk changes a few services at random.
type envoyWalk struct {
	realWorld
	random   *rand.Rand
	ports    map[string]int
	backends []int
	timeouts int
}

func (w *envoyWalk) step() {
	w.t.Helper()
	changed := map[envoy.Name]*envoy.Resource{}
	var what []string
	for range 1 + w.random.IntN(3) {
		s, other := fmt.Sprintf("s%d", w.random.IntN(4)), fmt.Sprintf("s%d", w.random.IntN(4))
		there := func(s string) bool {
			n := envoy.Name{Type: envoy.Cluster, Name: s}
			if r, ok := changed[n]; ok {
				return r != nil
			}
			return w.world.Get(n) != nil
		}
		routed := func(s string) bool { // from another service
			for n, r := range w.world.resources {
				if now, ok := changed[n]; ok {
					r = now
				}
				if n.Type == envoy.Route && n.Name != s && r != nil && r.Refs[0].Name == s {
					return true
				}
			}
			for n, r := range changed {
				if n.Type == envoy.Route && n.Name != s && r != nil && r.Refs[0].Name == s {
					return true
				}
			}
			return false
		}
		switch k := w.random.IntN(5); {
		case !there(s):
			what = append(what, s+" comes")
			w.cluster(changed, s, time.Second)
			w.endpoint(changed, s, w.backends[w.random.IntN(2)])
			w.route(changed, s, s)
			w.listener(changed, s, w.ports[s], s)
		case k == 0 && !routed(s):
			what = append(what, s+" goes")
			for _, typ := range []envoy.Type{envoy.Cluster, envoy.Endpoint, envoy.Route, envoy.Listener} {
				changed[envoy.Name{Type: typ, Name: s}] = nil
			}
		case k == 1:
			what = append(what, s+"'s cluster changes")
			w.timeouts++
			w.cluster(changed, s, time.Second+time.Duration(w.timeouts)*time.Millisecond)
		case k == 2 && there(other):
			what = append(what, s+" is routed to "+other)
			w.route(changed, s, other)
		default:
			what = append(what, s+" moves")
			w.endpoint(changed, s, w.backends[w.random.IntN(2)])
		}
	}
	w.within(strings.Join(what, ", "), changed)
}

// judge asks the Envoy what it has and what it has refused.
func (w *envoyWalk) judge(admin string) {
	w.t.Helper()
	get := func(path string) []byte {
		res, err := http.Get("http://" + admin + path)
		if err != nil {
			w.t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			w.t.Fatal(err)
		}
		return body
	}
	for line := range strings.Lines(string(get("/stats?filter=update_rejected"))) {
		if name, n, _ := strings.Cut(strings.TrimSpace(line), ": "); n != "0" {
			w.t.Errorf("%s is %s", name, n)
		}
	}
	var dump struct {
		Configs []struct {
			Clusters []struct {
				Cluster struct{ Name string }
			} `json:"dynamic_active_clusters"`
			Listeners []struct {
				Name   string
				Active *struct{} `json:"active_state"`
			} `json:"dynamic_listeners"`
			Routes []struct {
				Route struct{ Name string } `json:"route_config"`
			} `json:"dynamic_route_configs"`
		}
	}
	if err := json.Unmarshal(get("/config_dump"), &dump); err != nil {
		w.t.Fatal(err)
	}
	got := map[envoy.Type]map[string]bool{envoy.Cluster: {}, envoy.Listener: {}, envoy.Route: {}}
	for _, c := range dump.Configs {
		for _, x := range c.Clusters {
			got[envoy.Cluster][x.Cluster.Name] = true
		}
		for _, x := range c.Listeners {
			if x.Active != nil { // others drain
				got[envoy.Listener][x.Name] = true
			}
		}
		for _, x := range c.Routes {
			got[envoy.Route][x.Route.Name] = true
		}
	}
	for typ := range got {
		want := map[string]bool{}
		held, _ := w.s.Holding(testID, typ)
		for _, h := range held {
			want[h.Name] = true
			if h.Acked != h.Intended {
				w.t.Errorf("%s %s is %s and should be %s", typ, h.Name, h.Acked, h.Intended)
			}
		}
		if typ == envoy.Route { // listeners that drain keep theirs
			maps.DeleteFunc(got[typ], func(name string, _ bool) bool { return !want[name] })
		}
		if diff := cmp.Diff(want, got[typ]); diff != "" {
			w.t.Errorf("%s: the Server says (-), the Envoy has (+): %s", typ, diff)
		}
	}
}
