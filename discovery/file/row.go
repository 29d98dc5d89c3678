package file

import (
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/discovery/strict"
)

// Row is one instance as a file writes it.
type Row struct {
	strict.Place

	Tenant  string            `yaml:"tenant"`
	Service string            `yaml:"service"`
	ID      string            `yaml:"id"`
	Address string            `yaml:"address"` // IP or IP:PORT
	Ports   map[string]uint16 `yaml:"ports"`
	Node    string            `yaml:"node"`
	Weight  uint32            `yaml:"weight"`
	Zone    string            `yaml:"zone"`
	Version string            `yaml:"version"`
	Inbound uint16            `yaml:"inbound"`
	Health  string            `yaml:"health"`
}

const maxWeight = 1000 // Envoy adds the weights of a locality up in 32 bits

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Instance turns the row into an Instance of the service key.
func (r Row) Instance(key discovery.Key, node string) (discovery.Instance, strict.Errors) {
	i := discovery.Instance{ID: r.ID, Key: key, Node: r.Node, Zone: r.Zone, Version: r.Version, Weight: max(r.Weight, 1), Inbound: r.Inbound, Health: discovery.Unknown, Origin: r.String()}
	if i.Node == "" {
		i.Node = node
	}
	var errs strict.Errors
	bad := func(key, format string, args ...any) { errs = append(errs, r.Errorf(key, format, args...)) }
	if r.ID == "" {
		bad("id", "is missing; give the instance a name that is unique on its node")
	}
	for _, part := range []struct{ key, value string }{{"tenant", key.Tenant}, {"service", key.Service}} {
		if !label.MatchString(part.value) {
			bad(part.key, "%q is not a lower-case DNS label (a-z, 0-9, -)", part.value)
		}
	}
	r.addresses(&i, bad)
	if r.Weight > maxWeight {
		bad("weight", "%d is more than %d", r.Weight, maxWeight)
	}
	switch h := discovery.Health(r.Health); h {
	case "":
	case discovery.Passing, discovery.Warning, discovery.Critical, discovery.Maintenance:
		i.Health = h
	default:
		bad("health", "%q is none of passing, warning, critical, maintenance", r.Health)
	}
	if i.Node == "" && i.Address.IsLoopback() {
		bad("node", "is missing, and %s is a loopback address: say on which node it is", i.Address)
	}
	return i, errs
}

func (r Row) addresses(i *discovery.Instance, bad func(key, format string, args ...any)) {
	if a, err := netip.ParseAddr(r.Address); err == nil {
		i.Address = a.Unmap()
		if len(r.Ports) == 0 {
			bad("address", "%q has no port; write IP:PORT, or name the ports under ports", r.Address)
		}
	} else if ap, err := netip.ParseAddrPort(r.Address); err == nil {
		i.Address = ap.Addr().Unmap()
		i.Ports = append(i.Ports, discovery.Port{Number: ap.Port()})
		if ap.Port() == 0 {
			bad("address", "port 0 is no port to dial")
		}
	} else {
		bad("address", "%q is neither IP nor IP:PORT (host names are not looked up)", r.Address)
		return
	}
	if i.Address.Zone() != "" || i.Address.IsUnspecified() || i.Address.IsMulticast() {
		bad("address", "%s is no address of one instance", i.Address)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Ports)) {
		if r.Ports[name] == 0 {
			bad("ports", "%s: port %s is no port to dial", name, strconv.Itoa(0))
		}
		i.Ports = append(i.Ports, discovery.Port{Name: name, Number: r.Ports[name]})
	}
}
