package lb

import (
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/roostmesh/roost/discovery"
)

// Snapshot is the world at one moment: everything that Envoy, DNS and the
// admin API are answered from. It is immutable.
type Snapshot struct {
	Version uint64
	Config  *Config
	Catalog *discovery.Catalog

	Services  Table[Key, *Service]
	Order     []*Service // by key
	ByAddress map[netip.Addr]*Service
	*Routing
	Callers  *Callers   // who a source address is on each node
	Problems []Problem  // ordered by severity, code, object
	Draining []*Service // those of Order of which an endpoint is on its way out, or through

	found      []Problem // all Problems but those that others have added
	undeclared []Problem // of instances without a service
	drains     map[Key]map[string]Drain
}

// Routing is what the declared routes and public listeners come to. It keeps its
// pointer from one Snapshot to the next while all of it is the same, and what is
// the same of it keeps its own.
type Routing struct {
	Listeners []*Listener         // public ones, by name
	Routes    map[string][]*Route // by listener name, in match order
	Mesh      map[Key][]*Route    // declared routes on a service's own address, in match order

	refused []Problem // what of it cannot be served
}

// Service is one service: it exists with or without instances. Unchanged
// services keep their pointer from one Snapshot to the next.
type Service struct {
	Spec       *ServiceSpec
	Key        Key
	Domain     string     // shop.acme.roost
	Address    netip.Addr // internal, IPv4
	Address6   netip.Addr // internal, IPv6; invalid without such a pool
	Dedicated  netip.Addr // invalid when none was asked for
	Generation uint64     // of its address record
	Probed     bool       // its address is not the first candidate of its hash
	Ports      []Port
	Versions   []string // that routes name, each with a cluster of its own
	Group      *discovery.Group
	Endpoints  []*Endpoint      // by instance id and node
	DrainCheck netip.AddrPort   // of a service whose connections a drain closes; else invalid
	Draining   bool             // an endpoint is on its way out, or through
	Drains     map[string]Drain // wishes, by the instances' qualified names; shared, not to be changed
	Problems   []Problem
}

// Port is one port of a service.
type Port struct {
	PortSpec
	Cluster string // shop.acme:http
}

// Endpoint is one instance as a service's endpoint.
type Endpoint struct {
	Instance *discovery.Instance
	// At holds where the instance serves each of Service.Ports; invalid where
	// it does not.
	At []netip.AddrPort
	// Serving says that it takes new traffic.
	Serving bool
	// Drain says how far it has been taken out of service on purpose.
	Drain Drain

	unreachable bool
}

// Offered says that proxies have the endpoint: it takes new traffic, or it
// finishes what it has.
func (e *Endpoint) Offered() bool {
	return e.Serving || (e.Drain == Draining || e.Drain == Closing) && !e.unreachable
}

// Drain is how far an instance is on its way out.
type Drain uint8

// An instance that drains takes no new traffic and finishes what it has; then
// what it still has is closed; then proxies do not have it any more.
const (
	NotDraining Drain = iota
	Draining
	Closing
	Drained
)

// Total and Healthy count instances; healthy ones take traffic.
func (s *Service) Total() int { return len(s.Endpoints) }

// Healthy counts the instances that take traffic.
func (s *Service) Healthy() int {
	n := 0
	for _, e := range s.Endpoints {
		if e.Serving {
			n++
		}
	}
	return n
}

// Port finds a port by the number that callers dial.
func (s *Service) Port(number uint16) (*Port, bool) {
	i := slices.IndexFunc(s.Ports, func(p Port) bool { return p.Port == number })
	if i < 0 {
		return nil, false
	}
	return &s.Ports[i], true
}

// PortNamed finds a port by name; "" is the first one.
func (s *Service) PortNamed(name string) (*Port, bool) {
	for i := range s.Ports {
		if s.Ports[i].Name == name || name == "" {
			return &s.Ports[i], true
		}
	}
	return nil, false
}

// Allows tells whether callers of tenant, or its service where that is known,
// may call s.
func (s *Service) Allows(tenant, service string) bool {
	if tenant == s.Key.Tenant {
		return true
	}
	return slices.ContainsFunc(s.Spec.Allow, func(g Grant) bool {
		return g.Tenant == tenant && (g.Service == "" || g.Service == service)
	})
}

// ClusterName is the cluster of one port, of all versions or of one.
func ClusterName(k Key, port, version string) string {
	name := k.Service + "." + k.Tenant + ":" + port
	if version != "" {
		name += "@" + version
	}
	return name
}

// RouteNameOf is the name of the implicit route of a service port:
// SERVICE.TENANT:PORT.
func RouteNameOf(k Key, port uint16) string {
	return k.Service + "." + k.Tenant + ":" + strconv.Itoa(int(port))
}

// Listener is a public listener that was found sound.
type Listener struct {
	Spec *ListenerSpec
	// RedirectsTo is the listener that takes over what no route of a plain
	// one catches; nil is none.
	RedirectsTo *Listener
	// Target is the cluster of a tcp listener; nil refuses connections.
	Target *Route
}

// Route is a route on one listener, in its place of the match order.
type Route struct {
	Name     string
	Tenant   string
	Listener string // public listener's name, or the service port's
	Hosts    []string
	Match    Match
	To       []Destination
	Timeout  time.Duration
	Retry    *Retry
	Order    int
	Origin   string
	Implicit bool
}

// Destination is a resolved Target.
type Destination struct {
	Target
	Cluster string
	// Resolved is false for a service that does not exist: its cluster has no
	// endpoint.
	Resolved bool
}
