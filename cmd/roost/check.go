package main

import (
	"net/http"
	"net/netip"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/cmd/internal/admin"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/host"
	"github.com/roostmesh/roost/xds/envoy"
)

func checkVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "check", Short: "This host and this daemon: what is missing, and the command that mends it", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(config.Find(o.config))
		if err != nil {
			return exit(exitBadFile, err)
		}
		if o.address == "" && os.Getenv("ROOST_ADDR") == "" {
			o.address = c.Admin.Address.String()
		}
		findings := []host.Finding{envoyFinding(cmd)}
		facts := host.Facts{Config: c, Captured: envoy.CapturePort}
		findings = append(findings, o.daemonFinding(cmd, &facts))
		findings = append(findings, host.Check(cmd.Context(), facts)...)
		if err := o.print(cmd, admin.List[host.Finding]{Items: findings}, func(t *table) {
			for _, f := range findings {
				mark := "ok"
				if !f.OK {
					mark = "NOT"
				}
				t.row(mark, f.Name, f.Detail)
				if f.Fix != "" {
					t.row("", "", "mend: "+f.Fix)
				}
			}
		}); err != nil {
			return err
		}
		if slices.ContainsFunc(findings, func(f host.Finding) bool { return !f.OK }) {
			return exit(exitFindings, nil)
		}
		return nil
	}}
	c.Flags().StringVar(&o.config, "config", "", "config file (default as for run)")
	return c
}

func envoyFinding(cmd *cobra.Command) host.Finding {
	p, err := binaries.FindEnvoy(cmd.Context(), binaries.EnvoyOptions{NoFetch: true})
	if err != nil {
		return host.Finding{Name: "envoy", Detail: err.Error(), Fix: "roost envoy downloads it (needs python3 with pip); or name one in $" + binaries.EnvoyEnv}
	}
	return host.Finding{Name: "envoy", OK: true, Detail: p.Version + " at " + p.Path}
}

// daemonFinding asks the daemon whether it is ready, and fills in what only it
// knows: services that no file declares.
func (o *options) daemonFinding(cmd *cobra.Command, f *host.Facts) host.Finding {
	for _, s := range f.Config.Model.Services {
		for _, p := range s.Ports {
			f.Ports = append(f.Ports, p.Port)
		}
	}
	c := o.client()
	if _, err := c.call(cmd.Context(), http.MethodGet, "/readyz", nil, nil); err != nil {
		return host.Finding{Name: "daemon", Detail: err.Error(), Fix: "roost run"}
	}
	list, err := fetch[admin.List[admin.Service]](cmd.Context(), c, "/api/v1/services", nil)
	if err != nil {
		return host.Finding{Name: "daemon", Detail: err.Error(), Fix: "roost run"}
	}
	for _, s := range list.Items {
		for _, p := range s.Ports {
			f.Ports = append(f.Ports, p.Port)
		}
		if s.DedicatedIP != nil {
			if a, err := netip.ParseAddr(*s.DedicatedIP); err == nil {
				f.Dedicated = append(f.Dedicated, a)
			}
		}
	}
	return host.Finding{Name: "daemon", OK: true, Detail: "is ready at " + c.base}
}
