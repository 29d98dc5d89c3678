package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

// pinnedRoute is what a gateway has of the route configuration of listener web.
func (r *roost) pinnedRoute(member string) (intended, acked, pinned string, err error) {
	r.t.Helper()
	var list struct {
		Items []struct{ Name, Intended, Acked, Pinned string }
	}
	code, out, errOut := r.cli("config", "gateway~edge~"+member, "route", "-o", "json")
	if code != 0 {
		return "", "", "", errors.New(errOut)
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return "", "", "", err
	}
	for _, h := range list.Items {
		if h.Name == "web" {
			return h.Intended, h.Acked, h.Pinned, nil
		}
	}
	return "", "", "", fmt.Errorf("no route web in %s", out)
}

// TestPinnedRoute: a route that Roost lets through and Envoys refuse is pinned at
// its last good version: for those that refused it, over a crash of Roost, and for
// one that starts later. All else goes on, and what is mended is served at once.
func TestPinnedRoute(t *testing.T) {
	h := host{t, ""}
	port := freePort(t)
	h.app("http", "one", "127.0.0.91:9001")
	h.app("http", "two", "127.0.0.92:9001")
	services := func(match, shop, cart string) string {
		return fmt.Sprintf(`services:
  - {name: shop, tenant: acme, ports: [{port: 18191, protocol: http}], instances: [{id: s, address: "%s:9001", version: v1}]}
  - {name: cart, tenant: acme, ports: [{port: 18192, protocol: http}], instances: [{id: c, address: "%s:9001"}]}
listeners: [{name: web, address: "127.0.0.1:%d", protocol: http, gateway: edge}]
routes:
  - {name: cart, tenant: acme, listeners: [web], match: {path_prefix: /cart}, to: [{service: cart}]}
  - {name: shop, tenant: acme, listeners: [web], match: {%s]}
`, shop, cart, port, match)
	}
	// The bad version does not lead to v1 any more: its cluster lives on.
	const good, mended = `path_prefix: /shop}, to: [{service: shop, version: v1}`, `path_prefix: /shop}, to: [{service: shop}`
	bad := `path_regex: "/shop/[a-zäöü0-9]{900}"}, to: [{service: shop}`
	head := onLoopback(t, "127.191.0.0/16", "")
	r := newRoost(h, head+services(good, "127.0.0.91", "127.0.0.91")).serve()
	gateways := map[string]*binaries.Process{"one": r.envoy("--gateway", "edge/one"), "two": r.envoy("--gateway", "edge/two")}
	answers := func(path, want string) {
		t.Helper()
		until(t, path+" answers "+want, func() error {
			for range 8 { // the gateways share the port
				if got := h.call("http", fmt.Sprintf("http://127.0.0.1:%d%s", port, path)); got != want {
					return errors.New(got)
				}
			}
			return nil
		})
	}
	var first, refused string
	pinned := func(member string) {
		t.Helper()
		until(t, member+" has the pinned version", func() error {
			intended, acked, instead, err := r.pinnedRoute(member)
			if err == nil && (intended != first || acked != first || instead == "" || refused != "" && instead != refused) {
				err = fmt.Errorf("intended %s acked %s instead of %q; want %s", intended, acked, instead, first)
			}
			refused = instead
			return err
		})
	}
	answers("/shop", "200  one")
	for member := range gateways {
		until(t, member+" is served", func() (err error) {
			_, acked, _, err := r.pinnedRoute(member)
			if first = acked; err == nil && acked == "" {
				err = errors.New("not ACKed")
			}
			return err
		})
	}

	r.write(head + services(bad, "127.0.0.91", "127.0.0.91"))
	p := r.problem("resource_pinned")
	if p.Object != "route shop" || !strings.HasSuffix(p.Place, "roost.yaml:13:5") || !strings.Contains(p.Message, "gateway~edge~one, gateway~edge~two") || !strings.Contains(p.Message, first) {
		t.Errorf("problem %+v", p)
	}
	pinned("one")
	pinned("two")
	answers("/shop", "200  one")

	// What is not pinned moves, of this service and of another one.
	r.write(head + services(bad, "127.0.0.92", "127.0.0.92"))
	answers("/cart", "200  two")
	answers("/shop", "200  two")
	if n := r.metric("roost_xds_pinned"); n != 1 {
		t.Errorf("pinned: %v", n)
	}

	// It is so after a crash, for a gateway that starts then.
	for _, g := range gateways {
		g.Stop(5 * time.Second)
	}
	r.crash()
	r.serve()
	three := r.envoy("--gateway", "edge/three")
	pinned("three")
	answers("/shop", "200  two")
	if n := r.metric("roost_xds_nacks_total"); n != 0 {
		t.Errorf("refused %v times after the restart", n)
	}
	r.problem("resource_pinned")

	r.write(head + services(mended, "127.0.0.91", "127.0.0.92"))
	answers("/shop", "200  one")
	until(t, "nothing is pinned any more", func() error {
		if slices.ContainsFunc(r.problems(), func(p problemJSON) bool { return p.Code == "resource_pinned" || p.Code == "proxy_rejected" }) {
			return fmt.Errorf("%v", r.problems())
		}
		if out := r.ok("address", "export"); strings.Contains(out, `"pin"`) {
			return errors.New(out)
		}
		intended, acked, instead, err := r.pinnedRoute("three")
		if err == nil && (intended == first || intended != acked || instead != "") {
			err = fmt.Errorf("intended %s acked %s instead of %q", intended, acked, instead)
		}
		return err
	})
	three.Stop(5 * time.Second)
}

// TestPinOfTwoReplicas: each of two Roosts has one Envoy, and each of these
// refuses: together they are several.
func TestPinOfTwoReplicas(t *testing.T) {
	c := newCatalog(t)
	h := host{t, ""}
	h.app("http", "one", "127.0.0.93:9001")
	port := freePort(t)
	services := func(match string) string {
		return fmt.Sprintf(`services: [{name: shop, tenant: acme, ports: [{port: 18193, protocol: http}], instances: [{id: s, address: "127.0.0.93:9001", node: h1}]}]
listeners: [{name: web, address: "127.0.0.1:%d", protocol: http, gateway: edge}]
routes: [{name: shop, tenant: acme, listeners: [web], match: {%s}, to: [{service: shop}]}]
`, port, match)
	}
	const good, bad = "path_prefix: /shop", `path_regex: "/shop/[a-zäöü0-9]{900}"`
	replicas := map[string]*roost{"h1": c.replica("h1", services(good)).serve(), "h2": c.replica("h2", services(good)).serve()}
	rewrite := func(from, to string) {
		t.Helper()
		for _, r := range replicas {
			data, err := os.ReadFile(r.config)
			if err != nil {
				t.Fatal(err)
			}
			r.file("roost.yaml", strings.Replace(string(data), from, to, 1))
		}
	}
	var first string
	for node, r := range replicas {
		r.envoy("--gateway", "edge/"+node)
		until(t, node+" is served", func() (err error) {
			_, acked, _, err := r.pinnedRoute(node)
			if first = acked; err == nil && acked == "" {
				err = errors.New("not ACKed")
			}
			return err
		})
	}
	rewrite(services(good), services(bad))
	for node, r := range replicas {
		if p := r.problem("resource_pinned"); !strings.Contains(p.Message, "gateway~edge~h1, gateway~edge~h2") {
			t.Errorf("problem %+v", p)
		}
		until(t, node+" has the pinned version", func() error {
			intended, acked, instead, err := r.pinnedRoute(node)
			if err == nil && (intended != first || acked != first || instead == "") {
				err = fmt.Errorf("intended %s acked %s instead of %q; want %s", intended, acked, instead, first)
			}
			return err
		})
	}
	rewrite(services(bad), services(good))
	for node, r := range replicas {
		until(t, node+" has no pin", func() error {
			_, acked, instead, err := r.pinnedRoute(node)
			if out := r.ok("address", "export"); err == nil && (acked != first || instead != "" || strings.Contains(out, `"pin"`)) {
				err = fmt.Errorf("acked %s instead of %q, want %s; %s", acked, instead, first, out)
			}
			return err
		})
	}
}
