package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/internal/admin"
	"github.com/roostmesh/roost/cmd/internal/drain"
)

func instancePath(name, verb string) string {
	return "/api/v1/instances/" + url.PathEscape(name) + "/" + verb
}

func drainVerb(o *options) *cobra.Command {
	var timeout time.Duration
	c := &cobra.Command{
		Use: "drain INSTANCE", Short: "Take an instance out of service; returns when every proxy has let go of it", Args: cobra.ExactArgs(1),
		Long: "Take an instance out of service: no new traffic, what is in flight finishes. Returns when every\nproxy has let go of it, or after the service's drain.timeout. Exit code 1 says that a proxy or a\nreplica did not answer, and names it. Use it before a stop:\n\n  roost drain web-3 && systemctl stop web-3",
	}
	c.Flags().DurationVar(&timeout, "timeout", 0, "wait at most so long for what is in flight (default: the service's drain.timeout)")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if timeout < 0 {
			return usage("--timeout %s is negative", timeout)
		}
		query := url.Values{}
		if timeout > 0 {
			query.Set("timeout", fmt.Sprint(timeout.Seconds()))
		}
		// The daemon bounds the wait.
		res, err := o.client().open(cmd.Context(), http.MethodPost, instancePath(args[0], "drain"), query, []byte("{}"), "application/json")
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		data, err := io.ReadAll(res.Body)
		if err != nil {
			return exit(exitUnreachable, err)
		}
		var r drain.Result
		if err := json.Unmarshal(data, &r); err != nil {
			return exit(exitFailed, err)
		}
		return o.drained(cmd, r)
	}
	return c
}

// drained prints what a drain came to. What was in flight has had its time; a
// proxy or a replica that said nothing may still send traffic.
func (o *options) drained(cmd *cobra.Command, r drain.Result) error {
	err := o.print(cmd, r, func(t *table) {
		t.row("instance", r.Instance)
		t.row("drained", r.Drained)
		t.row("took", time.Duration(r.Took*float64(time.Second)).Round(time.Millisecond))
		if r.TimedOut {
			t.row("still in flight", r.InFlight)
			t.row("not known of", r.Unknown)
		}
		t.row("no answer", r.Waiting)
		t.row("not connected", r.Gone)
	})
	if err != nil {
		return err
	}
	if len(r.Waiting) > 0 {
		return exit(exitFailed, errors.New(r.Instance+" may still get traffic: "+strings.Join(r.Waiting, "; ")))
	}
	return nil
}

func undrainVerb(o *options) *cobra.Command {
	return &cobra.Command{Use: "undrain INSTANCE", Short: "Put an instance back into service", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		data, err := o.client().call(cmd.Context(), http.MethodPost, instancePath(args[0], "undrain"), nil, []byte("{}"))
		if err != nil {
			return err
		}
		var u admin.Undrained
		if err := json.Unmarshal(data, &u); err != nil {
			return exit(exitFailed, err)
		}
		return o.print(cmd, u, func(t *table) { t.row("back in service", u.Instance) })
	}}
}
