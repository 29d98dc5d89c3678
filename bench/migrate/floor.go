package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservicev3 "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	cachetypes "github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"github.com/hashicorp/consul/api"
	"google.golang.org/grpc"
)

const floorCluster = "floor"

// startFloor starts the peer: one blocking query, one LinearCache, one Envoy
// with a listener and a cluster of its own.
func (b *bench) startFloor(ctx context.Context, envoy string) error {
	cache := cachev3.NewLinearCache(resourcev3.EndpointType)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	s := serverv3.NewServer(ctx, cache, nil)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, s)
	endpointservicev3.RegisterEndpointDiscoveryServiceServer(server, s)
	go func() { _ = server.Serve(l) }() // ends with Stop
	watching, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.watchFloor(watching, cache)
	}()
	b.floorStop = func() { cancel(); <-done; server.Stop() }
	p, err := freePorts(2)
	if err != nil {
		return err
	}
	b.floorAddress = portText(p[0])
	file := filepath.Join(b.dir, "floor.json")
	if err := os.WriteFile(file, fmt.Appendf(nil, floorBootstrap, p[1], p[0], l.Addr().(*net.TCPAddr).Port), 0o600); err != nil {
		return err
	}
	_, err = b.start("floor", envoy, "-c", file, "--disable-hot-restart", "-l", "warning")
	return err
}

func (b *bench) watchFloor(ctx context.Context, cache *cachev3.LinearCache) {
	var index uint64
	for ctx.Err() == nil {
		o := (&api.QueryOptions{WaitIndex: index, AllowStale: true}).WithContext(ctx)
		entries, meta, err := b.client.Health().Service(floorCluster, "", false, o)
		if err != nil {
			pause(ctx, 100*time.Millisecond)
			continue
		}
		index = meta.LastIndex
		group := &endpointv3.LocalityLbEndpoints{}
		for _, e := range entries {
			group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: e.Service.Address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(e.Service.Port)}}}},
			}}})
		}
		var resource cachetypes.Resource = &endpointv3.ClusterLoadAssignment{ClusterName: floorCluster, Endpoints: []*endpointv3.LocalityLbEndpoints{group}}
		_ = cache.UpdateResource(floorCluster, resource) // only fails for a nil resource
	}
}

const floorBootstrap = `{
  "node": {"id": "floor", "cluster": "floor"},
  "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": %d}}},
  "dynamic_resources": {"ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]}},
  "static_resources": {
    "listeners": [{"name": "floor", "address": {"socket_address": {"address": "127.0.0.1", "port_value": %d}}, "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
      "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "floor",
      "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "floor"}}]}]},
      "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}],
    "clusters": [
      {"name": "floor", "type": "EDS", "connect_timeout": "2s", "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}}},
      {"name": "xds", "type": "STATIC", "connect_timeout": "1s",
       "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}},
       "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": %d}}}}]}]}}
    ]}
}`
