package config

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"

	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
)

// load writes a config into a directory of its own and loads it; the messages
// name the file as roost.yaml.
func load(t testing.TB, text string, more map[string]string) (*Config, string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range more {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "roost.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err == nil {
		return c, ""
	}
	return nil, strings.ReplaceAll(err.Error(), dir+"/", "")
}

// TestMistakesNameTheirPlace: every mistake is named with file, line and column
// and the way out.
func TestMistakesNameTheirPlace(t *testing.T) {
	const shop = "services:\n  - {name: shop, tenant: acme, ports: [{port: 80, protocol: http}]}\n"
	for name, c := range map[string]struct {
		text string
		more map[string]string
		want string
	}{
		"unknown key":                {text: "domian: roost\n", want: `roost.yaml:1:1: domian: is not a known key; did you mean "domain"?`},
		"unknown key far from any":   {text: "dns: {qqqqqqqqqqq: 1}\n", want: "roost.yaml:1:7: dns.qqqqqqqqqqq: is not a known key; known keys are addresses, ttl, forward"},
		"nested unknown key":         {text: "services:\n  - {name: shop, tenant: acme, ports: [{port: 80, protcol: http}]}\n", want: `roost.yaml:2:51: services[0].ports[0].protcol: is not a known key; did you mean "protocol"?`},
		"wrong type":                 {text: "services: 3\n", want: `roost.yaml:1:11: services: is "3"; a list is wanted: write it as [ ... ] or with a leading -`},
		"wrong number":               {text: strings.Replace(shop, "80", "eighty", 1), want: `roost.yaml:2:47: services[0].ports[0].port: "eighty" is not a whole number from 0 to 65535`},
		"number too large":           {text: strings.Replace(shop, "80", "70000", 1), want: `roost.yaml:2:47: services[0].ports[0].port: "70000" is not a whole number from 0 to 65535`},
		"no port":                    {text: strings.Replace(shop, "port: 80, ", "", 1), want: "roost.yaml:2:40: services[0].ports[0].port: is missing or 0; it is what callers dial, from 1 to 65535"},
		"bad duration":               {text: "dns: {ttl: 5}\n", want: `roost.yaml:1:12: dns.ttl: "5" is not a duration; write it like 5s, 1m30s or 250ms`},
		"key twice":                  {text: "node: a\nnode: b\n", want: "roost.yaml:2:1: node: is written twice (first at line 1); keep one"},
		"not yaml":                   {text: "dns: [1\nnode: 2\n", want: "roost.yaml:2:5: is not YAML: did not find expected"},
		"two services of one name":   {text: shop + "  - {name: shop, tenant: acme, ports: [{port: 81}]}\n", want: "roost.yaml:3:12: services[1].name: service acme/shop is declared twice (first at roost.yaml:2:5); keep one"},
		"same port twice":            {text: "services:\n  - {name: shop, tenant: acme, ports: [{port: 80, name: a}, {port: 80, name: b}]}\n", want: `roost.yaml:2:68: services[0].ports[1].port: 80 is already port "a" of this service; one address has each port once`},
		"same port name twice":       {text: "services:\n  - {name: shop, tenant: acme, ports: [{port: 80}, {port: 81}]}\n", want: `services[0].ports[1].name: two ports are named "tcp"; name them apart`},
		"bad protocol":               {text: strings.Replace(shop, "http}", "htp}", 1), want: `"htp" is none of tcp, http, http2, grpc, tls, udp`},
		"bad service name":           {text: strings.Replace(shop, "shop", "Shop", 1), want: `roost.yaml:2:12: services[0].name: "Shop" is no service name: a lower-case DNS label (a-z, 0-9, -; up to 63)`},
		"tenant dedicated":           {text: strings.Replace(shop, "acme", "dedicated", 1), want: `"dedicated" is no tenant name: a lower-case DNS label, and not "dedicated"`},
		"undeclared tenant":          {text: "tenants: {acne: {}}\n" + shop, want: `services[0].tenant: "acme" is not declared under tenants; did you mean "acne"?`},
		"overlapping listeners":      {text: "listeners:\n  - {name: a, address: '0.0.0.0:80', gateway: edge}\n  - {name: b, address: '0.0.0.0:80', gateway: edge}\n", want: "roost.yaml:3:24: listeners[1].address: 0.0.0.0:80 is already the address of listener a (roost.yaml:2:5) on gateway edge"},
		"https without certificate":  {text: "listeners:\n  - {name: a, address: '0.0.0.0:443', protocol: https, gateway: edge}\n", want: "listeners[0].certificates: is missing; an https listener needs at least one {cert_file, key_file}"},
		"redirect from nowhere":      {text: "listeners:\n  - {name: a, address: '0.0.0.0:443', protocol: https, gateway: edge, redirect_from: b, certificates: [{cert_file: a, key_file: b}]}\n", want: `listeners[0].redirect_from: there is no listener "b"`},
		"listener without gateway":   {text: "listeners:\n  - {name: a, address: '0.0.0.0:80'}\n", want: "listeners[0].gateway: is missing; name the gateway group that this listener lives on, like edge"},
		"overlapping pools":          {text: "addresses: {internal: 127.128.0.0/9, dedicated: {public: {cidr: 127.130.0.0/24}}}\n", want: "addresses.dedicated.public.cidr: 127.130.0.0/24 overlaps the internal pool 127.128.0.0/9; give each its own range"},
		"pool with host bits":        {text: "addresses: {internal: 127.128.0.1/9}\n", want: "addresses.internal: 127.128.0.1/9 has bits set after its prefix; write 127.128.0.0/9"},
		"pool without ipv4":          {text: "addresses: {internal: 'fd00::/64'}\n", want: "addresses.internal: has no IPv4 CIDR; write [IPV4_CIDR, IPV6_CIDR]"},
		"client of two tenants":      {text: "tenants: {acme: {clients: [10.0.0.0/8]}, globex: {clients: [10.0.0.0/8]}}\n", want: "10.0.0.0/8 is already of tenant acme (roost.yaml:1:28); one source address is of one tenant"},
		"dedicated pool unknown":     {text: "services:\n  - {name: shop, tenant: acme, ports: [{port: 80}], dedicated_ip: {pool: x}}\n", want: `services[0].dedicated_ip.pool: "x" is not declared under addresses.dedicated`},
		"close and health_check":     {text: "services: [{name: a, tenant: t, ports: [{port: 1}], health_check: {tcp: {}}, drain: {close: true}}]\n", want: "drain.close: does not go with health_check"},
		"store.consul":               {text: "store: {consul: {prefix: roost/}}\n", want: "store.consul: needs discovery.consul, whose connection it uses"},
		"xds off loopback":           {text: "xds: {address: '0.0.0.0:7481'}\n", want: "xds.address: 0.0.0.0:7481 is not a loopback address, and proxies cannot prove who they are yet"},
		"admin off loopback":         {text: "admin: {address: '0.0.0.0:7480'}\n", want: "admin.address: 0.0.0.0:7480 is not a loopback address"},
		"unset variable":             {text: "node: ${ROOST_TEST_UNSET}\n", want: "roost.yaml:1:7: node: ${ROOST_TEST_UNSET}: the environment variable ROOST_TEST_UNSET is not set"},
		"missing included file":      {text: "include: [more.yaml]\n", want: "include: more.yaml does not exist"},
		"main key in included file":  {text: "include: [more.yaml]\n", more: map[string]string{"more.yaml": "domain: x\n"}, want: "more.yaml:1:9: domain: belongs into the main file; an included file holds tenants, services, listeners and routes"},
		"tenant in two files":        {text: "include: [more.yaml]\ntenants: {acme: {}}\n", more: map[string]string{"more.yaml": "tenants: {acme: {}}\n"}, want: "more.yaml:1:17: tenants.acme: tenant acme is declared twice (first at roost.yaml:2:17)"},
		"instance without port":      {text: strings.TrimSuffix(shop, "}\n") + ", instances: [{id: a, address: 127.0.0.1}]}\n", want: `services[0].instances[0].address: "127.0.0.1" has no port; write IP:PORT, or name the ports under ports`},
		"instance by name":           {text: strings.TrimSuffix(shop, "}\n") + ", instances: [{id: a, address: 'shop:80'}]}\n", want: `"shop:80" is neither IP nor IP:PORT (host names are not looked up)`},
		"loopback of no tenant":      {text: "loopback: acne\ntenants: {acme: {}}\n", want: `loopback: "acne" is neither all, none nor a tenant that is declared; did you mean "acme"?`},
		"route without target":       {text: "routes:\n  - {name: r, tenant: acme}\n", want: "routes[0].to: is missing; name at least one {service: NAME}"},
		"route with two paths":       {text: "routes:\n  - {name: r, tenant: acme, match: {path: /a, path_prefix: /b}, to: [{service: shop}]}\n", want: "path, path_prefix and path_regex exclude each other"},
		"route with a broken regex":  {text: "routes:\n  - {name: r, tenant: acme, match: {path_regex: '('}, to: [{service: shop}]}\n", want: "missing closing ): `(` (RE2 syntax)"},
		"route with weights of zero": {text: "routes:\n  - {name: r, tenant: acme, to: [{service: shop, weight: 0}]}\n", want: "the weights add up to 0; they must add up to 1 at least"},
		"bad retry condition":        {text: strings.TrimSuffix(shop, "}\n") + ", retry: {on: [conect-failure]}}\n", want: `"conect-failure" is neither a status code nor one of Envoy's retry conditions; did you mean "connect-failure"?`},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := load(t, c.text, c.more)
			if !strings.Contains(got, c.want) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// TestAllMistakesAtOnce: one run shows them all, in the order of the file.
func TestAllMistakesAtOnce(t *testing.T) {
	_, got := load(t, "domian: x\nservices:\n  - {name: Shop, tenant: acme}\nlog: {level: loud}\n", nil)
	want := []string{"roost.yaml:1:1: domian", `"Shop" is no service name`, "services[0].ports: is missing", `"loud" is none of info, debug, warn, error`}
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%q is not among:\n%s", w, got)
		}
	}
	if n := len(strings.Split(got, "\n")); n != len(want) {
		t.Errorf("%d messages, want %d:\n%s", n, len(want), got)
	}
}

func TestGoodConfig(t *testing.T) {
	t.Setenv("ROOST_TEST_NODE", "h7")
	c, bad := load(t, `
node: ${ROOST_TEST_NODE}
trust_domain: ${file:trust}
include: [tenants.d/*.yaml]
discovery: {file: {path: services.d}}
addresses: {internal: 100.96.0.0/12}
tenants: {acme: {clients: [10.0.0.0/8, {cidr: 172.20.0.0/16, node: h1}]}}
services:
  - {name: shop, tenant: acme, allow: [globex, globex/web], ports: [{port: 80, protocol: http}, {port: 90}], instances: [{id: a, address: "10.0.0.9:80", version: v1}]}
`, map[string]string{"trust": "example.org\n", "tenants.d/g.yaml": "tenants: {globex: {}}\nroutes:\n  - {name: r, tenant: globex, hosts: [A.example.com], to: [{service: acme/shop}]}\n"})
	if bad != "" {
		t.Fatal(bad)
	}
	if c.Model.Node != "h7" || c.Model.TrustDomain != "example.org" || !c.Routed() {
		t.Errorf("node %q, trust domain %q, routed %v", c.Model.Node, c.Model.TrustDomain, c.Routed())
	}
	if !strings.HasSuffix(c.InstancePath, "/services.d") || !filepath.IsAbs(c.InstancePath) {
		t.Errorf("instance path %q is not relative to the file", c.InstancePath)
	}
	// With a routed pool DNS answers at the pool's .53, too.
	if l := c.DNS.Listen; len(l) != 2 || l[1].Address.String() != "100.96.0.53:53" {
		t.Errorf("dns listens at %v", l)
	}
	if diff := cmp.Diff([]lb.Grant{{Tenant: "globex"}, {Tenant: "globex", Service: "web"}}, c.Model.Services[0].Allow); diff != "" {
		t.Error(diff)
	}
	if r := c.Model.Routes[0]; r.Hosts[0] != "a.example.com" || r.To[0].Service != (lb.Key{Tenant: "acme", Service: "shop"}) || r.To[0].Weight != 1 {
		t.Errorf("route %+v", r)
	}
	if i := c.Static[0]; i.ID != "a" || i.Node != "h7" || !strings.Contains(i.Origin, "roost.yaml:9:") {
		t.Errorf("instance %+v", i)
	}
}

func TestMissingFileIsNamed(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("%v", err)
	}
}

func TestParseServicePointsIntoTheBody(t *testing.T) {
	key := lb.Key{Tenant: "acme", Service: "shop"}
	s, err := ParseService(key, []byte(`{"ports": [{"port": 80, "protocol": "http"}]}`), nil)
	if err != nil || s.Ports[0].Name != "http" || s.Origin != "api" {
		t.Fatalf("%+v %v", s, err)
	}
	_, err = ParseService(key, []byte("{\n \"ports\": [{\"port\": 80, \"protocl\": \"http\"}]}"), nil)
	var errs strict.Errors
	if !errors.As(err, &errs) || errs[0].Path != "ports[0].protocl" || errs[0].Place != "body:2:25" {
		t.Errorf("%v", err)
	}
}

// TestSchemaAgrees: what the examples say is valid by the schema, and what the
// loader does not know the schema refuses.
func TestSchemaAgrees(t *testing.T) {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema()))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("roost.json", doc); err != nil {
		t.Fatal(err)
	}
	schema, err := compiler.Compile("roost.json")
	if err != nil {
		t.Fatal(err)
	}
	valid := func(text string) error {
		var v any
		if err := yaml.Load([]byte(text), &v); err != nil {
			t.Fatal(err)
		}
		return schema.Validate(v)
	}
	for _, path := range []string{"roost.yaml", "routed.yaml"} {
		data, err := os.ReadFile(filepath.Join("../../../docs/examples", path))
		if err != nil {
			t.Fatal(err)
		}
		if err := valid(string(data)); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := Load(filepath.Join("../../../docs/examples", path)); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, text := range []string{"domian: x", "services: 3", "services: [{name: a, tenant: b, ports: [{port: 70000}]}]", "log: {level: loud}"} {
		if valid(text) == nil {
			t.Errorf("the schema takes %q", text)
		}
	}
}

// FuzzLoad: whatever a file holds, loading ends with a config or with mistakes
// that name a place.
func FuzzLoad(f *testing.F) {
	for _, path := range []string{"roost.yaml", "routed.yaml"} {
		data, err := os.ReadFile(filepath.Join("../../../docs/examples", path))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	for _, s := range []string{"", "null", "[]", "a: &a [*a]", "services: [{ports: [null]}]", "x: ${", "node: ${file:/}", "tenants: {a: null}", "dns: {forward: [{to: []}]}", "addresses: {internal: []}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "include") || strings.Contains(text, "file:") {
			return // reads other files
		}
		path := filepath.Join(t.TempDir(), "roost.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path)
		if (c == nil) == (err == nil) {
			t.Fatalf("config %v, error %v", c, err)
		}
		var errs strict.Errors
		if err != nil && !errors.As(err, &errs) {
			t.Fatalf("an error without a place: %v", err)
		}
		for _, e := range errs {
			if !strings.HasPrefix(e.Place, path) {
				t.Errorf("%q has no place in the file", e)
			}
		}
	})
}
