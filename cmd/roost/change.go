package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/internal/admin"
)

func serviceVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "service", Short: "One service: show, create, set, delete"}
	c.AddCommand(
		&cobra.Command{Use: "show TENANT/NAME", Short: "One service", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			path, err := servicePath(args[0])
			if err != nil {
				return err
			}
			s, err := fetch[admin.Service](cmd.Context(), o.client(), path, nil)
			if err != nil {
				return err
			}
			return o.printService(cmd, s)
		}},
		o.putVerb("create TENANT/NAME", "Make a service: its name and address exist from now on", false),
		o.putVerb("set TENANT/NAME", "Change a service that no file declares", true),
		&cobra.Command{Use: "delete TENANT/NAME", Short: "Delete a service; its address is reserved for it for a while", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			path, err := servicePath(args[0])
			if err != nil {
				return err
			}
			data, err := o.client().call(cmd.Context(), http.MethodDelete, path, nil, nil)
			if err != nil {
				return err
			}
			var a admin.Address
			if err := json.Unmarshal(data, &a); err != nil {
				return exit(exitFailed, err)
			}
			return o.print(cmd, a, func(t *table) { t.row("deleted", args[0]); t.row("address", a.Address, a.State) })
		}},
	)
	return c
}

func servicePath(name string) (string, error) {
	tenant, service, ok := strings.Cut(name, "/")
	if !ok || tenant == "" || service == "" || strings.Contains(service, "/") {
		return "", usage("%q is not TENANT/NAME", name)
	}
	return "/api/v1/services/" + url.PathEscape(tenant) + "/" + url.PathEscape(service), nil
}

func (o *options) printService(cmd *cobra.Command, s admin.Service) error {
	return o.print(cmd, s, func(t *table) {
		t.row("service", s.Tenant+"/"+s.Name)
		t.row("domain", s.Domain)
		t.row("address", s.Address)
		t.row("dedicated ip", s.DedicatedIP)
		for _, p := range s.Ports {
			t.row("port "+p.Name, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
		}
		t.row("allow", s.Allow)
		t.row("instances", fmt.Sprintf("%d, %d take traffic", s.Instances.Total, s.Instances.Healthy))
		t.row("origin", s.Origin)
		t.row("generation", s.Generation)
	})
}

// servicePut is the part of a service that the flags can say.
type servicePut struct {
	Ports       []admin.Port `json:"ports,omitempty"`
	Allow       []string     `json:"allow,omitempty"`
	DedicatedIP *struct {
		Pool string `json:"pool"`
	} `json:"dedicated_ip,omitempty"`
}

// putVerb is `create`, or `set`, which keeps what no flag names.
func (o *options) putVerb(use, short string, change bool) *cobra.Command {
	var portFlags, allow []string
	var pool string
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		path, err := servicePath(args[0])
		if err != nil {
			return err
		}
		var put servicePut
		if change {
			now, err := fetch[admin.Service](cmd.Context(), o.client(), path, nil)
			if err != nil {
				return err
			}
			put.Ports, put.Allow = now.Ports, now.Allow
		}
		for i, f := range portFlags {
			p, err := parsePort(f)
			if err != nil {
				return err
			}
			if i == 0 {
				put.Ports = nil
			}
			put.Ports = append(put.Ports, p)
		}
		if cmd.Flags().Changed("allow") {
			put.Allow = allow
		}
		if pool != "" {
			put.DedicatedIP = &struct {
				Pool string `json:"pool"`
			}{pool}
		}
		body, err := json.Marshal(put)
		if err != nil {
			return err
		}
		data, err := o.client().call(cmd.Context(), http.MethodPut, path, nil, body)
		if err != nil {
			return err
		}
		var s admin.Service
		if err := json.Unmarshal(data, &s); err != nil {
			return exit(exitFailed, err)
		}
		return o.printService(cmd, s)
	}}
	c.Flags().StringArrayVar(&portFlags, "port", nil, "PORT[:PROTOCOL[:NAME]] that callers dial; may be repeated (default protocol tcp, the name is the protocol)")
	c.Flags().StringArrayVar(&allow, "allow", nil, "TENANT or TENANT/SERVICE that may call it, too; may be repeated")
	c.Flags().StringVar(&pool, "dedicated-pool", "", "give it a dedicated IP of this pool")
	return c
}

func parsePort(s string) (admin.Port, error) {
	parts := strings.Split(s, ":")
	n, err := strconv.ParseUint(parts[0], 10, 16)
	if err != nil || n == 0 || len(parts) > 3 || slices.Contains(parts, "") {
		return admin.Port{}, usage("--port %q is not PORT[:PROTOCOL[:NAME]]", s)
	}
	p := admin.Port{Port: uint16(n), Protocol: "tcp"}
	if len(parts) > 1 {
		p.Protocol = parts[1]
	}
	p.Name = p.Protocol
	if len(parts) > 2 {
		p.Name = parts[2]
	}
	return p, nil
}

func discoveryVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "discovery", Short: "Sources of instances"}
	c.AddCommand(&cobra.Command{Use: "release [SOURCE]", Short: "Let go of instances that are held although their source lost them", Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		query := url.Values{}
		if len(args) == 1 {
			query.Set("source", args[0])
		}
		_, err := o.client().call(cmd.Context(), http.MethodPost, "/api/v1/discovery/release", query, []byte("{}"))
		return err
	}})
	return c
}

func addressVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "address", Short: "Move the ledger: export, import"}
	c.AddCommand(
		&cobra.Command{Use: "export", Short: "The whole ledger as one JSON document on stdout", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			data, err := o.client().call(cmd.Context(), http.MethodGet, "/api/v1/addresses/export", nil, nil)
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(data)
			return err
		}},
		&cobra.Command{Use: "import [FILE]", Short: "Take over addresses and services of an export (default: stdin); what is bound stays", Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			in := cmd.InOrStdin()
			if len(args) == 1 {
				file, err := os.Open(args[0])
				if err != nil {
					return exit(exitBadFile, err)
				}
				defer func() { _ = file.Close() }()
				in = file
			}
			data, err := io.ReadAll(in)
			if err != nil {
				return exit(exitBadFile, err)
			}
			answer, err := o.client().call(cmd.Context(), http.MethodPost, "/api/v1/addresses/import", nil, data)
			if err != nil {
				return err
			}
			var got admin.Imported
			if err := json.Unmarshal(answer, &got); err != nil {
				return exit(exitFailed, err)
			}
			return o.print(cmd, got, func(t *table) { t.row("added", got.Added) })
		}},
	)
	return c
}
