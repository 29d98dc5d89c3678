package envoy

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
)

// PlaceholderVersion is that of every placeholder: no hash is like it, so that a
// placeholder is known by its version.
const PlaceholderVersion = "none"

// Placeholder is what stands in for a resource that a proxy asks for on demand and
// that its view does not have: Envoy asks once per name, so that an answer which
// takes nothing but fails at once is better than none. It is nil for a name that
// Envoy would not take, and for types that are not asked for on demand. Nothing
// of it tells a name that is hidden from one that does not exist.
func Placeholder(n Name) *Resource {
	switch {
	case n.Name == "":
		return nil
	case n.Type == Cluster:
		return encodeAs(PlaceholderVersion, Cluster, n.Name, pack(&clusterv3.Cluster{
			Name:                 n.Name,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: fromADS(edsTimeout)},
			ConnectTimeout:       seconds(connectTimeout),
		}), Name{Endpoint, n.Name})
	case n.Type == Endpoint:
		return encodeAs(PlaceholderVersion, Endpoint, n.Name, pack(&endpointv3.ClusterLoadAssignment{ClusterName: n.Name}))
	case n.Type == VirtualHost:
		if _, host := RouteOf(n.Name); host != "" {
			return encodeAs(PlaceholderVersion, VirtualHost, n.Name, pack(&routev3.VirtualHost{Name: n.Name, Domains: []string{host}}))
		}
	}
	return nil
}
