package envoy

import (
	"iter"
	"strconv"

	"github.com/roostmesh/roost/lb"
)

// Type is a kind of xDS resource. Its order is the order in which additions
// are sent; removals go the other way round.
type Type uint8

// The types that Roost serves.
const (
	Secret Type = iota
	Cluster
	Endpoint
	Extension
	Listener
	Route
	VirtualHost // of a Route, asked for by ROUTE/HOST

	// Types is how many there are; arrays of per-type state have this length.
	Types
)

var typeURLs = [Types]string{
	Secret:    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	Cluster:   "type.googleapis.com/envoy.config.cluster.v3.Cluster",
	Endpoint:  "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
	Extension: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
	Listener:  "type.googleapis.com/envoy.config.listener.v3.Listener",
	Route:     "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",

	VirtualHost: "type.googleapis.com/envoy.config.route.v3.VirtualHost",
}

var typeNames = [Types]string{Secret: "secret", Cluster: "cluster", Endpoint: "endpoint", Extension: "extension", Listener: "listener", Route: "route", VirtualHost: "virtual_host"}

// URL is the type URL on the wire.
func (t Type) URL() string { return typeURLs[t] }

// String is the word that the admin API and the CLI use: cluster, endpoint,
// extension, listener, route, secret or virtual_host.
func (t Type) String() string { return typeNames[t] }

// TypeOf finds the type of a type URL.
func TypeOf(url string) (Type, bool) {
	for t, u := range typeURLs {
		if u == url {
			return Type(t), true
		}
	}
	return 0, false
}

// TypeNamed finds a type by its word.
func TypeNamed(name string) (Type, bool) {
	for t, n := range typeNames {
		if n == name {
			return Type(t), true
		}
	}
	return 0, false
}

// Wildcard says that a proxy gets every resource of its view, named or not:
// clusters and listeners. All others are sent only by name.
func (t Type) Wildcard() bool { return t == Cluster || t == Listener }

// Name identifies a resource within a proxy's view.
type Name struct {
	Type Type
	Name string
}

// Resource is one encoded xDS resource. It is immutable and shared by every
// proxy that holds it.
type Resource struct {
	Name
	// Version is a short hash of the content, equal on every replica.
	Version string
	// Body is the marshalled envoy.service.discovery.v3.Resource (name, version
	// and the resource itself in an Any): one element of a DeltaDiscoveryResponse.
	Body []byte
	// Refs are the resources that this one names: a cluster its endpoints, a
	// listener its routes, clusters, extensions and secrets, a route or a virtual
	// host its clusters.
	Refs []Name
	// InPlaceOf is the version that proxies refuse and that a Pin has put this one
	// in the place of; empty for what was built.
	InPlaceOf string
}

// View is what one proxy may hold of one World. It is immutable, cheap to make
// and keeps no copy of the resources.
type View interface {
	// Get returns a resource, or nil where the proxy may not hold it or it does
	// not exist.
	Get(n Name) *Resource
	// All lists the resources of a wildcard type, or the endpoints, ordered by name.
	All(t Type) iter.Seq[*Resource]
	// Limited says that listeners are left out for want of file descriptors:
	// which ones depends on all of them.
	Limited() bool
}

// Change names what differs between two Worlds.
type Change struct {
	// Names are the resources that were added, changed or removed, or that other
	// proxies may hold than before, by type and name; proxies whose view has none
	// of them before or after need not look. A route stands for its virtual hosts,
	// too.
	Names []Name
	// Views says that more may have changed than there are Names for, so that
	// every proxy compares its whole view.
	Views bool
	// Nodes are the hosts on which instances came or went: a node proxy on one
	// of them compares its whole view, other proxies need not.
	Nodes []string
}

// World is every resource that a Snapshot yields, shared by all proxies. It is
// immutable.
type World interface {
	// Version is the Snapshot's: it grows by one with every change.
	Version() uint64
	// View is what a proxy may hold.
	View(p Proxy) View
}

// Proxy is whose view is asked for.
type Proxy struct {
	lb.Identity
	// MaxListeners is how many listeners its file descriptors allow; 0 is no
	// limit. Envoy aborts when they run out, so what is beyond is left out.
	MaxListeners int
}

// ProxyOf reads the limits of a proxy from the metadata of its bootstrap.
func ProxyOf(id lb.Identity, metadata map[string]string) Proxy {
	p := Proxy{Identity: id}
	fds, err1 := strconv.Atoi(metadata[MetadataFDs])
	workers, err2 := strconv.Atoi(metadata[MetadataWorker])
	if err1 == nil && err2 == nil && workers > 0 {
		// Each worker has a socket of its own for each listener; a quarter and
		// some are left for connections.
		p.MaxListeners = max((fds*3/4-reservedFDs)/workers, 1)
	}
	return p
}

// reservedFDs are what an Envoy needs beside listeners and connections.
const reservedFDs = 128
