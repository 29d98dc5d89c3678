package consul

import (
	"context"
	"errors"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/discovery"
)

type Config struct {
	Name, Address, TokenFile, DefaultTenant, TenantMeta string
	MaxConnections                                      int
	CAFile, CertFile, KeyFile, ServerName               string
	Log                                                 *slog.Logger
	Registerer                                          prometheus.Registerer
}
type Source struct{ c Config }

func New(c Config) (*Source, error) { return &Source{c}, nil }
func (s *Source) Name() string      { return s.c.Name }
func (s *Source) Run(ctx context.Context, emit func(discovery.Update)) error {
	return errors.New("skeleton")
}
