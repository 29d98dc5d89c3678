package main

import (
	"bytes"
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// translated is one xDS resource of a config.
type translated struct {
	Type     string          `json:"type"`
	Name     string          `json:"name"`
	Version  string          `json:"version"`
	Resource json.RawMessage `json:"resource"`
}

func translateVerb(o *options) *cobra.Command {
	var proxy string
	c := &cobra.Command{Use: "translate", Short: "The xDS resources that a config yields, as JSON", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := load(o.config)
		if err != nil {
			return err
		}
		snapshot, pairs, err := daemon.Offline(c)
		if err != nil {
			return exit(exitFailed, err)
		}
		world := envoy.Translate(nil, snapshot, pairs)
		ids := []lb.Identity{{Role: lb.Node, Node: c.Model.Node}}
		for _, l := range snapshot.Listeners {
			ids = append(ids, lb.Identity{Role: lb.Gateway, Group: l.Spec.Gateway, Member: c.Model.Node})
		}
		if proxy != "" {
			id, err := lb.ParseIdentity(proxy)
			if err != nil {
				return exit(exitUsage, err)
			}
			ids = []lb.Identity{id}
		}
		items := []translated{}
		seen := map[envoy.Name]bool{}
		for _, id := range ids {
			for r := range world.Everything(id) {
				if seen[r.Name] {
					continue
				}
				seen[r.Name] = true
				item, err := shown(r)
				if err != nil {
					return exit(exitFailed, err)
				}
				items = append(items, item)
			}
		}
		e := json.NewEncoder(cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(map[string]any{"items": items})
	}}
	c.Flags().StringVar(&o.config, "config", "", "config file (default as for run)")
	c.Flags().StringVar(&proxy, "proxy", "", "only what the proxy of this node id gets")
	return c
}

// shown is a resource for people; a secret is named, its keys are not shown.
func shown(r *envoy.Resource) (translated, error) {
	out := translated{Type: r.Type.String(), Name: r.Name.Name, Version: r.Version, Resource: json.RawMessage("null")}
	if r.Type == envoy.Secret {
		return out, nil
	}
	data, err := r.JSON()
	if err != nil {
		return out, err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, data); err != nil {
		return out, err
	}
	out.Resource = compact.Bytes()
	return out, nil
}
