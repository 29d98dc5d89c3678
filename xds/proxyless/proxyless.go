// Package proxyless turns one service into what the xDS support of gRPC's own
// libraries takes, so that an application calls it without an Envoy between. A
// service and its routes go in, protos come out; encoding and views are
// xds/envoy's. The package is pure.
//
// gRPC implements a part of xDS, and refuses or ignores the rest; what is said
// of gRPC here was read in grpc-go and C-core (gRFCs A27, A28, A44, A48, A50,
// A52). The names of clusters, endpoints and route configurations are those that
// Envoys have.
package proxyless

import (
	"slices"
	"strconv"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/roostmesh/roost/lb"
)

// Absent is a cluster without an endpoint, in the place of one whose service
// does not exist: gRPC holds up every call of a channel for 15 s while one
// cluster of its routes has not come.
const Absent = "roost:absent"

// Target is what an application dials, and where that leads.
type Target struct {
	Name string // after xds:///; the name of its listener
	Port *lb.Port
}

// Targets are the names under which a service is dialled, ordered:
// SERVICE.TENANT for its main port, and SERVICE.TENANT:PORT and
// SERVICE.TENANT:NAME for each.
func Targets(s *lb.Service) []Target {
	short := s.Key.Service + "." + s.Key.Tenant
	taken := map[string]bool{}
	var out []Target
	add := func(name string, p *lb.Port) {
		if p != nil && !taken[name] {
			taken[name] = true
			out = append(out, Target{name, p})
		}
	}
	add(short, mainPort(s))
	ports := served(s)
	for _, p := range ports {
		add(short+":"+strconv.Itoa(int(p.Port)), p)
	}
	for _, p := range ports {
		add(short+":"+p.Name, p)
	}
	slices.SortFunc(out, func(a, b Target) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out
}

// served are the ports that gRPC can call: all but UDP, for many a service says
// of its gRPC port no more than that it is TCP.
func served(s *lb.Service) []*lb.Port {
	var out []*lb.Port
	for i := range s.Ports {
		if s.Ports[i].Protocol != lb.UDP {
			out = append(out, &s.Ports[i])
		}
	}
	return out
}

// mainPort is the first port that speaks gRPC, else HTTP/2, else HTTP, else the
// first one.
func mainPort(s *lb.Service) *lb.Port {
	ports := served(s)
	for _, protocol := range []string{lb.GRPC, lb.HTTP2, lb.HTTP} {
		for _, p := range ports {
			if p.Protocol == protocol {
				return p
			}
		}
	}
	if len(ports) == 0 {
		return nil
	}
	return ports[0]
}

// Listener is a target's listener: an API listener, which binds nothing.
func Listener(s *lb.Service, t Target) *listenerv3.Listener {
	return &listenerv3.Listener{Name: t.Name, ApiListener: &listenerv3.ApiListener{ApiListener: pack(&hcmv3.HttpConnectionManager{
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: lb.RouteNameOf(s.Key, t.Port.Port), ConfigSource: fromADS()}},
		HttpFilters:    []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{})}}},
	})}}
}

// AbsentCluster is the cluster Absent, and AbsentEndpoints its assignment.
func AbsentCluster() *clusterv3.Cluster {
	return &clusterv3.Cluster{Name: Absent, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}, EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: fromADS()}}
}

// AbsentEndpoints is an assignment of nothing.
func AbsentEndpoints() *endpointv3.ClusterLoadAssignment {
	return &endpointv3.ClusterLoadAssignment{ClusterName: Absent}
}

func fromADS() *corev3.ConfigSource {
	return &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}, ResourceApiVersion: corev3.ApiVersion_V3}
}

// pack marshals a message that this package has built itself, which can only
// fail for text that is not UTF-8; config and sources refuse that.
func pack(m proto.Message) *anypb.Any {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: value}
}
