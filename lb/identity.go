package lb

import (
	"fmt"
	"net/url"
	"strings"
)

// Role is what kind of Envoy a proxy is.
type Role string

// The roles of the contract.
const (
	Sidecar Role = "sidecar"
	Node    Role = "node"
	Gateway Role = "gateway"
)

// Identity is who a proxy says it is by its node id. It is not proven: the xDS
// port is loopback only until enrolment exists.
type Identity struct {
	Role     Role
	Tenant   string // sidecar
	Service  string // sidecar
	Instance string // sidecar
	Node     string // node; sidecar where given
	Group    string // gateway
	Member   string // gateway
}

// ParseIdentity reads a node id: sidecar~TENANT~SERVICE~ID[@NODE], node~HOST,
// gateway~GROUP~MEMBER; "~ % @ /" inside a part are percent-encoded.
func ParseIdentity(id string) (Identity, error) {
	parts := strings.Split(id, "~")
	for i, p := range parts {
		if p == "" {
			return Identity{}, fmt.Errorf("node id %q: part %d is empty; want sidecar~TENANT~SERVICE~ID, node~HOST or gateway~GROUP~MEMBER", id, i+1)
		}
	}
	switch {
	case parts[0] == string(Sidecar) && len(parts) == 4:
		instance, node, on := strings.Cut(parts[3], "@")
		if instance == "" || on && node == "" || strings.Contains(node, "@") {
			return Identity{}, fmt.Errorf("node id %q: %q is no ID[@NODE]", id, parts[3])
		}
		return unescape(Identity{Role: Sidecar, Tenant: parts[1], Service: parts[2], Instance: instance, Node: node})
	case parts[0] == string(Node) && len(parts) == 2:
		return unescape(Identity{Role: Node, Node: parts[1]})
	case parts[0] == string(Gateway) && len(parts) == 3:
		return unescape(Identity{Role: Gateway, Group: parts[1], Member: parts[2]})
	}
	return Identity{}, fmt.Errorf("node id %q: want sidecar~TENANT~SERVICE~ID, node~HOST or gateway~GROUP~MEMBER", id)
}

func unescape(i Identity) (Identity, error) {
	for _, p := range []*string{&i.Tenant, &i.Service, &i.Instance, &i.Node, &i.Group, &i.Member} {
		s, err := url.PathUnescape(*p)
		if err != nil {
			return Identity{}, fmt.Errorf("node id part %q: %w", *p, err)
		}
		*p = s
	}
	return i, nil
}

var escaper = strings.NewReplacer("%", "%25", "~", "%7E", "@", "%40", "/", "%2F")

// String is the node id.
func (i Identity) String() string {
	e := escaper.Replace
	switch i.Role {
	case Sidecar:
		id := "sidecar~" + e(i.Tenant) + "~" + e(i.Service) + "~" + e(i.Instance)
		if i.Node != "" {
			id += "@" + e(i.Node)
		}
		return id
	case Gateway:
		return "gateway~" + e(i.Group) + "~" + e(i.Member)
	default:
		return "node~" + e(i.Node)
	}
}
