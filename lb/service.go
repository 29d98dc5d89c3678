package lb

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/roostmesh/roost/discovery"
)

// Addresses are what the ledger has given a service.
type Addresses struct {
	Internal   netip.Addr
	Internal6  netip.Addr // invalid without an IPv6 pool
	Dedicated  netip.Addr // invalid when none was asked for or the pool is full
	Generation uint64
	Probed     bool // not the first candidate of its hash
}

// buildService joins a spec, its addresses and its instances. It returns prev
// where nothing that it depends on has changed.
func buildService(prev *Service, c *Config, spec *ServiceSpec, addr Addresses, group *discovery.Group, versions []string, drains map[string]Drain) *Service {
	if prev != nil && prev.Spec == spec && prev.Group == group && prev.addresses() == addr && slices.Equal(prev.Versions, versions) && maps.Equal(prev.Drains, drains) {
		return prev
	}
	s := &Service{
		Spec: spec, Key: spec.Key, Domain: spec.Key.Service + "." + spec.Key.Tenant + "." + c.Domain,
		Address: addr.Internal, Address6: addr.Internal6, Dedicated: addr.Dedicated,
		Generation: addr.Generation, Probed: addr.Probed, Group: group, Versions: versions, Drains: drains,
	}
	if spec.DrainClose {
		s.DrainCheck = c.DrainCheck
		if !c.DrainCheck.IsValid() {
			s.Problems = append(s.Problems, Problem{Code: "drain_close_unavailable", Severity: discovery.SeverityWarning, Object: s.Key.String(), Place: spec.Origin,
				Message: "drain.close has no effect: proxies in other network namespaces, which xds.sockets are for, cannot ask Roost whether to close; TCP connections outlive a drain until their instance stops",
				Fix:     "serve these callers by the node proxy and take xds.sockets away, or take drain.close away"})
		}
	}
	for _, p := range spec.Ports {
		s.Ports = append(s.Ports, Port{PortSpec: p, Cluster: ClusterName(spec.Key, p.Name, "")})
		if p.Protocol == UDP {
			s.Problems = append(s.Problems, Problem{Code: "protocol_unsupported", Severity: discovery.SeverityError, Object: s.Key.String(), Place: spec.Origin,
				Message: fmt.Sprintf("port %s is of protocol udp, which is not served yet: its name is answered, its address takes no datagrams", p.Name), Fix: "let callers dial the instances for this port for now"})
		}
		if p.Guessed {
			s.Problems = append(s.Problems, Problem{Code: "port_guessed", Severity: discovery.SeverityInfo, Object: s.Key.String(), Place: spec.Origin,
				Message: fmt.Sprintf("nobody says which port callers dial; %d was guessed and is kept", p.Port),
				Fix:     "register the instance with the meta roost-port, or declare the service in a file"})
		}
	}
	if group != nil {
		for _, i := range group.Instances {
			s.addEndpoint(c, i)
		}
	}
	return s
}

func (s *Service) addresses() Addresses {
	return Addresses{Internal: s.Address, Internal6: s.Address6, Dedicated: s.Dedicated, Generation: s.Generation, Probed: s.Probed}
}

func (s *Service) addEndpoint(c *Config, i *discovery.Instance) {
	e := &Endpoint{Instance: i, At: make([]netip.AddrPort, len(s.Ports)), Serving: i.Health.Serving(), Drain: s.Drains[i.QualifiedName()]}
	if i.Health == discovery.Maintenance {
		e.Drain = max(e.Drain, Draining)
	}
	if e.Drain != NotDraining {
		e.Serving, s.Draining = false, true
	}
	served := false
	for n, p := range s.Ports {
		number, ok := instancePort(i, p.Name, n == 0)
		if ok {
			e.At[n] = netip.AddrPortFrom(i.Address, number)
			served = true
		}
	}
	if !served {
		e.Serving, e.unreachable = false, true
		s.problem(i, "instance_port_missing", discovery.SeverityError, "serves none of the service's ports "+portNames(s.Ports),
			"give the instance an address with a port, or ports by the service's port names")
	}
	if i.Address.IsLoopback() && i.Node != c.Node {
		e.Serving, e.unreachable = false, true
		s.problem(i, "instance_unreachable", discovery.SeverityError,
			fmt.Sprintf("its address %s is a loopback address of node %q and reaches nothing from node %q", i.Address, i.Node, c.Node),
			"register the instance with an address that the other hosts reach")
	}
	if isBridge(i.Address) && i.Node != c.Node {
		s.problem(i, "instance_unreachable", discovery.SeverityWarning,
			fmt.Sprintf("its address %s lies in a container bridge range of node %q and may not be reached from node %q", i.Address, i.Node, c.Node),
			"register the instance with the host's address and its published port, or use a routed container network")
	}
	if i.Inbound != 0 {
		s.problem(i, "inbound_unsupported", discovery.SeverityInfo, fmt.Sprintf("names port %d as its sidecar's inbound listener, which does not exist yet; callers go to its own ports", i.Inbound),
			"nothing has to be done; take the key away until sidecars have an inbound listener")
	}
	s.wants(i)
	s.Endpoints = append(s.Endpoints, e)
}

// wants reports where a registration disagrees with what is recorded.
func (s *Service) wants(i *discovery.Instance) {
	for n, w := range i.Wants {
		if w.Guessed {
			continue
		}
		p, ok := s.PortNamed(w.Name)
		if w.Name == "" || n == 0 && len(s.Ports) > 0 {
			p, ok = &s.Ports[0], len(s.Ports) > 0
		}
		if ok && p.Port == w.Dial && p.Protocol == w.Protocol {
			continue
		}
		have := "no such port"
		if ok {
			have = fmt.Sprintf("%d/%s", p.Port, p.Protocol)
		}
		s.problem(i, "port_conflict", discovery.SeverityWarning,
			fmt.Sprintf("asks for port %s %d/%s, but the service has %s, which stays", w.Name, w.Dial, w.Protocol, have),
			"change it with `roost service set` or in the file that declares the service, or mend the registration's meta")
	}
}

func (s *Service) problem(i *discovery.Instance, code, severity, message, fix string) {
	s.Problems = append(s.Problems, Problem{Code: code, Severity: severity, Object: i.QualifiedName(), Place: i.Origin, Message: message, Fix: fix})
}

func instancePort(i *discovery.Instance, name string, first bool) (uint16, bool) {
	for _, p := range i.Ports {
		if p.Name == name || p.Name == "" && first {
			return p.Number, true
		}
	}
	return 0, false
}

func portNames(ports []Port) string {
	out := "("
	for n, p := range ports {
		if n > 0 {
			out += ", "
		}
		out += p.Name
	}
	return out + ")"
}

// dockerBridge is the range of the default bridge of Docker and Podman hosts:
// 172.17.0.0/16 to 172.31.0.0/16 are what its address pool hands out first.
var dockerBridge = netip.MustParsePrefix("172.16.0.0/12")

func isBridge(a netip.Addr) bool { return dockerBridge.Contains(a.Unmap()) }

// SameAddresses tells whether both have the same addresses.
func (s *Service) SameAddresses(o *Service) bool { return s.addresses() == o.addresses() }
