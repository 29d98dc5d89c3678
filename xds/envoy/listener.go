package envoy

import (
	"net/netip"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	proxyprotocolv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/proxy_protocol/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/roostmesh/roost/lb"
)

const (
	// CapturePort is where captured connections to pool addresses arrive.
	CapturePort = 15001
	// CaptureListener is the name of the listener there.
	CaptureListener = "roost:capture"
	// refused is a cluster that never exists: TCP to it is closed at once.
	refused = "roost:refused"

	listenerFilterTimeout = 5 * time.Second
	connectAttempts       = 3
)

// outbound is a service port's own listener on a sidecar or a node proxy.
// captured says that connections come through the capture listener.
func outbound(c *lb.Config, s *lb.Service, p *lb.Port, role lb.Role, captured bool) *Resource {
	name := lb.RouteNameOf(s.Key, p.Port)
	l := &listenerv3.Listener{
		Name: name, Address: address(s.Address.String(), p.Port), TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		PerConnectionBufferLimitBytes: u32(bufferLimit),
		// With it a second Envoy would share the address silently.
		EnableReusePort: wrapperspb.Bool(false),
	}
	if s.Address6.IsValid() {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: address(s.Address6.String(), p.Port)}}
	}
	if captured {
		l.BindToPort = wrapperspb.Bool(false)
	}
	var filters []*listenerv3.Filter
	var refs []Name
	if role == lb.Node {
		rule := callersName(s, lb.IsHTTP(p.Protocol))
		filters = append(filters, callersFilter(rule))
		refs = append(refs, Name{Extension, rule})
	}
	service, more := serviceFilter(c, s, p, role)
	l.FilterChains = []*listenerv3.FilterChain{{Filters: append(filters, service)}}
	return encode(Listener, name, l, append(refs, more...)...)
}

// serviceFilter is what handles a service port's connections.
func serviceFilter(c *lb.Config, s *lb.Service, p *lb.Port, role lb.Role) (*listenerv3.Filter, []Name) {
	if lb.IsHTTP(p.Protocol) {
		routes := lb.RouteNameOf(s.Key, p.Port)
		m := connectionManager(p.Cluster, routes, p.Protocol, accessLog(c.AccessLog, role, true, s.Key.Tenant, s.Key.Service))
		if role == lb.Gateway {
			edge(m, &lb.Listener{Spec: &lb.ListenerSpec{}})
		}
		return httpFilter(m), []Name{{Route, routes}}
	}
	t := &tcpproxyv3.TcpProxy{
		StatPrefix: p.Cluster, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: p.Cluster},
		MaxConnectAttempts: u32(connectAttempts), AccessLog: accessLog(c.AccessLog, role, false, s.Key.Tenant, s.Key.Service),
	}
	return tcpFilter(t), []Name{{Cluster, p.Cluster}}
}

func tcpFilter(t *tcpproxyv3.TcpProxy) *listenerv3.Filter {
	return &listenerv3.Filter{Name: "envoy.filters.network.tcp_proxy", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(t)}}
}

// closing is a filter chain that closes every connection.
func closing(match *listenerv3.FilterChainMatch) *listenerv3.FilterChain {
	return &listenerv3.FilterChain{FilterChainMatch: match, Filters: []*listenerv3.Filter{tcpFilter(&tcpproxyv3.TcpProxy{StatPrefix: refused, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: refused}})}}
}

// capture takes what the host's rules redirect and hands each connection to
// the listener of the address that was dialled; others are closed.
func capture(role lb.Role) *Resource {
	at := "127.0.0.1"
	if role == lb.Node {
		at = "0.0.0.0" // callers of other namespaces are redirected to the address of their bridge
	}
	l := &listenerv3.Listener{
		Name: CaptureListener, Address: address(at, CapturePort), TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		UseOriginalDst: wrapperspb.Bool(true), EnableReusePort: wrapperspb.Bool(false), PerConnectionBufferLimitBytes: u32(bufferLimit),
		ListenerFilters: []*listenerv3.ListenerFilter{{Name: "envoy.filters.listener.original_dst", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(&originaldstv3.OriginalDst{})}}},
		FilterChains:    []*listenerv3.FilterChain{closing(nil)},
	}
	return encode(Listener, CaptureListener, l)
}

// DedicatedSuffix ends the name of a listener on a dedicated IP.
const DedicatedSuffix = "@dedicated"

// dedicatedName is the listener of a service port on its dedicated IP.
func dedicatedName(s *lb.Service, p *lb.Port) string {
	return lb.RouteNameOf(s.Key, p.Port) + DedicatedSuffix
}

// dedicated is a service port's listener on its dedicated IP, on gateways.
func dedicated(c *lb.Config, s *lb.Service, p *lb.Port) *Resource {
	filter, refs := serviceFilter(c, s, p, lb.Gateway)
	name := dedicatedName(s, p)
	return encode(Listener, name, &listenerv3.Listener{
		Name: name, Address: address(s.Dedicated.String(), p.Port), TrafficDirection: corev3.TrafficDirection_INBOUND,
		Freebind: wrapperspb.Bool(true), PerConnectionBufferLimitBytes: u32(bufferLimit),
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{filter}}},
	}, refs...)
}

// public is a declared listener of a gateway group; nil when it cannot be
// served (an https listener without a usable certificate).
func public(c *lb.Config, l *lb.Listener, secrets []secret) *Resource {
	out := &listenerv3.Listener{
		Name: l.Spec.Name, Address: address(l.Spec.Address.Addr().String(), l.Spec.Address.Port()), TrafficDirection: corev3.TrafficDirection_INBOUND,
		PerConnectionBufferLimitBytes: u32(bufferLimit), ListenerFiltersTimeout: seconds(listenerFilterTimeout),
	}
	if l.Spec.ProxyProtocol {
		out.ListenerFilters = append(out.ListenerFilters, &listenerv3.ListenerFilter{Name: "envoy.filters.listener.proxy_protocol", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(&proxyprotocolv3.ProxyProtocol{})}})
	}
	filter, refs := publicFilter(c, l)
	if l.Spec.Protocol == lb.HTTPS {
		if len(secrets) == 0 {
			return nil
		}
		refs = append(refs, terminate(out, filter, secrets)...)
	} else {
		out.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{filter}}}
	}
	if l.Spec.Address.Addr() == netip.IPv6Unspecified() {
		out.Address.GetSocketAddress().Ipv4Compat = true // as everywhere on Linux, [::] is both
	}
	if l.Spec.Address.Addr().IsUnspecified() {
		// A service's address must not be answered by a wildcard socket.
		if pools := pools(c); len(pools) > 0 {
			out.FilterChains = append(out.FilterChains, closing(&listenerv3.FilterChainMatch{PrefixRanges: pools}))
		}
	}
	return encode(Listener, l.Spec.Name, out, refs...)
}

func pools(c *lb.Config) []*corev3.CidrRange {
	var out []*corev3.CidrRange
	for _, p := range c.InternalPools {
		out = append(out, cidr(p))
	}
	for _, p := range c.DedicatedPools {
		out = append(out, cidr(p.Prefix))
	}
	return out
}

func publicFilter(c *lb.Config, l *lb.Listener) (*listenerv3.Filter, []Name) {
	if lb.IsHTTP(l.Spec.Protocol) {
		m := connectionManager(l.Spec.Name, l.Spec.Name, l.Spec.Protocol, accessLog(c.AccessLog, lb.Gateway, true, "", ""))
		edge(m, l)
		return httpFilter(m), []Name{{Route, l.Spec.Name}}
	}
	t := &tcpproxyv3.TcpProxy{StatPrefix: l.Spec.Name, MaxConnectAttempts: u32(connectAttempts), AccessLog: accessLog(c.AccessLog, lb.Gateway, false, "", "")}
	if l.Target == nil {
		t.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: refused}
		return tcpFilter(t), nil
	}
	if len(l.Target.To) == 1 {
		t.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: l.Target.To[0].Cluster}
	} else {
		w := &tcpproxyv3.TcpProxy_WeightedCluster{}
		for _, d := range l.Target.To {
			if d.Weight > 0 {
				w.Clusters = append(w.Clusters, &tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight{Name: d.Cluster, Weight: d.Weight})
			}
		}
		t.ClusterSpecifier = &tcpproxyv3.TcpProxy_WeightedClusters{WeightedClusters: w}
	}
	return tcpFilter(t), clusterRefs([]*lb.Route{l.Target})
}

func cidr(p netip.Prefix) *corev3.CidrRange {
	return &corev3.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: u32(uint32(p.Bits()))}
}
