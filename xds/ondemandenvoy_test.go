package xds

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	ondemandv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/on_demand/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// onDemandTimeout is how long Envoy holds what it has no answer for: long
	// enough to be told from an answer.
	onDemandTimeout = 20 * time.Second
	atOnce          = time.Second
	byHeader        = "x-cluster"
	noUpstream      = "503 no healthy upstream"
)

func packed(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	out, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// listen adds a listener of one filter on a free port and returns the address.
func (w realWorld) listen(changed map[envoy.Name]*envoy.Resource, name string, filter proto.Message, refs ...envoy.Name) string {
	w.t.Helper()
	port, release := heldPort(w.t)
	release()
	w.set(changed, envoy.Listener, name, &listenerv3.Listener{Name: name, Address: socket(port), FilterChains: []*listenerv3.FilterChain{{
		Filters: []*listenerv3.Filter{{Name: "filter", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed(w.t, filter)}}},
	}}}, refs...)
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// http is a connection manager that asks for clusters, and virtual hosts, on demand.
func (w realWorld) http(route string, from *corev3.ConfigSource) *hcmv3.HttpConnectionManager {
	demand := &ondemandv3.OnDemand{Odcds: &ondemandv3.OnDemandCds{Source: ads(), Timeout: durationpb.New(onDemandTimeout)}}
	return &hcmv3.HttpConnectionManager{
		StatPrefix: "web", RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: from, RouteConfigName: route}},
		HttpFilters: []*hcmv3.HttpFilter{
			{Name: "envoy.filters.http.on_demand", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(w.t, demand)}},
			{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(w.t, &routerv3.Router{})}},
		},
	}
}

// hosts sets a route configuration in which hosts lead to clusters: HOST=CLUSTER.
// Without a cluster the header of a request names it.
func (w realWorld) hosts(changed map[envoy.Name]*envoy.Resource, name string, hosts ...string) {
	config := &routev3.RouteConfiguration{Name: name}
	var refs []envoy.Name
	for _, h := range hosts {
		domain, cluster, _ := strings.Cut(h, "=")
		action := &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}}
		if cluster == "" {
			action.ClusterSpecifier = &routev3.RouteAction_ClusterHeader{ClusterHeader: byHeader}
		} else {
			refs = append(refs, envoy.Name{Type: envoy.Cluster, Name: cluster})
		}
		config.VirtualHosts = append(config.VirtualHosts, &routev3.VirtualHost{Name: domain, Domains: []string{domain}, Routes: []*routev3.Route{{
			Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}, Action: &routev3.Route_Route{Route: action},
		}}})
	}
	w.set(changed, envoy.Route, name, config, refs...)
}

// service publishes a cluster with a backend, or with port 0 takes it away.
func (w realWorld) service(name string, port int) {
	changed := map[envoy.Name]*envoy.Resource{}
	for _, t := range []envoy.Type{envoy.Cluster, envoy.Endpoint} {
		changed[envoy.Name{Type: t, Name: name}] = nil
	}
	if port > 0 {
		w.cluster(changed, name, time.Second)
		w.endpoint(changed, name, port)
	}
	w.publish(changed)
}

// ask makes one request: "STATUS BODY", or the error.
func (w realWorld) ask(at, host, cluster string) string {
	req, err := http.NewRequestWithContext(w.ctx, http.MethodGet, "http://"+at+"/", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Host = host
	req.Header.Set(byHeader, cluster)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: onDemandTimeout / 2}
	res, err := client.Do(req)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = res.Body.Close() }()
	b, _ := io.ReadAll(res.Body)
	return strings.TrimSpace(fmt.Sprintf("%d %s", res.StatusCode, b))
}

// answers wants one request to be answered at once.
func (w realWorld) answers(at, host, cluster, want string) {
	w.t.Helper()
	began := time.Now()
	got := w.ask(at, host, cluster)
	d := time.Since(began)
	w.t.Logf("host %q, cluster %q: %s after %v", host, cluster, got, d)
	if got != want || d > atOnce {
		w.t.Fatalf("host %q, cluster %q: %s after %v, want %s at once", host, cluster, got, d, want)
	}
}

// becomes asks until the answer is want, which is soon.
func (w realWorld) becomes(ask func() string, want string, soon time.Duration) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for {
		got := ask()
		d := time.Since(began)
		if got == want {
			w.t.Logf("%s after %v", got, d)
		}
		if d > soon {
			w.t.Fatalf("%s after %v, want %s within %v", got, d, want, soon)
		}
		if got == want {
			return
		}
		<-tick.C
	}
}

// envoyOf starts an Envoy with the wildcard of clusters, or one that has only those
// which it asks for on demand.
func (w realWorld) envoyOf(all bool) {
	text := fmt.Sprintf(bootstrap, testID, "DELTA_GRPC", port(w.t, w.address))
	if !all {
		text = strings.Replace(text, `"cds_config": {"ads": {}, "resource_api_version": "V3"},`, "", 1)
	}
	w.t.Cleanup(binaries.StartEnvoy(w.t, []byte(text)).Stop)
}

func eachWildcard(t *testing.T, test func(w realWorld, all bool)) {
	for _, all := range []bool{true, false} {
		t.Run(fmt.Sprintf("wildcard %v", all), func(t *testing.T) { test(realWorld{start(t, Config{})}, all) })
	}
}

// TestEnvoyClustersOnDemand: a request to a cluster that does not exist fails at
// once, each time; the cluster is served when it comes and comes back, though
// Envoy asks for it only once.
func TestEnvoyClustersOnDemand(t *testing.T) {
	eachWildcard(t, func(w realWorld, all bool) {
		one, two := backend(w.t, "one"), backend(w.t, "two")
		changed := map[envoy.Name]*envoy.Resource{}
		w.hosts(changed, "main", "*")
		at := w.listen(changed, "web", w.http("main", ads()), envoy.Name{Type: envoy.Route, Name: "main"})
		w.publish(changed)
		w.service("known", one)
		w.envoyOf(all)
		w.becomes(func() string { return w.ask(at, "a", "known") }, "200 one", 10*time.Second)
		for range 2 {
			w.answers(at, "a", "ghost", noUpstream)
		}
		ghost := func() string { return w.ask(at, "a", "ghost") }
		for range 2 {
			w.service("ghost", two)
			w.becomes(ghost, "200 two", atOnce)
			w.service("ghost", 0)
			w.becomes(ghost, noUpstream, atOnce)
		}
		w.answers(at, "a", "known", "200 one")
		w.settled()
	})
}

// settled wants the Envoy to have taken everything.
func (w realWorld) settled() {
	w.t.Helper()
	w.acked(w.world.version)
	if ps := w.s.Problems(); len(ps) > 0 {
		w.t.Errorf("problems %+v", ps)
	}
}

// TestEnvoyTCPOnDemand is the same for connections.
func TestEnvoyTCPOnDemand(t *testing.T) {
	eachWildcard(t, func(w realWorld, all bool) {
		proxy := func(cluster string) *tcpv3.TcpProxy {
			return &tcpv3.TcpProxy{StatPrefix: cluster, ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: cluster},
				OnDemand: &tcpv3.TcpProxy_OnDemand{OdcdsConfig: ads(), Timeout: durationpb.New(onDemandTimeout)}}
		}
		changed := map[envoy.Name]*envoy.Resource{}
		known := w.listen(changed, "known", proxy("known"))
		ghost := w.listen(changed, "ghost", proxy("ghost"))
		w.publish(changed)
		w.service("known", backend(w.t, "one"))
		w.envoyOf(all)
		w.becomes(func() string { return w.ask(known, "a", "") }, "200 one", 10*time.Second)
		for range 2 {
			w.closes(ghost)
		}
		w.service("ghost", backend(w.t, "two"))
		w.becomes(func() string { return w.ask(ghost, "a", "") }, "200 two", atOnce)
		w.settled()
	})
}

// closes wants a connection to be closed at once.
func (w realWorld) closes(at string) {
	w.t.Helper()
	c, err := net.Dial("tcp", at)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadDeadline(time.Now().Add(atOnce))
	if _, err = c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.Fatalf("the connection is not closed: %v", err)
	}
}

// TestEnvoyHostsOnDemand: an Envoy with a route configuration of its own asks for
// its virtual hosts one by one. One that does not exist is a 404 at once, until it
// exists.
func TestEnvoyHostsOnDemand(t *testing.T) {
	w := realWorld{start(t, Config{})}
	file := filepath.Join(t.TempDir(), "rds.json")
	if err := os.WriteFile(file, []byte(`{"version_info": "1", "resources": [{"@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
		"name": "main", "vhds": {"config_source": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0.05s"}}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	from := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{Path: file}}}
	changed := map[envoy.Name]*envoy.Resource{}
	w.hosts(changed, "main", "known.example=known", "*.wild.example=known")
	at := w.listen(changed, "web", w.http("main", from))
	w.publish(changed)
	w.service("known", backend(t, "one"))
	w.envoyOf(true)
	w.becomes(func() string { return w.ask(at, "known.example", "") }, "200 one", 10*time.Second)
	w.answers(at, "a.wild.example", "", "200 one")
	w.answers(at, "b.wild.example:8080", "", "200 one")
	for range 2 {
		w.answers(at, "ghost.example", "", "404")
	}
	ghost := func() string { return w.ask(at, "ghost.example", "") }
	changed = map[envoy.Name]*envoy.Resource{}
	w.hosts(changed, "main", "known.example=known", "ghost.example=new")
	w.cluster(changed, "new", time.Second)
	w.endpoint(changed, "new", backend(t, "two"))
	w.publish(changed)
	w.becomes(ghost, "200 two", atOnce)
	w.answers(at, "a.wild.example", "", "404")
	w.publish(map[envoy.Name]*envoy.Resource{{Type: envoy.Route, Name: "main"}: nil})
	w.becomes(ghost, "404", atOnce)
	w.answers(at, "known.example", "", "404")
	w.settled()
}

// TestEnvoyResumesOnDemand gives an Envoy that has asked for clusters on demand to a
// Server that knows nothing of it: it goes on with them, and what came meanwhile
// is served.
func TestEnvoyResumesOnDemand(t *testing.T) {
	eachWildcard(t, func(w realWorld, all bool) {
		one, two := backend(w.t, "one"), backend(w.t, "two")
		changed := map[envoy.Name]*envoy.Resource{}
		w.hosts(changed, "main", "*")
		at := w.listen(changed, "web", w.http("main", ads()), envoy.Name{Type: envoy.Route, Name: "main"})
		w.publish(changed)
		w.service("known", one)
		w.envoyOf(all)
		w.becomes(func() string { return w.ask(at, "a", "known") }, "200 one", 10*time.Second)
		w.answers(at, "a", "ghost", noUpstream)
		w.answers(at, "a", "other", noUpstream)
		w.settled()
		w.stop()
		again, err := net.Listen("tcp", w.address)
		if err != nil {
			w.t.Fatal(err)
		}
		next := realWorld{start(w.t, Config{}, Listener{Listener: again})}
		next.world = w.world
		next.service("ghost", two)
		next.becomes(func() string { return next.ask(at, "a", "ghost") }, "200 two", 5*time.Second)
		next.answers(at, "a", "known", "200 one")
		next.answers(at, "a", "other", noUpstream)
		next.settled()
	})
}
