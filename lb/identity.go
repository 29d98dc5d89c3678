package lb

import (
	"fmt"
	"net/url"
	"strings"
)

// Role is what kind of proxy a client of the control plane is.
type Role string

// The roles of the contract.
const (
	Sidecar Role = "sidecar"
	Node    Role = "node"
	Gateway Role = "gateway"
	// Proxyless is an application whose own gRPC library calls services without
	// an Envoy between.
	Proxyless Role = "grpc"
)

const nodeIDs = "want sidecar~TENANT~SERVICE~ID, node~HOST, gateway~GROUP~MEMBER or grpc~TENANT~SERVICE~ID"

// Identity is who a proxy says it is by its node id. It is not proven: the xDS
// port is loopback only until enrolment exists.
type Identity struct {
	Role     Role
	Tenant   string // sidecar, grpc
	Service  string // sidecar, grpc
	Instance string // sidecar, grpc
	Node     string // node; sidecar and grpc where given
	Group    string // gateway
	Member   string // gateway
}

// Beside says that the proxy acts for one instance, and sees what its service
// may call.
func (i Identity) Beside() bool { return i.Role == Sidecar || i.Role == Proxyless }

// ParseIdentity reads a node id: sidecar~TENANT~SERVICE~ID[@NODE], node~HOST,
// gateway~GROUP~MEMBER, grpc~TENANT~SERVICE~ID[@NODE]; "~ % @ /" inside a part
// are percent-encoded.
func ParseIdentity(id string) (Identity, error) {
	parts := strings.Split(id, "~")
	for i, p := range parts {
		if p == "" {
			return Identity{}, fmt.Errorf("node id %q: part %d is empty; "+nodeIDs, id, i+1)
		}
	}
	switch {
	case (parts[0] == string(Sidecar) || parts[0] == string(Proxyless)) && len(parts) == 4:
		instance, node, on := strings.Cut(parts[3], "@")
		if instance == "" || on && node == "" || strings.Contains(node, "@") {
			return Identity{}, fmt.Errorf("node id %q: %q is no ID[@NODE]", id, parts[3])
		}
		return unescape(Identity{Role: Role(parts[0]), Tenant: parts[1], Service: parts[2], Instance: instance, Node: node})
	case parts[0] == string(Node) && len(parts) == 2:
		return unescape(Identity{Role: Node, Node: parts[1]})
	case parts[0] == string(Gateway) && len(parts) == 3:
		return unescape(Identity{Role: Gateway, Group: parts[1], Member: parts[2]})
	}
	return Identity{}, fmt.Errorf("node id %q: "+nodeIDs, id)
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
	case Sidecar, Proxyless:
		id := string(i.Role) + "~" + e(i.Tenant) + "~" + e(i.Service) + "~" + e(i.Instance)
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
