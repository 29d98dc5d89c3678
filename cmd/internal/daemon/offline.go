package daemon

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/discovery/file"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
)

// Offline builds the Snapshot that a config yields with the instances that it
// and its instance files list; nothing is written or started. Addresses are
// those that an empty ledger would give.
func Offline(c *config.Config) (*lb.Snapshot, certs.Pairs, error) {
	ctx := context.Background()
	l, err := ledger.Open(ctx, ledger.Memory{}, nil)
	if err != nil {
		return nil, nil, err
	}
	log := slog.New(slog.DiscardHandler)
	d := &Daemon{ledger: l, log: log, files: certs.NewFiles(log, nil), static: discovery.NewStatic(SourceConfig, nil)}
	r := newReconciler(d, time.Now)
	r.setConfig(c)
	if _, err := r.commit(ctx); err != nil {
		return nil, nil, err
	}
	instances := c.Static
	for _, path := range instanceFiles(c.InstancePath) {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, err
		}
		more, _, err := file.Parse(path, data, c.DefaultNode())
		if err != nil {
			return nil, nil, err
		}
		instances = append(instances, more...)
	}
	s := lb.Build(nil, lb.Input{Config: c.Model, Catalog: discovery.NewCatalog(instances), Services: r.specs, Addresses: r.addresses()})
	s.AddProblems(r.problems)
	return s, d.files.Pairs(), nil
}

func instanceFiles(path string) []string {
	if info, err := os.Stat(path); path == "" || err != nil || !info.IsDir() {
		if path == "" || err != nil {
			return nil
		}
		return []string{path}
	}
	matches, _ := filepath.Glob(filepath.Join(path, "*.y*ml"))
	return matches
}
