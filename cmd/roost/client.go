package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v4"
)

const (
	defaultAddress = "http://127.0.0.1:7480"
	requestTimeout = 30 * time.Second
)

// client talks to the admin API.
type client struct {
	base string
	http *http.Client
}

func (o *options) client() *client {
	at := o.address
	if at == "" {
		at = os.Getenv("ROOST_ADDR")
	}
	if at == "" {
		at = defaultAddress
	}
	c := &client{base: at, http: &http.Client{}}
	if path, ok := strings.CutPrefix(at, "unix:"); ok {
		path = strings.TrimPrefix(path, "//")
		c.base = "http://localhost"
		c.http.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}}
	} else if !strings.Contains(at, "://") {
		c.base = "http://" + at
	}
	c.base = strings.TrimSuffix(c.base, "/")
	return c
}

// call sends a request and returns the answer's body. An error answer is exit
// code 1 with the problem document's detail; no answer is 69.
func (c *client) call(ctx context.Context, method, path string, query url.Values, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	res, err := c.open(ctx, method, path, query, body, "application/json")
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, exit(exitUnreachable, fmt.Errorf("admin API %s: %w", c.base, err))
	}
	return data, nil
}

func (c *client) open(ctx context.Context, method, path string, query url.Values, body []byte, accept string) (*http.Response, error) {
	target := c.base + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, usage("--address: %v", err)
	}
	req.Header.Set("Accept", accept)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, exit(exitUnreachable, fmt.Errorf("no roost answers at %s: %w: is `roost run` up? name another one with --address or $ROOST_ADDR", c.base, err))
	}
	if res.StatusCode < http.StatusBadRequest {
		return res, nil
	}
	defer func() { _ = res.Body.Close() }()
	data, _ := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return nil, exit(exitFailed, errors.New(detail(data, res.Status)))
}

// detail reads a problem document.
func detail(data []byte, status string) string {
	var p struct {
		Detail string
		Errors []struct{ Location, Message, Value string }
	}
	if json.Unmarshal(data, &p) != nil || p.Detail == "" {
		return strings.TrimSpace(status + " " + string(data))
	}
	text := p.Detail
	for _, e := range p.Errors {
		text += fmt.Sprintf("\n  %s %s: %s", e.Value, e.Location, e.Message)
	}
	return text
}

// fetch reads a JSON object.
func fetch[T any](ctx context.Context, c *client, path string, query url.Values) (T, error) {
	var v T
	data, err := c.call(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return v, exit(exitFailed, fmt.Errorf("admin API %s%s: %w", c.base, path, err))
	}
	return v, nil
}

// table lays out rows for people.
type table struct{ w *tabwriter.Writer }

func (t *table) row(cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(t.w, "\t")
		}
		fmt.Fprint(t.w, show(c))
	}
	fmt.Fprintln(t.w)
}

// show writes absent values as a dash.
func show(v any) string {
	switch v := v.(type) {
	case *string:
		if v == nil {
			return "-"
		}
		return *v
	case string:
		if v == "" {
			return "-"
		}
		return v
	case []string:
		if len(v) == 0 {
			return "-"
		}
		return strings.Join(v, ",")
	case time.Time:
		return v.Local().Format("2006-01-02 15:04:05")
	}
	return fmt.Sprint(v)
}

// print writes v as the output flag says; lay is the table.
func (o *options) print(cmd *cobra.Command, v any, lay func(*table)) error {
	out := cmd.OutOrStdout()
	switch o.output {
	case "json":
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "yaml":
		data, err := json.Marshal(v)
		if err != nil {
			return err
		}
		var plain any
		if err := yaml.Load(data, &plain); err != nil {
			return err
		}
		data, err = yaml.Dump(plain)
		if err != nil {
			return err
		}
		_, err = out.Write(data)
		return err
	case "table":
		t := &table{tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)}
		lay(t)
		return t.w.Flush()
	}
	return usage("-o %s: want table, json or yaml", o.output)
}
