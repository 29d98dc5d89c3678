package xds

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/xds/envoy"
)

const bootstrap = `{
  "node": {"id": %q, "cluster": "shop.acme", "metadata": {"roost_admin": "here", "n": 1}},
  "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
  "dynamic_resources": {
    "ads_config": {"api_type": %q, "transport_api_version": "V3", "set_node_on_first_message_only": true,
      "grpc_services": [{"envoy_grpc": {"cluster_name": "xds", "retry_policy": {"retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}}}}]},
    "cds_config": {"ads": {}, "resource_api_version": "V3"},
    "lds_config": {"ads": {}, "resource_api_version": "V3"}
  },
  "static_resources": {"clusters": [{"name": "xds", "type": "STATIC", "connect_timeout": "1s",
    "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
      "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}},
    "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": %d}}}}]}]}}]}
}`

// realWorld makes Worlds of real resources.
type realWorld struct {
	*harness
}

// set encodes a resource and its references.
func (w realWorld) set(changed map[envoy.Name]*envoy.Resource, typ envoy.Type, name string, m proto.Message, refs ...envoy.Name) {
	w.t.Helper()
	inner, err := anypb.New(m)
	if err != nil {
		w.t.Fatal(err)
	}
	version := fmt.Sprintf("%x", fnv32(inner.GetValue()))
	body, err := proto.Marshal(&discovery.Resource{Name: name, Version: version, Resource: inner})
	if err != nil {
		w.t.Fatal(err)
	}
	n := envoy.Name{Type: typ, Name: name}
	changed[n] = &envoy.Resource{Name: n, Version: version, Body: body, Refs: refs}
}

func (w realWorld) publish(changed map[envoy.Name]*envoy.Resource) uint64 {
	next, c := w.world.with(changed)
	w.world = next
	w.s.Publish(next, c)
	return next.version
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
}

func socket(port int) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}

func (w realWorld) cluster(changed map[envoy.Name]*envoy.Resource, name string, timeout time.Duration) {
	w.set(changed, envoy.Cluster, name, &clusterv3.Cluster{
		Name: name, ConnectTimeout: durationpb.New(timeout), ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
	}, envoy.Name{Type: envoy.Endpoint, Name: name})
}

func (w realWorld) endpoint(changed map[envoy.Name]*envoy.Resource, name string, port int) {
	w.set(changed, envoy.Endpoint, name, &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
		LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socket(port)}}}},
	}}})
}

func (w realWorld) route(changed map[envoy.Name]*envoy.Resource, name, cluster string) {
	w.set(changed, envoy.Route, name, &routev3.RouteConfiguration{Name: name, VirtualHosts: []*routev3.VirtualHost{{
		Name: "all", Domains: []string{"*"}, Routes: []*routev3.Route{{
			Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}}},
		}},
	}}}, envoy.Name{Type: envoy.Cluster, Name: cluster})
}

func (w realWorld) listener(changed map[envoy.Name]*envoy.Resource, name string, port int, route string) {
	router, _ := anypb.New(&routerv3.Router{})
	hcm, _ := anypb.New(&hcmv3.HttpConnectionManager{
		StatPrefix:     name,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: ads(), RouteConfigName: route}},
		HttpFilters:    []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: router}}},
	})
	w.set(changed, envoy.Listener, name, &listenerv3.Listener{Name: name, Address: socket(port), FilterChains: []*listenerv3.FilterChain{{
		Filters: []*listenerv3.Filter{{Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: hcm}}},
	}}}, envoy.Name{Type: envoy.Route, Name: route})
}

func backend(t *testing.T, says string) int {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, says) }))
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).Port
}

// heldPort is a port that somebody listens on until release.
func heldPort(t *testing.T) (port int, release func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().(*net.TCPAddr).Port, func() { _ = l.Close() }
}

// says asks until the answer is want.
func says(ctx context.Context, t *testing.T, url, want string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for got := ""; ; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if res, err := client.Do(req); err == nil {
			b, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if got = strings.TrimSpace(string(b)); got == want {
				return
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s says %q, want %q", url, got, want)
		}
	}
}

// within publishes and wants everything settled soon: a cluster that waits for
// its endpoints would take 15 s.
func (w realWorld) within(what string, changed map[envoy.Name]*envoy.Resource) {
	w.t.Helper()
	began := time.Now()
	w.acked(w.publish(changed))
	d := time.Since(began)
	w.t.Logf("%s: ACKed after %v", what, d)
	if d > 5*time.Second {
		w.t.Errorf("%s: ACKed after %v", what, d)
	}
}

// shop publishes one service with all that it needs.
func (w realWorld) shop(port, backend int) {
	w.t.Helper()
	changed := map[envoy.Name]*envoy.Resource{}
	w.cluster(changed, "shop.acme:http", time.Second)
	w.endpoint(changed, "shop.acme:http", backend)
	w.route(changed, "shop.acme:80", "shop.acme:http")
	w.listener(changed, "shop.acme:80", port, "shop.acme:80")
	w.publish(changed)
}

// TestEnvoy has the real Envoy judge the order of things: it becomes ready,
// follows endpoints, clusters and routes at once, and refuses a listener whose
// port is taken, until it is free.
func TestEnvoy(t *testing.T) { eachForm(t, judgedByEnvoy) }

// eachForm runs a test with an Envoy that speaks delta, and with one that speaks
// the state of the world.
func eachForm(t *testing.T, test func(t *testing.T, api string)) {
	for _, api := range []string{"DELTA_GRPC", "GRPC"} {
		t.Run(api, func(t *testing.T) { test(t, api) })
	}
}

func judgedByEnvoy(t *testing.T, api string) {
	h := start(t, Config{RetryEvery: 50 * time.Millisecond})
	w := realWorld{h}
	one, two := backend(t, "one"), backend(t, "two")
	good, release := heldPort(t)
	release()
	w.shop(good, one)
	e := binaries.StartEnvoy(t, fmt.Appendf(nil, bootstrap, testID, api, port(t, h.address)))
	t.Cleanup(e.Stop)
	says(h.ctx, t, "http://"+e.Admin+"/ready", "LIVE")
	at := fmt.Sprintf("http://127.0.0.1:%d/", good)
	says(h.ctx, t, at, "one")

	changed := map[envoy.Name]*envoy.Resource{}
	w.endpoint(changed, "shop.acme:http", two)
	w.within("an endpoint that moves", changed)
	says(h.ctx, t, at, "two")

	changed = map[envoy.Name]*envoy.Resource{}
	w.cluster(changed, "shop.acme:http", 2*time.Second)
	w.within("a cluster that changes, its endpoints do not", changed)

	changed = map[envoy.Name]*envoy.Resource{}
	w.cluster(changed, "api.acme:http", time.Second)
	w.endpoint(changed, "api.acme:http", one)
	w.route(changed, "shop.acme:80", "api.acme:http")
	for _, gone := range []envoy.Type{envoy.Cluster, envoy.Endpoint} {
		changed[envoy.Name{Type: gone, Name: "shop.acme:http"}] = nil
	}
	w.within("a route to a new cluster, the old one goes", changed)
	says(h.ctx, t, at, "one")
	w.takenPort(at, two)
}

// takenPort adds a listener whose port is taken, beside an endpoint that moves.
func (w realWorld) takenPort(at string, two int) {
	t := w.t
	taken, free := heldPort(t)
	changed := map[envoy.Name]*envoy.Resource{}
	w.listener(changed, "taken", taken, "shop.acme:80")
	w.endpoint(changed, "api.acme:http", two)
	w.within("a listener whose port is taken", changed)
	says(w.ctx, t, at, "two")
	ps := w.s.Problems()
	if len(ps) != 1 || ps[0].Code != CodeInUse || ps[0].Place != "listener taken" || !strings.Contains(ps[0].Message, fmt.Sprintf("callers of 127.0.0.1:%d", taken)) {
		t.Errorf("problems %+v", ps)
	}
	p, _ := w.s.Proxy(testID)
	if !strings.HasPrefix(p.EnvoyVersion, "1.") || p.Metadata["roost_admin"] != "here" || p.Types[envoy.Listener] != (TypeStatus{2, 1, 1, p.Types[envoy.Listener].LastError}) {
		t.Errorf("status %+v", p)
	}
	free()
	says(w.ctx, t, fmt.Sprintf("http://127.0.0.1:%d/", taken), "two") // the same bytes, tried again
}

// TestEnvoyResumes gives a running Envoy to a Server that knows nothing of it
// and has a World in which everything but the listener differs.
func TestEnvoyResumes(t *testing.T) { eachForm(t, resumedByEnvoy) }

func resumedByEnvoy(t *testing.T, api string) {
	h := start(t, Config{})
	w := realWorld{h}
	one, two := backend(t, "one"), backend(t, "two")
	good, release := heldPort(t)
	release()
	w.shop(good, one)
	e := binaries.StartEnvoy(t, fmt.Appendf(nil, bootstrap, testID, api, port(t, h.address)))
	t.Cleanup(e.Stop)
	at := fmt.Sprintf("http://127.0.0.1:%d/", good)
	says(h.ctx, t, at, "one")
	h.stop()
	again, err := net.Listen("tcp", h.address)
	if err != nil {
		t.Fatal(err)
	}
	h2 := start(t, Config{}, Listener{Listener: again})
	w = realWorld{h2}
	says(h2.ctx, t, at, "one")
	changed := map[envoy.Name]*envoy.Resource{}
	w.cluster(changed, "shop.acme:http", 3*time.Second)
	w.endpoint(changed, "shop.acme:http", one)
	w.cluster(changed, "api.acme:http", time.Second)
	w.endpoint(changed, "api.acme:http", two)
	w.route(changed, "shop.acme:80", "api.acme:http")
	w.listener(changed, "shop.acme:80", good, "shop.acme:80")
	began := time.Now()
	w.publish(changed)
	says(h2.ctx, t, at, "two")
	h2.event("connect " + testID)
	changed = map[envoy.Name]*envoy.Resource{}
	w.endpoint(changed, "shop.acme:http", two)
	w.within("an endpoint that moves", changed)
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("settled after %v", d)
	}
	for typ, n := range map[envoy.Type]int{envoy.Cluster: 2, envoy.Endpoint: 2, envoy.Listener: 1, envoy.Route: 1} {
		if p, _ := h2.s.Proxy(testID); p.Types[typ] != (TypeStatus{Sent: n, Acked: n}) {
			t.Errorf("%s: %+v, want %d", typ, p.Types[typ], n)
		}
	}
}

func port(t *testing.T, address string) int {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return a.Port
}

func fnv32(b []byte) uint32 {
	h := fnv.New32a()
	_, _ = h.Write(b)
	return h.Sum32()
}
