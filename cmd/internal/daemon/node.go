package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/discovery/consul"
)

const (
	nodeFile    = "node"
	nodeTimeout = 2 * time.Second
)

// NodeName is this host's name where the file does not say it: that of the
// Consul agent, which is written down so that a start without Consul has the
// same one; "" leaves the host name.
func NodeName(ctx context.Context) func(*config.Config) string {
	return func(c *config.Config) string {
		if c.Consul == nil {
			return ""
		}
		path := filepath.Join(c.DataDir, nodeFile)
		ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
		defer cancel()
		if source, err := consul.New(consulConfig(c.Consul)); err == nil {
			if name, err := source.NodeName(ctx); err == nil && name != "" {
				if os.MkdirAll(c.DataDir, 0o700) == nil {
					_ = os.WriteFile(path, []byte(name+"\n"), 0o600) // without it a start without Consul takes the host name
				}
				return name
			}
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(data))
	}
}

func consulConfig(k *config.Consul) consul.Config {
	return consul.Config{
		Name: SourceConsul, Address: k.Address, TokenFile: k.TokenFile, DefaultTenant: k.DefaultTenant, TenantMeta: k.TenantMeta, MaxConnections: k.MaxConnections,
		CAFile: k.CAFile, CertFile: k.CertFile, KeyFile: k.KeyFile, ServerName: k.ServerName,
	}
}
