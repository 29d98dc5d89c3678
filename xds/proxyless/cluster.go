package proxyless

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	leastv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/least_request/v3"
	robinv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/round_robin/v3"
	localityv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/wrr_locality/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/roostmesh/roost/lb"
)

const (
	ringHash = "ring_hash"

	// defaultMaxRequests is what Envoys have, too; gRPC's own default is 1024.
	defaultMaxRequests = 16384

	// The ejection of an endpoint: gRPC does not count errors in a row but looks,
	// at each interval, at the share of calls that failed.
	defaultInARow     = 5
	defaultMaxPercent = 50
	ejectionInterval  = 5 * time.Second
	failedPercent     = 85
	leastHosts        = 2
)

// Cluster is the cluster of one port, of all versions or of one.
func Cluster(s *lb.Service, name string) *clusterv3.Cluster {
	c := AbsentCluster()
	c.Name = name
	c.CircuitBreakers = breakers(s.Spec.CircuitBreaker)
	c.OutlierDetection = outliers(s.Spec.OutlierDetection)
	switch s.Spec.Policy {
	case ringHash:
		c.LbPolicy = clusterv3.Cluster_RING_HASH
	case "least_request":
		// C-core has no least_request and refuses lb_policy LEAST_REQUEST; of a list
		// it takes the first policy that it knows.
		c.LoadBalancingPolicy = policies(&localityv3.WrrLocality{EndpointPickingPolicy: policies(&leastv3.LeastRequest{}, &robinv3.RoundRobin{})})
	}
	return c
}

func policies(list ...proto.Message) *clusterv3.LoadBalancingPolicy {
	out := &clusterv3.LoadBalancingPolicy{}
	for _, m := range list {
		out.Policies = append(out.Policies, &clusterv3.LoadBalancingPolicy_Policy{TypedExtensionConfig: &corev3.TypedExtensionConfig{
			Name: string(m.ProtoReflect().Descriptor().Name()), TypedConfig: pack(m),
		}})
	}
	return out
}

func breakers(b *lb.CircuitBreaker) *clusterv3.CircuitBreakers {
	most := uint32(defaultMaxRequests)
	if b != nil {
		most = cmp.Or(b.MaxRequests, most)
	}
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{MaxRequests: wrapperspb.UInt32(most)}}}
}

// outliers ejects an endpoint of which nearly every call of an interval failed,
// once there were as many calls as the service allows errors in a row.
func outliers(o *lb.OutlierDetection) *clusterv3.OutlierDetection {
	if o == nil {
		return nil
	}
	out := &clusterv3.OutlierDetection{
		Interval:                       durationpb.New(ejectionInterval),
		MaxEjectionPercent:             wrapperspb.UInt32(cmp.Or(o.MaxPercent, defaultMaxPercent)),
		EnforcingSuccessRate:           wrapperspb.UInt32(0),
		EnforcingFailurePercentage:     wrapperspb.UInt32(100),
		FailurePercentageThreshold:     wrapperspb.UInt32(failedPercent),
		FailurePercentageMinimumHosts:  wrapperspb.UInt32(leastHosts),
		FailurePercentageRequestVolume: wrapperspb.UInt32(cmp.Or(o.Consecutive5xx, defaultInARow)),
	}
	if o.EjectionTime > 0 {
		out.BaseEjectionTime = durationpb.New(o.EjectionTime)
	}
	return out
}

// Assignment is the endpoints of a port's cluster; one without an instance is
// explicitly empty.
//
// gRPC's round_robin and least_request know the weight of a locality but not
// that of an endpoint, so endpoints of one zone that differ in weight are in
// localities of their own, told apart by the sub-zone. An endpoint that drains
// is there, but its weight does not count. ring_hash takes the product of both
// weights: there, everything is in one locality.
func Assignment(s *lb.Service, port int, version, name string) *endpointv3.ClusterLoadAssignment {
	a := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	localities := map[place]*endpointv3.LocalityLbEndpoints{}
	for _, e := range endpoints(s, port, version) {
		weight := max(e.Instance.Weight, 1)
		at := place{e.Instance.Zone, weight}
		if s.Spec.Policy == ringHash {
			at = place{weight: 1}
		}
		l := localities[at]
		if l == nil {
			l = &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Zone: at.zone}}
			if at.weight != 1 {
				l.Locality.SubZone = fmt.Sprintf("weight-%d", at.weight)
			}
			localities[at] = l
			a.Endpoints = append(a.Endpoints, l)
		}
		l.LbEndpoints = append(l.LbEndpoints, endpoint(e, port, weight))
		switch {
		case s.Spec.Policy == ringHash:
			l.LoadBalancingWeight = wrapperspb.UInt32(1)
		case e.Serving:
			l.LoadBalancingWeight = wrapperspb.UInt32(l.GetLoadBalancingWeight().GetValue() + weight)
		}
	}
	slices.SortFunc(a.Endpoints, func(x, y *endpointv3.LocalityLbEndpoints) int {
		return cmp.Or(strings.Compare(x.Locality.Zone, y.Locality.Zone), strings.Compare(x.Locality.SubZone, y.Locality.SubZone))
	})
	return a
}

// place is a locality.
type place struct {
	zone   string
	weight uint32
}

// endpoints are those of one port and version. gRPC refuses an assignment that
// names an address twice: of such, one that serves counts.
func endpoints(s *lb.Service, port int, version string) []*lb.Endpoint {
	var out []*lb.Endpoint
	index := map[netip.AddrPort]int{}
	for _, e := range s.Endpoints {
		if !e.Offered() || !e.At[port].IsValid() || version != "" && e.Instance.Version != version {
			continue
		}
		if n, twice := index[e.At[port]]; twice {
			if e.Serving && !out[n].Serving {
				out[n] = e
			}
			continue
		}
		index[e.At[port]] = len(out)
		out = append(out, e)
	}
	return out
}

func endpoint(e *lb.Endpoint, port int, weight uint32) *endpointv3.LbEndpoint {
	at := e.At[port]
	out := &endpointv3.LbEndpoint{
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: at.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(at.Port())},
		}}}}},
		LoadBalancingWeight: wrapperspb.UInt32(weight), HealthStatus: corev3.HealthStatus_HEALTHY,
	}
	if !e.Serving {
		out.HealthStatus = corev3.HealthStatus_DRAINING
	}
	return out
}
