package config

import (
	"net/netip"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/roostmesh/roost/discovery/file"
	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
)

// The types of this file mirror roost.yaml key by key; typed.go turns them into
// what the rest of Roost uses, and the JSON Schema is made from them.

type document struct {
	strict.Place

	Domain      string               `yaml:"domain"`
	Datacenter  string               `yaml:"datacenter"`
	Node        string               `yaml:"node"`
	TrustDomain string               `yaml:"trust_domain"`
	DataDir     string               `yaml:"data_dir"`
	Admin       adminDoc             `yaml:"admin"`
	XDS         xdsDoc               `yaml:"xds"`
	Log         logDoc               `yaml:"log"`
	AccessLog   accessLogDoc         `yaml:"access_log"`
	DNS         dnsDoc               `yaml:"dns"`
	Discovery   discoveryDoc         `yaml:"discovery"`
	Store       storeDoc             `yaml:"store"`
	Addresses   addressesDoc         `yaml:"addresses"`
	Capture     captureDoc           `yaml:"capture"`
	Loopback    string               `yaml:"loopback"`
	Tenants     map[string]tenantDoc `yaml:"tenants"`
	Services    []serviceDoc         `yaml:"services"`
	Listeners   []listenerDoc        `yaml:"listeners"`
	Routes      []routeDoc           `yaml:"routes"`
	Include     []string             `yaml:"include"`
}

type adminDoc struct {
	strict.Place
	Address string `yaml:"address"`
	Socket  string `yaml:"socket"`
}

type xdsDoc struct {
	strict.Place
	Address  string      `yaml:"address"`
	Sockets  []socketDoc `yaml:"sockets"`
	Insecure bool        `yaml:"insecure"`
}

type socketDoc struct {
	strict.Place
	Path   string `yaml:"path"`
	Tenant string `yaml:"tenant"`
	Mode   string `yaml:"mode"`
	Group  string `yaml:"group"`
}

type logDoc struct {
	strict.Place
	Level  string `yaml:"level"`
	Format string `yaml:"format"`
}

type accessLogDoc struct {
	strict.Place
	Format  string `yaml:"format"`
	Proxies string `yaml:"proxies"`
	Errors  string `yaml:"errors"`
}

type dnsDoc struct {
	strict.Place
	Addresses []dnsAddressDoc `yaml:"addresses"`
	TTL       time.Duration   `yaml:"ttl"`
	Forward   []forwardDoc    `yaml:"forward"`
}

// dnsAddressDoc is "IP:PORT" or {address, tenant}.
type dnsAddressDoc struct {
	strict.Place
	Address string `yaml:"address"`
	Tenant  string `yaml:"tenant"`
}

func (a *dnsAddressDoc) DecodeYAML(d *strict.Decoding, n *yaml.Node, path string) {
	if n.Kind == yaml.ScalarNode {
		a.Place = d.Place(n, path)
		d.Into(n, &a.Address, path)
		return
	}
	type plain dnsAddressDoc
	d.Into(n, (*plain)(a), path)
}

// forwardDoc is a file, "IP:PORT", or {zone, to}.
type forwardDoc struct {
	strict.Place
	Zone string   `yaml:"zone"`
	To   []string `yaml:"to"`
}

func (f *forwardDoc) DecodeYAML(d *strict.Decoding, n *yaml.Node, path string) {
	if n.Kind == yaml.ScalarNode {
		f.Place = d.Place(n, path)
		f.To = make([]string, 1)
		d.Into(n, &f.To[0], path)
		return
	}
	type plain forwardDoc
	d.Into(n, (*plain)(f), path)
}

type discoveryDoc struct {
	strict.Place
	Consul *consulDoc `yaml:"consul"`
	File   *fileDoc   `yaml:"file"`
}

type consulDoc struct {
	strict.Place
	Address        string  `yaml:"address"`
	TokenFile      string  `yaml:"token_file"`
	DefaultTenant  string  `yaml:"default_tenant"`
	TenantMeta     string  `yaml:"tenant_meta"`
	MaxConnections uint32  `yaml:"max_connections"`
	TLS            *tlsDoc `yaml:"tls"`
}

type tlsDoc struct {
	strict.Place
	CAFile     string `yaml:"ca_file"`
	CertFile   string `yaml:"cert_file"`
	KeyFile    string `yaml:"key_file"`
	ServerName string `yaml:"server_name"`
}

type fileDoc struct {
	strict.Place
	Path string `yaml:"path"`
}

type storeDoc struct {
	strict.Place
	Consul *struct {
		strict.Place
		Prefix string `yaml:"prefix"`
	} `yaml:"consul"`
}

type addressesDoc struct {
	strict.Place
	Internal   stringList              `yaml:"internal"`
	Quarantine time.Duration           `yaml:"quarantine"`
	Dedicated  map[string]dedicatedDoc `yaml:"dedicated"`
}

// stringList is one string or a list of them.
type stringList []string

func (s *stringList) DecodeYAML(d *strict.Decoding, n *yaml.Node, path string) {
	if n.Kind == yaml.ScalarNode {
		*s = make(stringList, 1)
		d.Into(n, &(*s)[0], path)
		return
	}
	d.Into(n, (*[]string)(s), path)
}

type dedicatedDoc struct {
	strict.Place
	CIDR      string `yaml:"cidr"`
	Interface string `yaml:"interface"`
}

type captureDoc struct {
	strict.Place
	Node    string `yaml:"node"`
	Sidecar string `yaml:"sidecar"`
}

type tenantDoc struct {
	strict.Place
	Clients []clientDoc `yaml:"clients"`
	Hosts   []string    `yaml:"hosts"`
}

// clientDoc is a CIDR or {cidr, node}.
type clientDoc struct {
	strict.Place
	CIDR string `yaml:"cidr"`
	Node string `yaml:"node"`
}

func (c *clientDoc) DecodeYAML(d *strict.Decoding, n *yaml.Node, path string) {
	if n.Kind == yaml.ScalarNode {
		c.Place = d.Place(n, path)
		d.Into(n, &c.CIDR, path)
		return
	}
	type plain clientDoc
	d.Into(n, (*plain)(c), path)
}

// serviceKeys are what `PUT /api/v1/services/{tenant}/{service}` takes.
type serviceKeys struct {
	Ports            []portDoc       `yaml:"ports"`
	Allow            []string        `yaml:"allow"`
	DedicatedIP      *dedicatedIPDoc `yaml:"dedicated_ip"`
	LoadBalancing    *balancingDoc   `yaml:"load_balancing"`
	HealthCheck      *healthDoc      `yaml:"health_check"`
	OutlierDetection *outlierDoc     `yaml:"outlier_detection"`
	CircuitBreaker   *breakerDoc     `yaml:"circuit_breaker"`
	Timeout          time.Duration   `yaml:"timeout"`
	Retry            *retryDoc       `yaml:"retry"`
	Drain            *drainDoc       `yaml:"drain"`
}

type serviceDoc struct {
	strict.Place
	Name   string `yaml:"name"`
	Tenant string `yaml:"tenant"`
	serviceKeys
	Instances []file.Row `yaml:"instances"`
}

type serviceBody struct {
	strict.Place
	serviceKeys
}

type portDoc struct {
	strict.Place
	Name     string `yaml:"name"`
	Port     uint16 `yaml:"port"`
	Protocol string `yaml:"protocol"`
}

type dedicatedIPDoc struct {
	strict.Place
	Pool string `yaml:"pool"`
}

type balancingDoc struct {
	strict.Place
	Policy string `yaml:"policy"`
}

type healthDoc struct {
	strict.Place
	HTTP *struct {
		strict.Place
		Path string `yaml:"path"`
	} `yaml:"http"`
	TCP *struct {
		strict.Place
	} `yaml:"tcp"`
	Interval  time.Duration `yaml:"interval"`
	Timeout   time.Duration `yaml:"timeout"`
	Healthy   uint32        `yaml:"healthy_threshold"`
	Unhealthy uint32        `yaml:"unhealthy_threshold"`
}

type outlierDoc struct {
	strict.Place
	Consecutive5xx uint32        `yaml:"consecutive_5xx"`
	EjectionTime   time.Duration `yaml:"ejection_time"`
	MaxPercent     uint32        `yaml:"max_ejection_percent"`
}

type breakerDoc struct {
	strict.Place
	MaxConnections     uint32 `yaml:"max_connections"`
	MaxPendingRequests uint32 `yaml:"max_pending_requests"`
	MaxRequests        uint32 `yaml:"max_requests"`
	MaxRetries         uint32 `yaml:"max_retries"`
}

type retryDoc struct {
	strict.Place
	On       []string `yaml:"on"`
	Attempts uint32   `yaml:"attempts"`
}

type drainDoc struct {
	strict.Place
	Timeout time.Duration `yaml:"timeout"`
	Close   bool          `yaml:"close"`
}

type listenerDoc struct {
	strict.Place
	Name           string           `yaml:"name"`
	Address        string           `yaml:"address"`
	Protocol       string           `yaml:"protocol"`
	Gateway        string           `yaml:"gateway"`
	RedirectFrom   string           `yaml:"redirect_from"`
	ExternalPort   uint16           `yaml:"external_port"`
	Certificates   []certificateDoc `yaml:"certificates"`
	TrustedProxies []string         `yaml:"trusted_proxies"`
	ProxyProtocol  bool             `yaml:"proxy_protocol"`
}

type certificateDoc struct {
	strict.Place
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

type routeDoc struct {
	strict.Place
	Name      string        `yaml:"name"`
	Tenant    string        `yaml:"tenant"`
	Listeners []string      `yaml:"listeners"`
	Hosts     []string      `yaml:"hosts"`
	Match     matchDoc      `yaml:"match"`
	To        []targetDoc   `yaml:"to"`
	Timeout   time.Duration `yaml:"timeout"`
	Retry     *retryDoc     `yaml:"retry"`
}

type matchDoc struct {
	strict.Place
	Path       string     `yaml:"path"`
	PathPrefix string     `yaml:"path_prefix"`
	PathRegex  string     `yaml:"path_regex"`
	Methods    []string   `yaml:"methods"`
	Headers    []valueDoc `yaml:"headers"`
	Query      []valueDoc `yaml:"query"`
}

type valueDoc struct {
	strict.Place
	Name   string `yaml:"name"`
	Exact  string `yaml:"exact"`
	Prefix string `yaml:"prefix"`
	Regex  string `yaml:"regex"`
	Invert bool   `yaml:"invert"`
}

type targetDoc struct {
	strict.Place
	Service string  `yaml:"service"`
	Tenant  string  `yaml:"tenant"`
	Port    string  `yaml:"port"`
	Version string  `yaml:"version"`
	Weight  *uint32 `yaml:"weight"`
}

func parseGrant(s string) lb.Grant {
	tenant, service, _ := strings.Cut(s, "/")
	return lb.Grant{Tenant: tenant, Service: service}
}

func splitHostPort(s string) (netip.AddrPort, error) {
	if rest, ok := strings.CutPrefix(s, ":"); ok {
		s = "0.0.0.0:" + rest
	}
	if rest, ok := strings.CutPrefix(s, "localhost:"); ok {
		s = "127.0.0.1:" + rest
	}
	return netip.ParseAddrPort(s)
}
