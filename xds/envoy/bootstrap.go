package envoy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	metricsv3 "github.com/envoyproxy/go-control-plane/envoy/config/metrics/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	connectionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/roostmesh/roost/lb"
)

// Metadata that a bootstrap carries to the control plane.
const (
	MetadataAdmin  = "roost_admin"   // where Envoy's admin interface is: unix:PATH or IP:PORT
	MetadataFDs    = "roost_fds"     // file descriptors that this Envoy may open
	MetadataWorker = "roost_workers" // its concurrency
	MetadataLoad   = "roost_load"    // "true": it reports its load where it is asked to
)

const (
	xdsCluster         = "roost_xds"
	xdsConnectTimeout  = time.Second
	reconnectBase      = 100 * time.Millisecond
	reconnectMax       = 500 * time.Millisecond
	keepaliveInterval  = 15 * time.Second
	keepaliveTimeout   = 5 * time.Second
	maxDownstream      = 100_000
	connectionsMonitor = "envoy.resource_monitors.global_downstream_max_connections"
)

// BootstrapOptions says how an Envoy starts.
type BootstrapOptions struct {
	Identity lb.Identity
	XDS      string // IP:PORT, or unix:PATH
	Admin    string // IP:PORT, port 0 allowed, or unix:PATH
	Metadata map[string]string
}

// Bootstrap is the JSON that an Envoy starts with: it knows its control plane
// and nothing else.
func Bootstrap(o BootstrapOptions) ([]byte, error) {
	xds, err := anyAddress(o.XDS)
	if err != nil {
		return nil, fmt.Errorf("xds address %q: %w", o.XDS, err)
	}
	admin, err := anyAddress(o.Admin)
	if err != nil {
		return nil, fmt.Errorf("admin address %q: %w", o.Admin, err)
	}
	b := &bootstrapv3.Bootstrap{
		Node:  node(o),
		Admin: &bootstrapv3.Admin{Address: admin},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			AdsConfig: ads(), CdsConfig: fromADS(0), LdsConfig: fromADS(0),
		},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{controlPlane(xds)}},
		ClusterManager:  &bootstrapv3.ClusterManager{LoadStatsConfig: loadReports()},
		StatsConfig:     statsConfig(),
		LayeredRuntime:  runtimeLayer(),
		OverloadManager: &overloadv3.OverloadManager{ResourceMonitors: []*overloadv3.ResourceMonitor{{
			Name:       connectionsMonitor,
			ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: pack(&connectionsv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: maxDownstream})},
		}}},
	}
	data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(b)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, data, "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// regexSize is how large Envoy lets a regular expression become. Its own limit of
// 100 refuses quite ordinary ones.
const regexSize = 1000

func runtimeLayer() *bootstrapv3.LayeredRuntime {
	return &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
		Name: "roost",
		LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: &structpb.Struct{Fields: map[string]*structpb.Value{
			"re2.max_program_size.error_level": structpb.NewNumberValue(regexSize),
		}}},
	}}}
}

func anyAddress(s string) (*corev3.Address, error) {
	if len(s) > 5 && s[:5] == "unix:" {
		return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: s[5:], Mode: 0o600}}}, nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, fmt.Errorf("want IP:PORT or unix:PATH: %w", err)
	}
	return address(a.Addr().String(), a.Port()), nil
}

func node(o BootstrapOptions) *corev3.Node {
	n := &corev3.Node{Id: o.Identity.String(), Cluster: nodeCluster(o.Identity), Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{}}}
	n.Metadata.Fields[MetadataLoad] = structpb.NewStringValue("true")
	for k, v := range o.Metadata {
		n.Metadata.Fields[k] = structpb.NewStringValue(v)
	}
	return n
}

func nodeCluster(id lb.Identity) string {
	switch id.Role {
	case lb.Sidecar:
		return id.Service + "." + id.Tenant
	case lb.Gateway:
		return id.Group
	}
	return string(id.Role)
}

func ads() *corev3.ApiConfigSource {
	return &corev3.ApiConfigSource{
		ApiType: corev3.ApiConfigSource_DELTA_GRPC, TransportApiVersion: corev3.ApiVersion_V3, SetNodeOnFirstMessageOnly: true,
		GrpcServices: []*corev3.GrpcService{controlPlaneService()},
	}
}

// loadReports lets the control plane ask what is in flight to an endpoint, which
// a drain waits for.
func loadReports() *corev3.ApiConfigSource {
	return &corev3.ApiConfigSource{ApiType: corev3.ApiConfigSource_GRPC, TransportApiVersion: corev3.ApiVersion_V3, GrpcServices: []*corev3.GrpcService{controlPlaneService()}}
}

func controlPlaneService() *corev3.GrpcService {
	return &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{
		ClusterName: xdsCluster,
		RetryPolicy: &corev3.RetryPolicy{RetryBackOff: &corev3.BackoffStrategy{BaseInterval: seconds(reconnectBase), MaxInterval: seconds(reconnectMax)}},
	}}}
}

func controlPlane(at *corev3.Address) *clusterv3.Cluster {
	h2 := http2Options()
	h2.ConnectionKeepalive = &corev3.KeepaliveSettings{Interval: seconds(keepaliveInterval), Timeout: seconds(keepaliveTimeout)}
	return &clusterv3.Cluster{
		Name: xdsCluster, ConnectTimeout: seconds(xdsConnectTimeout), ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(&httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: h2},
			}},
		})},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: xdsCluster, Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: at}},
		}}}}},
	}
}

// statsConfig keeps what Roost reads; all of Envoy's statistics of 10,000
// clusters would cost 300 MB.
func statsConfig() *metricsv3.StatsConfig {
	list := &matcherv3.ListStringMatcher{}
	for _, prefix := range []string{"cluster_manager.", "listener_manager.", "control_plane.", "server.", "overload."} {
		list.Patterns = append(list.Patterns, &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: prefix}})
	}
	for _, suffix := range []string{".upstream_rq_total", ".upstream_cx_total", ".upstream_cx_active", ".upstream_cx_connect_fail", ".upstream_rq_retry", ".downstream_cx_active"} {
		list.Patterns = append(list.Patterns, &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: suffix}})
	}
	list.Patterns = append(list.Patterns, &matcherv3.StringMatcher{MatchPattern: regex(`cluster\..*\.upstream_rq_[1-5][0-9][0-9]`)})
	return &metricsv3.StatsConfig{StatsMatcher: &metricsv3.StatsMatcher{StatsMatcher: &metricsv3.StatsMatcher_InclusionList{InclusionList: list}}}
}
