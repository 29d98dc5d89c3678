// Package lb is the routing model. The catalog of instances, the operator's
// wishes and the addresses that the ledger has given go in; an immutable
// Snapshot comes out, with every endpoint and route carrying its Origin and
// every mistake carried as a Problem. Explain says why a request goes where it
// goes, from the same Snapshot that Envoy and DNS are fed from.
//
// The package starts no goroutine and does no I/O.
package lb

import (
	"net/netip"
	"time"

	"github.com/roostmesh/roost/discovery"
)

// Key names a service inside a tenant.
type Key = discovery.Key

// Table is an immutable map that tells cheaply what differs from another one.
type Table[K, V comparable] = discovery.Table[K, V]

// Problem is a mistake or a danger that a person has to mend.
type Problem = discovery.Problem

// The severities of a Problem.
const (
	SeverityError   = discovery.SeverityError
	SeverityWarning = discovery.SeverityWarning
	SeverityInfo    = discovery.SeverityInfo
)

// Protocols of service ports and public listeners.
const (
	HTTP  = "http"
	HTTP2 = "http2"
	GRPC  = "grpc"
	TCP   = "tcp"
	TLS   = "tls"
	UDP   = "udp"
	HTTPS = "https" // public listeners only
)

// IsHTTP tells whether requests of this protocol are routed one by one.
func IsHTTP(protocol string) bool {
	return protocol == HTTP || protocol == HTTP2 || protocol == GRPC || protocol == HTTPS
}

// Config is what the operator wishes, checked and typed. It is immutable.
type Config struct {
	Domain      string // zone of every service name, without dots at the ends
	Datacenter  string
	Node        string // this host
	TrustDomain string
	TTL         time.Duration // of DNS answers

	InternalPools  []netip.Prefix // one IPv4, at most one IPv6
	DedicatedPools []DedicatedPool

	// DrainCheck is where proxies ask whether to close the connections of an
	// instance that drains: Roost's health service. Invalid: nowhere.
	DrainCheck netip.AddrPort

	CaptureNode    string // CaptureBind, CaptureNft or CaptureTproxy
	CaptureSidecar string // CaptureBind or CaptureNft

	Loopback    string // LoopbackAll, LoopbackNone or a tenant
	LoopbackSet bool   // the operator has written it

	AccessLog AccessLog

	Tenants   []*Tenant // ordered by name
	Services  []*ServiceSpec
	Listeners []*ListenerSpec
	Routes    []*RouteSpec
}

// How pool addresses reach Envoy: each bound by a listener, or all captured by
// rules of the host. On a node nft and tproxy name the same capture.
const (
	CaptureBind   = "bind"
	CaptureTproxy = "tproxy"
	CaptureNft    = "nft"
)

// What callers over loopback are.
const (
	LoopbackAll  = "all"
	LoopbackNone = "none"
)

// AccessLog says what Envoy writes to its standard output.
type AccessLog struct {
	Format  string // json text none
	Proxies string // gateway all
	Errors  string // all none
}

// DedicatedPool is a range of dedicated IPs.
type DedicatedPool struct {
	Name      string
	Prefix    netip.Prefix
	Interface string
	Origin    string
}

// Tenant is who owns services.
type Tenant struct {
	Name    string
	Clients []Client
	Hosts   []string // public host patterns its routes may name; empty: any that no other tenant has
	Origin  string
}

// Client is a range of source addresses that belong to a tenant.
type Client struct {
	Prefix netip.Prefix
	Node   string // "" is every node
	Origin string
}

// Grant lets another tenant's service call; an empty Service is the whole
// tenant.
type Grant struct {
	Tenant, Service string
}

// String gives "tenant" or "tenant/service".
func (g Grant) String() string {
	if g.Service == "" {
		return g.Tenant
	}
	return g.Tenant + "/" + g.Service
}

// PortSpec is one port of a service, as callers see it.
type PortSpec struct {
	Name     string
	Port     uint16 // what callers dial
	Protocol string
	Guessed  bool // nobody said so explicitly
}

// ServiceSpec is what is wished of one service. It is immutable; an unchanged
// spec keeps its pointer so that Build can reuse its work.
type ServiceSpec struct {
	Key              Key
	Ports            []PortSpec
	Allow            []Grant
	DedicatedPool    string // "" asks for none
	Policy           string // round_robin least_request random ring_hash maglev; "" is round_robin
	HealthCheck      *HealthCheck
	OutlierDetection *OutlierDetection
	CircuitBreaker   *CircuitBreaker
	Timeout          time.Duration // of a request; 0 is Envoy's 15 s
	Retry            *Retry        // nil: Roost's default
	DrainTimeout     time.Duration // 0 is DefaultDrainTimeout
	DrainClose       bool          // TCP connections that outlive it are closed
	Origin           string        // FILE:LINE:COL, consul:NODE/ID or api
}

// DefaultDrainTimeout bounds a drain where the service says nothing.
const DefaultDrainTimeout = 30 * time.Second

// DrainTime bounds what a drain waits for.
func (s *ServiceSpec) DrainTime() time.Duration {
	if s.DrainTimeout > 0 {
		return s.DrainTimeout
	}
	return DefaultDrainTimeout
}

// HealthCheck asks Envoy to probe the endpoints itself.
type HealthCheck struct {
	HTTPPath           string // "" probes by TCP connect
	Interval, Timeout  time.Duration
	Healthy, Unhealthy uint32
}

// OutlierDetection takes an endpoint out for a while after errors.
type OutlierDetection struct {
	Consecutive5xx uint32
	EjectionTime   time.Duration
	MaxPercent     uint32
}

// CircuitBreaker bounds what is open to a service at once.
type CircuitBreaker struct {
	MaxConnections, MaxPendingRequests, MaxRequests, MaxRetries uint32
}

// Retry replaces Roost's default retry policy.
type Retry struct {
	On       []string // Envoy's conditions, or status codes
	Attempts uint32
}

// Certificate is a certificate of a public https listener.
type Certificate struct {
	CertFile, KeyFile string
	Origin            string
}

// ListenerSpec is a public listener on gateways.
type ListenerSpec struct {
	Name           string
	Address        netip.AddrPort
	Protocol       string // http https tcp tls udp
	Gateway        string // group
	RedirectFrom   string // a plain http listener whose requests are sent here
	ExternalPort   uint16 // port of the redirect; 0 is the listener's own
	Certificates   []Certificate
	TrustedProxies []netip.Prefix
	ProxyProtocol  bool
	Origin         string
}

// RouteSpec binds requests to services.
type RouteSpec struct {
	Name      string
	Tenant    string
	Listeners []string // empty: on the service's own address inside the mesh
	Hosts     []string // empty is every host
	Match     Match
	To        []Target
	Timeout   time.Duration
	Retry     *Retry
	Origin    string
}

// Match is what a request must be.
type Match struct {
	Path       string
	PathPrefix string
	PathRegex  string
	Methods    []string
	Headers    []ValueMatch
	Query      []ValueMatch
}

// ValueMatch compares one header or query parameter. With none of the
// comparisons set, presence is enough.
type ValueMatch struct {
	Name                 string
	Exact, Prefix, Regex string
	Invert               bool
}

// Target is where a share of a route's requests goes.
type Target struct {
	Service Key
	Port    string // port name; "" is the first HTTP (or first) port
	Version string // "" is every version
	Weight  uint32
}
