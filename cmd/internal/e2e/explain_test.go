package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

const oddRoutes = `
services:
  - {name: shop, tenant: acme, ports: [{port: 18095, protocol: http}], dedicated_ip: {}, instances: [{id: v1, address: "127.0.0.34:9001", version: v1}, {id: v2, address: "127.0.0.35:9001", version: v2}]}
  - {name: none, tenant: acme, ports: [{port: 18095, protocol: http}]}
routes:
  - {name: mesh, tenant: acme, match: {path: /y}, to: [{service: shop, weight: 0}, {service: none}]}
  - {name: as-sent, tenant: acme, listeners: [open], match: {query: [{name: q, exact: "a%20b"}]}, to: [{service: shop, version: v1}]}
  - {name: semicolon, tenant: acme, listeners: [open], match: {query: [{name: q, exact: "1;r=2"}]}, to: [{service: shop, version: v1}]}
  - {name: there, tenant: acme, listeners: [open], match: {query: [{name: p}]}, to: [{service: shop, version: v1}]}
  - {name: not-beta, tenant: acme, listeners: [open], hosts: [beta.example.com], match: {headers: [{name: x-beta, regex: "(1)?", invert: true}]}, to: [{service: shop, version: v2}]}
  - {name: by-host, tenant: acme, listeners: [open], match: {headers: [{name: host, prefix: "port.example.com:7"}]}, to: [{service: shop, version: v2}]}
  - {name: inner, tenant: acme, listeners: [open], hosts: ["*.b.example.com"], match: {path_prefix: /x}, to: [{service: shop, version: v1}]}
  - {name: outer, tenant: acme, listeners: [open], hosts: ["*.example.com"], match: {path: /y}, to: [{service: shop, version: v2}]}
`

// odd has a gateway with one listener that has routes and one that redirects.
type odd struct {
	*roost
	open, plain string // host:port
}

func newOdd(t *testing.T) *odd {
	t.Helper()
	open, plain, secure := freePort(t), freePort(t), freePort(t)
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.164.0.0/16, dedicated: {public: {cidr: 127.198.0.0/24}}", fmt.Sprintf(`listeners:
  - {name: open, address: "127.0.0.1:%d", protocol: http, gateway: odd}
  - {name: plain, address: "127.0.0.1:%d", protocol: http, gateway: odd}
  - {name: secure, address: "127.0.0.1:%d", protocol: https, gateway: odd, redirect_from: plain, certificates: [{cert_file: a.crt, key_file: a.key}]}
`, open, plain, secure)+oddRoutes))
	pair(t, r.dir, "a", "*.example.com", 1, time.Now().Add(90*24*time.Hour))
	r.serve()
	h.app("http", "v1", "127.0.0.34:9001")
	h.app("http", "v2", "127.0.0.35:9001")
	r.envoy("--gateway", "odd")
	o := &odd{r, fmt.Sprintf("127.0.0.1:%d", open), fmt.Sprintf("127.0.0.1:%d", plain)}
	until(t, "the gateway answers", func() error {
		for target, want := range map[string]string{o.open + "/?p": "200  v1", o.plain + "/": "308"} {
			if got := h.call("http", "http://"+target); !strings.HasPrefix(got, want) {
				return errors.New(got)
			}
		}
		return nil
	})
	return o
}

// TestExplainAgreesOnConditions: what a request's query and headers are
// compared with is the same for Envoy and Explain.
func TestExplainAgreesOnConditions(t *testing.T) {
	o := newOdd(t)
	for _, query := range []string{"", "?q=a%20b", "?q=a+b", "?q=a%2520b", "?q=1;r=2", "?r=1&q=1;r=2", "?q=x&q=a%20b", "?q=a%20b&q=x", "?p", "?p=", "?P=1", "?%70=1", "?&&p", "?=p", "?q"} {
		for _, hostname := range []string{"beta.example.com", "port.example.com:7", "port.example.com:77", "port.example.com", "a.b.example.com", "b.example.com"} {
			for _, path := range []string{"/", "/x", "/y"} {
				for _, header := range []map[string]string{nil, {"X-Beta": "1"}, {"X-Beta": "2"}, {"X-Beta": ""}} {
					target := "http://" + o.open + path + query
					got, want := ask(t, target, http.MethodGet, hostname, header), o.explained(t, target, http.MethodGet, hostname, header)
					if got.status != want.status || got.reason != want.reason || got.body != want.body && want.body != "" {
						t.Errorf("%s %s%s %v: Envoy %+v, Explain %+v", hostname, path, query, header, got, want)
					}
				}
			}
		}
	}
}

// TestExplainAgreesOnPaths: where Envoy redirects a path to, Explain says, too,
// however the path is written.
func TestExplainAgreesOnPaths(t *testing.T) {
	o := newOdd(t)
	conn, err := net.Dial("tcp", o.plain)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	in := bufio.NewReader(conn)
	random := rand.New(rand.NewPCG(1, 2))
	parts := []string{"/", "/", "/", ".", "..", ".", "%2e", "%2E", "%2f", "%5c", "%61", "%7e", "a", "b", ";", "\\", "|", "~", "\"", "_", "'", "(", "!", "^", "{", "`", "[", "]", "@", ":", "$", "*", "%25", "%252e"}
	for range 500 {
		path := "/"
		for range random.IntN(9) {
			path += parts[random.IntN(len(parts))]
		}
		path += []string{"", "?", "?a=/../b&c=%2f", "?a//b"}[random.IntN(4)]
		hostname := []string{"any.example.com", "ANY.example.com", "any.example.com:1234"}[random.IntN(3)]
		if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, hostname); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(path, err)
		}
		_ = res.Body.Close()
		if got, want := res.Header.Get("Location"), o.redirected(t, "http://"+o.plain+path, hostname); res.StatusCode != http.StatusPermanentRedirect || got != want {
			t.Errorf("%s %q: Envoy sends to %q, Explain says %q", hostname, path, got, want)
		}
	}
}

// redirected is where Explain says a request is sent to.
func (r *roost) redirected(t *testing.T, target, hostname string) string {
	t.Helper()
	res, err := http.Get("http://" + r.args + "/api/v1/explain?" + url.Values{"url": {target}, "header": {"Host:" + hostname}}.Encode())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	var e struct{ Outcome, Location, Detail string }
	if err := json.NewDecoder(res.Body).Decode(&e); err != nil {
		t.Fatal(err)
	}
	if e.Outcome != "redirected" {
		t.Fatalf("explain %q: %+v", target, e)
	}
	return e.Location
}

// TestExplainAgreesOnServiceAddresses: a gateway normalizes paths, for dedicated
// IPs, too; a node proxy passes on what the caller has written.
func TestExplainAgreesOnServiceAddresses(t *testing.T) {
	o := newOdd(t)
	o.envoy("--node", "h1")
	var s serviceJSON
	o.json(&s, "service", "show", "acme/shop")
	until(t, "the node proxy answers", func() error {
		if got := o.call("http", "http://"+s.Address+":18095/"); !strings.HasPrefix(got, "200") {
			return errors.New(got)
		}
		return nil
	})
	for address, normalizes := range map[string]bool{s.Address: false, *s.DedicatedIP: true} {
		for path, same := range map[string]bool{"/y": true, "/y?a": true, "/y/": false, "/x/../y": normalizes, "//y": normalizes, "/%79": normalizes, "/./y": normalizes, "/": false} {
			target := "http://" + address + ":18095" + path
			got, want := ask(t, target, http.MethodGet, "shop.acme.roost", nil), o.explained(t, target, http.MethodGet, "shop.acme.roost", nil)
			if got.status != want.status || got.reason != want.reason || (got.reason == "no_endpoint") != same {
				t.Errorf("%s: Envoy %+v, Explain %+v, the route for /y: %v", target, got, want, same)
			}
		}
	}
}
