package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/internal/admin"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/dns"
	"github.com/roostmesh/roost/lb/ledger"
)

// listVerb makes a verb that prints a list of the API.
func listVerb[T any](o *options, use, short, path string, head []any, row func(T) []any) *cobra.Command {
	var tenant string
	c := &cobra.Command{Use: use, Short: short, Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		query := url.Values{}
		if len(args) == 1 {
			t, s, _ := strings.Cut(args[0], "/")
			query.Set("tenant", t)
			if s != "" {
				query.Set("service", s)
			}
		}
		if tenant != "" {
			query.Set("tenant", tenant)
		}
		list, err := fetch[admin.List[T]](cmd.Context(), o.client(), path, query)
		if err != nil {
			return err
		}
		return o.print(cmd, list, func(t *table) {
			t.row(head...)
			for _, item := range list.Items {
				t.row(row(item)...)
			}
		})
	}}
	c.Flags().StringVar(&tenant, "tenant", "", "only of this tenant")
	return c
}

func servicesVerb(o *options) *cobra.Command {
	return listVerb(o, "services [TENANT[/SERVICE]]", "Services, with their names and addresses", "/api/v1/services",
		[]any{"SERVICE", "DOMAIN", "ADDRESS", "DEDICATED", "PORTS", "INSTANCES", "ORIGIN"}, func(s admin.Service) []any {
			return []any{s.Tenant + "/" + s.Name, s.Domain, s.Address, s.DedicatedIP, ports(s.Ports), fmt.Sprintf("%d/%d", s.Instances.Healthy, s.Instances.Total), s.Origin}
		})
}

func ports(list []admin.Port) string {
	var out []string
	for _, p := range list {
		out = append(out, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
	}
	return strings.Join(out, ",")
}

func instancesVerb(o *options) *cobra.Command {
	return listVerb(o, "instances [TENANT[/SERVICE]]", "Instances, and whether they take traffic", "/api/v1/instances",
		[]any{"INSTANCE", "ADDRESS", "NODE", "VERSION", "WEIGHT", "HEALTH", "DRAINING", "STALE", "ORIGIN"}, func(i admin.Instance) []any {
			return []any{i.Tenant + "/" + i.Service + "/" + i.ID, i.Address, i.Node, i.Version, i.Weight, i.Health, i.Draining, i.Stale, i.Origin}
		})
}

func routesVerb(o *options) *cobra.Command {
	return listVerb(o, "routes [TENANT[/SERVICE]]", "Routes, by listener and match order", "/api/v1/routes",
		[]any{"LISTENER", "ORDER", "ROUTE", "TENANT", "HOSTS", "MATCH", "TO", "ORIGIN"}, func(r admin.Route) []any {
			var to []string
			for _, d := range r.To {
				text := d.Service
				if d.Version != nil {
					text += "@" + *d.Version
				}
				if len(r.To) > 1 {
					text += fmt.Sprintf("=%d", d.Weight)
				}
				to = append(to, text)
			}
			return []any{r.Listener, r.Order, r.Name, r.Tenant, r.Hosts, matchText(r.Match), to, r.Origin}
		})
}

func matchText(m admin.Match) string {
	var out []string
	for _, p := range []struct {
		name  string
		value *string
	}{{"=", m.Path}, {"", m.PathPrefix}, {"~", m.PathRegex}} {
		if p.value != nil {
			out = append(out, p.name+*p.value)
		}
	}
	if len(m.Methods) > 0 {
		out = append(out, strings.Join(m.Methods, "|"))
	}
	for _, h := range m.Headers {
		out = append(out, "header:"+h.Name)
	}
	for _, q := range m.Query {
		out = append(out, "query:"+q.Name)
	}
	if len(out) == 0 {
		return "/"
	}
	return strings.Join(out, " ")
}

func listenersVerb(o *options) *cobra.Command {
	return listVerb(o, "listeners [TENANT[/SERVICE]]", "Addresses at which proxies listen", "/api/v1/listeners",
		[]any{"LISTENER", "ROLE", "GATEWAY", "ADDRESS", "PROTOCOL", "ORIGIN"}, func(l admin.Listener) []any {
			return []any{l.Name, l.ProxyRole, l.Gateway, l.Address, l.Protocol, l.Origin}
		})
}

func addressesVerb(o *options) *cobra.Command {
	return listVerb(o, "addresses [TENANT[/SERVICE]]", "The ledger: who owns which address", "/api/v1/addresses",
		[]any{"ADDRESS", "KIND", "POOL", "SERVICE", "STATE", "SINCE", "GENERATION", "DERIVED", "HELD BY", "FREE AFTER", "REASON"}, func(a admin.Address) []any {
			derived := "hash"
			if a.Probed {
				derived = "probed"
			}
			holders, free := a.Holders, "-"
			if a.State == ledger.Bound {
				holders = []string{fmt.Sprintf("%d proxies", len(a.Holders))}
			}
			if a.FreeAfter != nil {
				free = show(*a.FreeAfter)
			}
			return []any{a.Address, a.Kind, a.Pool, a.Tenant + "/" + a.Service, a.State, a.Since, a.Generation, derived, holders, free, a.Reason}
		})
}

func certificatesVerb(o *options) *cobra.Command {
	return listVerb(o, "certificates", "Certificates of public listeners", "/api/v1/certificates",
		[]any{"NAMES", "FILE", "NOT AFTER", "ISSUER", "ERROR", "ORIGIN"}, func(c admin.Certificate) []any {
			until := "-"
			if c.NotAfter != nil {
				until = show(*c.NotAfter)
			}
			return []any{c.Names, c.CertFile, until, c.Issuer, c.Error, c.Origin}
		})
}

// localFlag adds --local, which keeps a list to the replica that answers.
func localFlag(c *cobra.Command, query url.Values) *cobra.Command {
	local := c.Flags().Bool("local", false, "only what this replica knows of itself, not the others")
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if *local {
			query.Set("local", "true")
		}
		return run(cmd, args)
	}
	return c
}

func problemsVerb(o *options) *cobra.Command {
	query := url.Values{}
	return localFlag(&cobra.Command{Use: "problems", Short: "What is wrong now, and the way out", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		list, err := fetch[admin.List[admin.Problem]](cmd.Context(), o.client(), "/api/v1/problems", query)
		if err != nil {
			return err
		}
		if len(list.Items) == 0 && o.output == "table" {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "no problems")
			return err
		}
		return o.print(cmd, list, func(t *table) {
			for _, p := range list.Items {
				t.row(p.Severity, p.Code, p.Object, p.Place, onReplica(p.Replica))
				t.row("", "", p.Message)
				t.row("", "", "way out: "+p.Fix)
			}
		})
	}}, query)
}

// onReplica names another replica; nothing is this one.
func onReplica(name *string) string {
	if name == nil {
		return ""
	}
	return "replica " + *name
}

func statusVerb(o *options) *cobra.Command {
	query := url.Values{}
	return localFlag(&cobra.Command{Use: "status [PROXY]", Short: "Proxies, and whether they are up to date", Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 {
			p, err := fetch[admin.Proxy](cmd.Context(), o.client(), "/api/v1/proxies/"+url.PathEscape(args[0]), nil)
			if err != nil {
				return err
			}
			return o.print(cmd, p, func(t *table) { proxyRows(t, []admin.Proxy{p}) })
		}
		list, err := fetch[admin.List[admin.Proxy]](cmd.Context(), o.client(), "/api/v1/proxies", query)
		if err != nil {
			return err
		}
		return o.print(cmd, list, func(t *table) { proxyRows(t, list.Items) })
	}}, query)
}

var proxyTypes = []string{"cluster", "endpoint", "listener", "route", "secret", "extension"}

func proxyRows(t *table, list []admin.Proxy) {
	head := []any{"PROXY", "ROLE", "TENANT", "ENVOY", "CONNECTED", "SINCE"}
	for _, name := range proxyTypes {
		head = append(head, strings.ToUpper(name))
	}
	t.row(append(head, "LAST ERROR")...)
	for _, p := range list {
		row := []any{p.ID, p.Role, p.Tenant, p.EnvoyVersion, p.Connected, p.Since}
		last := "-"
		for _, name := range proxyTypes {
			c := p.Types[name]
			text := fmt.Sprintf("%d synced", c.Acked)
			if pending := c.Sent - c.Acked - c.Rejected; pending > 0 {
				text += fmt.Sprintf(", %d pending", pending)
			}
			if c.Rejected > 0 {
				text += fmt.Sprintf(", %d rejected", c.Rejected)
			}
			row = append(row, text)
			if c.LastError != nil {
				last = *c.LastError
			}
		}
		t.row(append(row, last)...)
	}
}

func configVerb(o *options) *cobra.Command {
	return &cobra.Command{Use: "config PROXY [cluster|endpoint|listener|route|secret|extension|virtual_host]", Short: "What a proxy holds, intended against ACKed", Args: cobra.RangeArgs(1, 2), RunE: func(cmd *cobra.Command, args []string) error {
		query := url.Values{}
		if len(args) == 2 {
			query.Set("type", args[1])
		}
		list, err := fetch[admin.List[admin.Held]](cmd.Context(), o.client(), "/api/v1/proxies/"+url.PathEscape(args[0])+"/config", query)
		if err != nil {
			return err
		}
		return o.print(cmd, list, func(t *table) {
			t.row("TYPE", "NAME", "INTENDED", "ACKED", "REJECTED", "ERROR")
			for _, h := range list.Items {
				t.row(h.Type, h.Name, h.Intended, h.Acked, h.Rejected, h.Error)
			}
		})
	}}
}

func explainVerb(o *options) *cobra.Command {
	var method, from, proxy, listener string
	var headers []string
	c := &cobra.Command{Use: "explain URL", Short: "Why this request goes where it goes", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		query := url.Values{"url": args, "method": {method}, "header": headers}
		for name, v := range map[string]string{"from": from, "proxy": proxy, "listener": listener} {
			if v != "" {
				query.Set(name, v)
			}
		}
		e, err := fetch[admin.Explanation](cmd.Context(), o.client(), "/api/v1/explain", query)
		if err != nil {
			return err
		}
		return o.print(cmd, e, func(t *table) { explainRows(t, e) })
	}}
	c.Flags().StringVar(&method, "method", "GET", "request method")
	c.Flags().StringArrayVar(&headers, "header", nil, "request header NAME:VALUE; may be repeated")
	c.Flags().StringVar(&from, "from", "", "caller: TENANT/SERVICE, ADDRESS or ADDRESS@NODE")
	c.Flags().StringVar(&proxy, "proxy", "", "as this proxy sees it")
	c.Flags().StringVar(&listener, "listener", "", "at this public listener")
	return c
}

func explainRows(t *table, e admin.Explanation) {
	t.row("outcome", e.Outcome)
	if e.Why != "" {
		t.row("why", e.Why)
	}
	for _, s := range e.Steps { // the first failure on top
		if !s.OK {
			t.row("failed", s.Name+": "+s.Detail)
			break
		}
	}
	t.row("listener", e.Listener)
	t.row("virtual host", e.VirtualHost)
	t.row("route", e.Route)
	t.row("cluster", e.Cluster)
	t.row("policy", e.Policy)
	t.row("origin", e.Origin)
	if e.Location != nil {
		t.row("location", e.Location)
	}
	for _, s := range e.Steps {
		mark := "ok"
		if !s.OK {
			mark = "NOT"
		}
		t.row("step "+s.Name, mark+" "+s.Detail)
	}
	for _, c := range e.Considered {
		mark := "passed"
		if c.Matched {
			mark = "MATCHED"
		}
		t.row("considered", c.Route+": "+mark+": "+c.Reason)
	}
	for _, ep := range e.Endpoints {
		text := fmt.Sprintf("%s %s %s weight %d", ep.ID, show(ep.Address), ep.Health, ep.Weight)
		if ep.Reason != "" {
			text += ": " + ep.Reason
		}
		t.row("endpoint", text)
	}
	for _, p := range e.Proxies {
		t.row("proxy", p.ID+" "+p.State+": "+p.Detail)
	}
}

func resolveVerb(o *options) *cobra.Command {
	var from string
	c := &cobra.Command{Use: "resolve NAME [TYPE]", Short: "What DNS answers to a caller, and why", Args: cobra.RangeArgs(1, 2), RunE: func(cmd *cobra.Command, args []string) error {
		query := url.Values{"name": {args[0]}}
		if len(args) == 2 {
			query.Set("type", strings.ToUpper(args[1]))
		}
		if from != "" {
			query.Set("from", from)
		}
		a, err := fetch[dns.Answer](cmd.Context(), o.client(), "/api/v1/dns/resolve", query)
		if err != nil {
			return err
		}
		return o.print(cmd, a, func(t *table) {
			t.row("rcode", a.Rcode)
			t.row("view", a.View)
			t.row("why", a.Why)
			for _, r := range a.Answers {
				t.row("answer", fmt.Sprintf("%s %d %s %s", r.Name, r.TTL, r.Type, r.Data))
			}
		})
	}}
	c.Flags().StringVar(&from, "from", "", "caller: ADDRESS or ADDRESS@NODE (default 127.0.0.1)")
	return c
}

func eventsVerb(o *options) *cobra.Command {
	var follow bool
	var after uint64
	query := url.Values{}
	c := &cobra.Command{Use: "events", Short: "What has changed, and how long each step took", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		if after > 0 {
			query.Set("after", fmt.Sprint(after))
		}
		if follow {
			return o.follow(cmd.Context(), cmd.OutOrStdout(), query)
		}
		list, err := fetch[admin.List[admin.ReplicaEvent]](cmd.Context(), o.client(), "/api/v1/events", query)
		if err != nil {
			return err
		}
		return o.print(cmd, list, func(t *table) {
			t.row("SEQ", "TIME", "KIND", "SUBJECT", "SOURCE", "BUILT", "PUSHED", "ACKED", "BY", "MESSAGE")
			for _, e := range list.Items {
				built, pushed, acked := took(e.Event)
				t.row(e.Seq, e.Time.Local().Format(time.TimeOnly+".000"), e.Kind, subject(e.Event), cause(e.Event), built, pushed, acked, e.Acks, e.Message, onReplica(e.Replica))
			}
		})
	}}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on as events happen")
	c.Flags().Uint64Var(&after, "after", 0, "only events after this sequence number")
	return localFlag(c, query)
}

func subject(e events.Event) string {
	switch {
	case e.Instance != nil:
		return *e.Instance
	case e.Service != nil && e.Tenant != nil:
		return *e.Tenant + "/" + *e.Service
	case e.Proxy != nil:
		return *e.Proxy
	}
	return "-"
}

// took is how long after it was seen a change was built, pushed and ACKed.
func took(e events.Event) (built, pushed, acked string) {
	if e.Steps == nil {
		return "-", "-", "-"
	}
	step := func(seconds *float64) string {
		if seconds == nil {
			return "-"
		}
		return fmt.Sprintf("%.1f ms", *seconds*1000)
	}
	return step(e.Steps.Built), step(e.Steps.Pushed), step(e.Steps.Acked)
}

func ackedAfter(e events.Event) string {
	_, _, acked := took(e)
	return acked
}

// cause is the source's answer that a change was in.
func cause(e events.Event) string {
	switch {
	case e.Source == nil:
		return "-"
	case e.Index == nil:
		return *e.Source
	}
	return fmt.Sprintf("%s@%d", *e.Source, *e.Index)
}

// follow prints the stream, one event a line, until it ends.
func (o *options) follow(ctx context.Context, out io.Writer, query url.Values) error {
	res, err := o.client().open(ctx, http.MethodGet, "/api/v1/events", query, nil, "text/event-stream")
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	kind := ""
	for lines.Scan() {
		line := lines.Text()
		if k, ok := strings.CutPrefix(line, "event: "); ok {
			kind = k
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		if o.output == "json" {
			if _, err := fmt.Fprintln(out, data); err != nil {
				return err
			}
			continue
		}
		var e events.Event
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			return exit(exitFailed, err)
		}
		if _, err := fmt.Fprintf(out, "%s %-20s %s %s %s\n", e.Time.Local().Format(time.TimeOnly+".000"), kind, subject(e), ackedAfter(e), e.Message); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return exit(exitUnreachable, fmt.Errorf("the stream of events has ended: %w", lines.Err()))
}
