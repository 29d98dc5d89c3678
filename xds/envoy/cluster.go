package envoy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"math"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/roostmesh/roost/lb"
)

const (
	connectTimeout = 2 * time.Second
	// edsTimeout bounds the wait for endpoints that should have come with their
	// cluster; with Envoy's 15 s one lost answer would hold up every cluster.
	edsTimeout = 200 * time.Millisecond
	// bufferLimit bounds what one connection may hold in Envoy's memory.
	bufferLimit = 1 << 20

	// The limits of a service that sets none: high enough not to be met by
	// chance, low enough to bound the damage.
	defaultMaxConnections = 16384
	defaultMaxRequests    = 16384
	defaultMaxRetries     = 1024

	defaultHealthInterval = 5 * time.Second
	defaultHealthTimeout  = 2 * time.Second
	defaultThreshold      = 2

	// drainCheckEvery bounds how late connections are closed after a drain.
	drainCheckEvery = time.Second
)

// clusters are the clusters of one service: one for each port, and one for each
// version that routes name.
func clusters(s *lb.Service) []*Resource {
	return eachCluster(s, func(port int, _, name string) *Resource {
		return encode(Cluster, name, cluster(s, &s.Ports[port], name), Name{Endpoint, name})
	})
}

func cluster(s *lb.Service, p *lb.Port, name string) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                          name,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:              &clusterv3.Cluster_EdsClusterConfig{EdsConfig: fromADS(edsTimeout)},
		ConnectTimeout:                seconds(connectTimeout),
		PerConnectionBufferLimitBytes: u32(bufferLimit),
		LbPolicy:                      policy(s.Spec.Policy),
		Metadata:                      metadata("tenant", s.Key.Tenant, "service", s.Key.Service),
		CircuitBreakers:               breakers(s.Spec.CircuitBreaker),
		HealthChecks:                  healthChecks(s.Spec.HealthCheck, p.Protocol),
		OutlierDetection:              outliers(s.Spec.OutlierDetection),
		// An instance that left the catalog goes at once, whatever probes say.
		IgnoreHealthOnHostRemoval: true,
		// Without healthy instances callers get a clear answer, not a dead host.
		CommonLbConfig: &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}},
	}
	protocol := p.Protocol
	if closes(s, p) {
		c.HealthChecks, c.CloseConnectionsOnHostHealthFailure = []*corev3.HealthCheck{drainCheck()}, true
		protocol = lb.HTTP2 // which the gRPC check needs; raw TCP is not touched by it
	}
	if lb.IsHTTP(protocol) {
		c.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(upstreamHTTP(protocol))}
	}
	return c
}

// closes says that a drain closes the connections of a port's instances when
// its time is over. Requests end by themselves or by their timeout.
func closes(s *lb.Service, p *lb.Port) bool {
	return s.DrainCheck.IsValid() && !lb.IsHTTP(p.Protocol) && p.Protocol != lb.UDP
}

// drainCheck asks Roost, by its health service, whether an instance's connections
// are to be closed: nothing else closes raw TCP of one endpoint in bounded time.
// Only its answer counts; that it does not answer never makes an endpoint
// unhealthy.
func drainCheck() *corev3.HealthCheck {
	return &corev3.HealthCheck{
		Interval: seconds(drainCheckEvery), NoTrafficInterval: seconds(drainCheckEvery), Timeout: seconds(drainCheckEvery),
		HealthyThreshold: u32(1), UnhealthyThreshold: u32(math.MaxUint32),
		HealthChecker: &corev3.HealthCheck_GrpcHealthCheck_{GrpcHealthCheck: &corev3.HealthCheck_GrpcHealthCheck{}},
	}
}

const drainPrefix = "drain-"

// DrainName is the host name under which proxies ask for an instance, by its
// qualified name.
func DrainName(instance string) string {
	sum := sha256.Sum256([]byte(instance))
	return drainPrefix + hex.EncodeToString(sum[:8])
}

// IsDrainName tells a DrainName from other host names.
func IsDrainName(s string) bool { return strings.HasPrefix(s, drainPrefix) }

func policy(name string) clusterv3.Cluster_LbPolicy {
	switch name {
	case "least_request":
		return clusterv3.Cluster_LEAST_REQUEST
	case "random":
		return clusterv3.Cluster_RANDOM
	case "ring_hash":
		return clusterv3.Cluster_RING_HASH
	case "maglev":
		return clusterv3.Cluster_MAGLEV
	}
	return clusterv3.Cluster_ROUND_ROBIN
}

func upstreamHTTP(protocol string) *httpv3.HttpProtocolOptions {
	config := &httpv3.HttpProtocolOptions_ExplicitHttpConfig{ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}}}
	if protocol != lb.HTTP {
		config.ProtocolConfig = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: http2Options()}
	}
	return &httpv3.HttpProtocolOptions{UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: config}}
}

// http2Options bound streams and windows as Envoy's edge guide advises.
func http2Options() *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{MaxConcurrentStreams: u32(1000), InitialStreamWindowSize: u32(256 << 10), InitialConnectionWindowSize: u32(1 << 20)}
}

func breakers(b *lb.CircuitBreaker) *clusterv3.CircuitBreakers {
	if b == nil {
		b = &lb.CircuitBreaker{}
	}
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections:     u32(cmp.Or(b.MaxConnections, defaultMaxConnections)),
		MaxPendingRequests: u32(cmp.Or(b.MaxPendingRequests, defaultMaxRequests)),
		MaxRequests:        u32(cmp.Or(b.MaxRequests, defaultMaxRequests)),
		MaxRetries:         u32(cmp.Or(b.MaxRetries, defaultMaxRetries)),
	}}}
}

// healthChecks probe one port: in its own protocol where it speaks HTTP, else by
// connecting.
func healthChecks(h *lb.HealthCheck, protocol string) []*corev3.HealthCheck {
	if h == nil || protocol == lb.UDP {
		return nil
	}
	interval := cmp.Or(h.Interval, defaultHealthInterval)
	c := &corev3.HealthCheck{
		Interval: seconds(interval), Timeout: seconds(cmp.Or(h.Timeout, min(interval, defaultHealthTimeout))),
		HealthyThreshold: u32(cmp.Or(h.Healthy, defaultThreshold)), UnhealthyThreshold: u32(cmp.Or(h.Unhealthy, defaultThreshold)),
		HealthChecker: &corev3.HealthCheck_TcpHealthCheck_{TcpHealthCheck: &corev3.HealthCheck_TcpHealthCheck{}},
	}
	if h.HTTPPath != "" && lb.IsHTTP(protocol) {
		http := &corev3.HealthCheck_HttpHealthCheck{Path: h.HTTPPath}
		if protocol != lb.HTTP {
			http.CodecClientType = typev3.CodecClientType_HTTP2
		}
		c.HealthChecker = &corev3.HealthCheck_HttpHealthCheck_{HttpHealthCheck: http}
	}
	return []*corev3.HealthCheck{c}
}

func outliers(o *lb.OutlierDetection) *clusterv3.OutlierDetection {
	if o == nil {
		return nil
	}
	out := &clusterv3.OutlierDetection{MaxEjectionPercent: u32(cmp.Or(o.MaxPercent, 50))}
	if o.Consecutive5xx > 0 {
		out.Consecutive_5Xx = u32(o.Consecutive5xx)
	}
	if o.EjectionTime > 0 {
		out.BaseEjectionTime = seconds(o.EjectionTime)
	}
	return out
}

// endpoints are the assignments of a service's clusters; one without an
// instance is explicitly empty. One that drains stays until what it has in flight
// has ended, so that proxies can tell.
func endpoints(s *lb.Service) []*Resource {
	return eachCluster(s, func(port int, version, name string) *Resource {
		return encode(Endpoint, name, assignment(s, port, version, name))
	})
}

func assignment(s *lb.Service, port int, version, name string) *endpointv3.ClusterLoadAssignment {
	a := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	group := &endpointv3.LocalityLbEndpoints{}
	for _, e := range s.Endpoints {
		if !e.Offered() || !e.At[port].IsValid() || version != "" && e.Instance.Version != version {
			continue
		}
		at := &endpointv3.Endpoint{Address: address(e.At[port].Addr().String(), e.At[port].Port())}
		if closes(s, &s.Ports[port]) {
			at.HealthCheckConfig = &endpointv3.Endpoint_HealthCheckConfig{Address: address(s.DrainCheck.Addr().String(), s.DrainCheck.Port()), Hostname: DrainName(e.Instance.QualifiedName())}
		}
		lbe := &endpointv3.LbEndpoint{
			HostIdentifier:      &endpointv3.LbEndpoint_Endpoint{Endpoint: at},
			LoadBalancingWeight: wrapperspb.UInt32(e.Instance.Weight),
		}
		if !e.Serving {
			lbe.HealthStatus = corev3.HealthStatus_DRAINING
		}
		group.LbEndpoints = append(group.LbEndpoints, lbe)
	}
	if len(group.LbEndpoints) > 0 {
		a.Endpoints = []*endpointv3.LocalityLbEndpoints{group}
	}
	return a
}
