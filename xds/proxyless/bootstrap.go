package proxyless

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/roostmesh/roost/lb"
)

// bootstrap is the file that GRPC_XDS_BOOTSTRAP names.
type bootstrap struct {
	Servers []server `json:"xds_servers"`
	Node    node     `json:"node"`
}

type server struct {
	URI      string        `json:"server_uri"`
	Creds    []credentials `json:"channel_creds"`
	Features []string      `json:"server_features"`
}

type credentials struct {
	Type string `json:"type"`
}

type node struct {
	ID       string            `json:"id"`
	Cluster  string            `json:"cluster"`
	Metadata map[string]string `json:"metadata"`
}

// Bootstrap is the JSON that gRPC's libraries start with. xds is IP:PORT or
// unix:PATH.
func Bootstrap(id lb.Identity, xds string) ([]byte, error) {
	if path, unix := strings.CutPrefix(xds, "unix:"); !unix || path == "" {
		if _, err := netip.ParseAddrPort(xds); err != nil {
			return nil, fmt.Errorf("xds address %q: want IP:PORT or unix:PATH: %w", xds, err)
		}
	}
	b := bootstrap{
		Servers: []server{{URI: xds, Creds: []credentials{{Type: "insecure"}}, Features: []string{"xds_v3"}}},
		Node:    node{ID: id.String(), Cluster: id.Service + "." + id.Tenant, Metadata: map[string]string{}},
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(b); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
