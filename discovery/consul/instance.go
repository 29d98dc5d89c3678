package consul

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/discovery"
)

// Meta keys of a registration, as the contract names them.
const (
	metaService  = "roost-service"
	metaPort     = "roost-port"
	metaPortName = "roost-port-name"
	metaProtocol = "roost-protocol"
	metaZone     = "roost-zone"
	metaInbound  = "roost-inbound"
	metaVersion  = "version"
	metaPorts    = "roost-port-" // NAME = DIAL[:INSTANCE_PORT][/PROTOCOL]
)

const httpPort = 80

var (
	label     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	protocols = []string{"tcp", "http", "http2", "grpc", "tls", "udp"}
)

// reader turns one registration into an Instance.
type reader struct {
	s        *Source
	e        *api.ServiceEntry
	i        discovery.Instance
	problems []discovery.Problem
	failed   bool
}

// instances are the members among a service's registrations. One that cannot
// be used is a Problem; the others are served.
func (s *Source) instances(entries []*api.ServiceEntry) ([]discovery.Instance, []discovery.Problem) {
	var out []discovery.Instance
	var problems []discovery.Problem
	for _, e := range entries {
		tenant := cmp.Or(e.Service.Meta[s.config.TenantMeta], s.config.DefaultTenant)
		if tenant == "" || e.Service.Kind != api.ServiceKindTypical {
			continue
		}
		r := reader{s: s, e: e}
		r.read(tenant)
		problems = append(problems, r.problems...)
		if !r.failed {
			out = append(out, r.i)
		}
	}
	return out, problems
}

func (r *reader) read(tenant string) {
	e := r.e
	r.i = discovery.Instance{ID: e.Service.ID, Node: e.Node.Node, Key: discovery.Key{Tenant: tenant, Service: cmp.Or(e.Service.Meta[metaService], e.Service.Service)},
		Zone: e.Service.Meta[metaZone], Version: e.Service.Meta[metaVersion], Health: health(e.Checks), Origin: "consul:" + e.Node.Node + "/" + e.Service.ID}
	if !label.MatchString(tenant) || tenant == "dedicated" {
		r.fail("instance_invalid", r.s.config.TenantMeta, fmt.Sprintf("tenant %q is no tenant name", tenant), "use a lower-case DNS label, and not \"dedicated\"")
	}
	if !label.MatchString(r.i.Key.Service) {
		r.fail("instance_invalid", metaService, fmt.Sprintf("%q is no service name", r.i.Key.Service), "name the service in the meta "+metaService+" by a lower-case DNS label")
	}
	r.i.NodeDown = r.i.Health == discovery.Critical && nodeDown(e.Checks)
	r.address()
	r.weight()
	r.ports()
	if n, ok := r.number(metaInbound); ok {
		r.i.Inbound = n
	}
}

func (r *reader) problem(code, place, message, fix string) {
	r.problems = append(r.problems, discovery.Problem{Code: code, Severity: discovery.SeverityError, Object: r.i.QualifiedName(), Place: strings.TrimSuffix(r.i.Origin+" "+place, " "), Message: message, Fix: fix})
}

// fail leaves the instance out.
func (r *reader) fail(code, place, message, fix string) {
	r.failed = true
	r.problem(code, place, message+"; this instance is left out", fix)
}

func (r *reader) address() {
	text := cmp.Or(r.e.Service.Address, r.e.Node.Address)
	a, err := netip.ParseAddr(text)
	if err != nil || a.IsUnspecified() || a.IsMulticast() {
		r.fail("instance_address_invalid", "Address", fmt.Sprintf("address %q is no IP of one instance", text), "register the instance with an IP; names are not looked up")
	}
	r.i.Address = a.Unmap().WithZone("")
	if n, err := netip.ParseAddr(r.e.Node.Address); err == nil {
		r.i.NodeAddress = n.Unmap().WithZone("")
	}
}

const maxWeight = 65535 // Consul's own limit

func (r *reader) weight() {
	w := r.e.Service.Weights.Passing
	if r.i.Health == discovery.Warning {
		w = r.e.Service.Weights.Warning
	}
	r.i.Weight = uint32(min(max(w, 1), maxWeight))
}

// ports reads what callers dial and where the instance serves it.
func (r *reader) ports() {
	meta := r.e.Service.Meta
	protocol := cmp.Or(meta[metaProtocol], "tcp")
	if !slices.Contains(protocols, protocol) {
		r.fail("instance_invalid", metaProtocol, fmt.Sprintf("%q is none of %s", protocol, strings.Join(protocols, ", ")), "mend the meta")
		return
	}
	name := cmp.Or(meta[metaPortName], protocol)
	if !label.MatchString(name) {
		r.fail("instance_invalid", metaPortName, fmt.Sprintf("%q is no port name", name), "use a lower-case DNS label")
		return
	}
	own := r.e.Service.Port
	if own < 1 || own > 65535 {
		r.fail("instance_invalid", "Port", fmt.Sprintf("port %d is no port to dial", own), "register the instance with the port that it serves")
		return
	}
	want := discovery.WantedPort{Name: name, Protocol: protocol, Dial: uint16(own), Guessed: true}
	if protocol == "http" || protocol == "http2" || protocol == "grpc" {
		want.Dial, want.Guessed = httpPort, false
	}
	if n, ok := r.number(metaPort); ok {
		want.Dial, want.Guessed = n, false
	}
	r.i.Ports = append(r.i.Ports, discovery.Port{Name: name, Number: uint16(own)})
	r.i.Wants = append(r.i.Wants, want)
	for _, key := range slices.Sorted(maps.Keys(meta)) {
		if further, ok := strings.CutPrefix(key, metaPorts); ok && key != metaPortName {
			r.further(key, further, meta[key])
		}
	}
}

// further reads roost-port-NAME = DIAL[:INSTANCE_PORT][/PROTOCOL].
func (r *reader) further(key, name, value string) {
	numbers, protocol, explicit := strings.Cut(value, "/")
	if !explicit {
		protocol = "tcp"
		if slices.Contains(protocols, name) {
			protocol = name
		}
	}
	dialText, ownText, both := strings.Cut(numbers, ":")
	dial, err := strconv.ParseUint(dialText, 10, 16)
	own := dial
	if both && err == nil {
		own, err = strconv.ParseUint(ownText, 10, 16)
	}
	if err != nil || dial == 0 || own == 0 || !label.MatchString(name) || !slices.Contains(protocols, protocol) {
		r.problem("port_invalid", key, fmt.Sprintf("%q is not DIAL[:INSTANCE_PORT][/PROTOCOL]; this port is left out", value), "write it like 9090, 9090:31877 or 9090:31877/grpc")
		return
	}
	if slices.ContainsFunc(r.i.Ports, func(p discovery.Port) bool { return p.Name == name }) {
		r.problem("port_invalid", key, fmt.Sprintf("port %q is there already; this one is left out", name), "give it another name")
		return
	}
	r.i.Ports = append(r.i.Ports, discovery.Port{Name: name, Number: uint16(own)})
	r.i.Wants = append(r.i.Wants, discovery.WantedPort{Name: name, Dial: uint16(dial), Protocol: protocol})
}

// number reads a port from the meta; what is no port is a Problem and counts
// as absent.
func (r *reader) number(key string) (uint16, bool) {
	text, ok := r.e.Service.Meta[key]
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		r.problem("port_invalid", key, fmt.Sprintf("%q is no port; it counts as absent", text), "write a number from 1 to 65535")
		return 0, false
	}
	return uint16(n), true
}

// health is the worst of the instance's and its node's checks; maintenance of
// either drains.
func health(checks api.HealthChecks) discovery.Health {
	switch checks.AggregatedStatus() {
	case api.HealthMaint:
		return discovery.Maintenance
	case api.HealthCritical:
		return discovery.Critical
	case api.HealthWarning:
		return discovery.Warning
	}
	return discovery.Passing
}

// serfHealth is the check by which the servers say that a node cannot be reached.
const serfHealth = "serfHealth"

func nodeDown(checks api.HealthChecks) bool {
	return slices.ContainsFunc(checks, func(c *api.HealthCheck) bool {
		return c.CheckID == serfHealth && c.ServiceID == "" && c.Status == api.HealthCritical
	})
}
