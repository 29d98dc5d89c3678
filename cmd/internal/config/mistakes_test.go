package config

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestWhatValidatePrints: the whole output for a file, line by line.
func TestWhatValidatePrints(t *testing.T) {
	const https = "listeners:\n  - {name: a, address: '0.0.0.0:80', gateway: edge}\n"
	for name, c := range map[string]struct {
		text string
		more map[string]string
		want string
	}{
		"bad CIDR":                 {text: "tenants:\n  acme:\n    clients: [10.0.0.0/33]\n", want: `roost.yaml:3:15: tenants.acme.clients[0].cidr: "10.0.0.0/33" is not a CIDR like 10.42.0.0/16`},
		"bad pool":                 {text: "addresses:\n  internal: 10/8\n", want: `roost.yaml:2:13: addresses.internal: "10/8" is not a CIDR like 10.42.0.0/16`},
		"three pools":              {text: "addresses: {internal: [10.0.0.0/8, 11.0.0.0/8]}\n", want: `roost.yaml:1:23: addresses.internal: there is one internal pool: one IPv4 CIDR and at most one IPv6 CIDR`},
		"dedicated pools overlap":  {text: "addresses:\n  dedicated:\n    a: {cidr: 198.51.100.0/24}\n    b: {cidr: 198.51.100.16/28}\n", want: "roost.yaml:4:15: addresses.dedicated.b.cidr: 198.51.100.16/28 overlaps the pool a (198.51.100.0/24); give each its own range"},
		"a client on one node":     {text: "tenants:\n  acme: {clients: [{cidr: 10.0.0.0/8, node: h1}]}\n  globex: {clients: [{cidr: 10.0.0.0/8, node: h1}]}\n", want: "roost.yaml:3:29: tenants.globex.clients[0].cidr: 10.0.0.0/8 is already of tenant acme (roost.yaml:2:20); one source address is of one tenant"},
		"no such file":             {text: "datacenter: ${file:none}\n", want: "roost.yaml:1:13: datacenter: ${file:none}: open none: no such file or directory"},
		"variable inside a number": {text: "services:\n  - {name: a, tenant: b, ports: [{port: '${ROOST_TEST_UNSET}'}]}\n", want: "roost.yaml:2:41: services[0].ports[0].port: ${ROOST_TEST_UNSET}: the environment variable ROOST_TEST_UNSET is not set"},
		"redirect from https": {text: https + "  - {name: b, address: '0.0.0.0:443', protocol: https, gateway: other, redirect_from: a, certificates: [{cert_file: c, key_file: k}]}\n",
			want: "roost.yaml:3:87: listeners[1].redirect_from: goes from an http listener to an https listener of one gateway; a is http on edge"},
		"certificates of http":   {text: "listeners:\n  - {name: a, address: '0.0.0.0:80', gateway: edge, certificates: [{cert_file: c}]}\n", want: "roost.yaml:2:67: listeners[0].certificates: a listener of protocol http uses none; make it https\nroost.yaml:2:68: listeners[0].certificates[0]: cert_file and key_file are both needed"},
		"listener twice":         {text: https + "  - {name: a, address: '0.0.0.0:81', gateway: edge}\n", want: "roost.yaml:3:12: listeners[1].name: listener a is declared twice (first at roost.yaml:2:5); keep one"},
		"listener without port":  {text: "listeners:\n  - {name: a, address: 0.0.0.0, gateway: edge}\n", want: `roost.yaml:2:24: listeners[0].address: "0.0.0.0" is not IP:PORT`},
		"listener at port 0":     {text: "listeners:\n  - {name: a, address: '0.0.0.0:0', gateway: edge}\n", want: "roost.yaml:2:24: listeners[0].address: port 0 is no port to listen on"},
		"bad trusted proxy":      {text: "listeners:\n  - {name: a, address: '0.0.0.0:80', gateway: edge, trusted_proxies: [lb]}\n", want: `roost.yaml:2:70: listeners[0].trusted_proxies: "lb" is not a CIDR like 10.42.0.0/16`},
		"bad pattern":            {text: "include: ['[']\n", want: `roost.yaml:1:10: include: "[" is not a file pattern: syntax error in pattern`},
		"syntax in included":     {text: "include: [more.yaml]\n", more: map[string]string{"more.yaml": "services:\n  - {name: a\n"}, want: "more.yaml:3:1: is not YAML: did not find expected ',' or '}'"},
		"unknown in included":    {text: "include: ['*.inc']\n", more: map[string]string{"a.inc": "servces: []\n"}, want: `a.inc:1:1: servces: is not a known key; did you mean "services"?`},
		"service in two files":   {text: "include: [more.yaml]\nservices:\n  - {name: a, tenant: b, ports: [{port: 1}]}\n", more: map[string]string{"more.yaml": "services:\n  - {name: a, tenant: b, ports: [{port: 2}]}\n"}, want: "more.yaml:2:12: services[0].name: service b/a is declared twice (first at roost.yaml:3:5); keep one"},
		"a socket of nobody":     {text: "xds: {sockets: [{mode: '9'}]}\n", want: "roost.yaml:1:17: xds.sockets[0].path: is missing\nroost.yaml:1:17: xds.sockets[0].tenant: \"\" is no tenant; the socket serves one tenant only, name it\nroost.yaml:1:24: xds.sockets[0].mode: \"9\" is no octal file mode; write it like \"0660\""},
		"query inverted":         {text: "routes:\n  - {name: r, tenant: a, match: {query: [{name: q, exact: x, invert: true}]}, to: [{service: s}]}\n", want: "roost.yaml:2:70: routes[0].match.query[0].invert: is for headers only: Envoy cannot ask for a query parameter not to match; put the other case into a route of its own"},
		"method with a pattern":  {text: "routes:\n  - {name: r, tenant: a, match: {methods: [GET, P.*]}, to: [{service: s}]}\n", want: `roost.yaml:2:43: routes[0].match.methods: "P.*" is no method; write it in capitals, like GET`},
		"exact and prefix":       {text: "routes:\n  - {name: r, tenant: a, match: {headers: [{name: h, exact: a, prefix: a}]}, to: [{service: s}]}\n", want: "roost.yaml:2:44: routes[0].match.headers[0]: exact, prefix and regex exclude each other"},
		"path without a slash":   {text: "routes:\n  - {name: r, tenant: a, match: {path_prefix: api}, to: [{service: s}]}\n", want: `roost.yaml:2:47: routes[0].match.path_prefix: "api" does not begin with /`},
		"no host name":           {text: "routes:\n  - {name: r, tenant: a, hosts: ['a.*.com'], to: [{service: s}]}\n", want: `roost.yaml:2:33: routes[0].hosts: "a.*.com" is neither a host name, *.example.com nor *`},
		"route twice":            {text: "routes:\n  - {name: r, tenant: a, to: [{service: s}]}\n  - {name: r, tenant: a, to: [{service: s}]}\n", want: "roost.yaml:3:12: routes[1].name: route r is declared twice (first at roost.yaml:2:5); keep one"},
		"no grant":               {text: "services:\n  - {name: a, tenant: b, ports: [{port: 1}], allow: [Globex/web, c/]}\n", want: "roost.yaml:2:53: services[0].allow: \"Globex/web\" is neither TENANT nor TENANT/SERVICE\nroost.yaml:2:53: services[0].allow: \"c/\" is neither TENANT nor TENANT/SERVICE"},
		"too much":               {text: "services:\n  - {name: a, tenant: b, ports: [{port: 1}], outlier_detection: {max_ejection_percent: 101}, retry: {attempts: 11}, health_check: {http: {path: x}}}\n", want: "roost.yaml:2:88: services[0].outlier_detection.max_ejection_percent: 101 is more than 100\nroost.yaml:2:112: services[0].retry.attempts: 11 is more than 10\nroost.yaml:2:145: services[0].health_check.http.path: \"x\" does not begin with /"},
		"instance of another":    {text: "services:\n  - {name: a, tenant: b, ports: [{port: 1}], instances: [{id: i, service: c, address: '10.0.0.1:1'}]}\n", want: "roost.yaml:2:75: services[0].instances[0].service: an instance below service b/a is of that service"},
		"instance twice":         {text: "node: h1\nservices:\n  - {name: a, tenant: b, ports: [{port: 1}], instances: [{id: i, address: '10.0.0.1:1'}, {id: i, address: '10.0.0.2:1'}]}\n", want: "roost.yaml:3:95: services[0].instances[1].id: instance b/a/i@h1 is listed twice (first at roost.yaml:3:58)"},
		"consul half":            {text: "discovery: {consul: {max_connections: 1, default_tenant: _x, tls: {cert_file: c}}, file: {}}\n", want: "roost.yaml:1:39: discovery.consul.max_connections: 1 is too few; two watches need two connections\nroost.yaml:1:58: discovery.consul.default_tenant: \"_x\" is no tenant name (a lower-case DNS label)\nroost.yaml:1:79: discovery.consul.tls.cert_file: cert_file and key_file go together\nroost.yaml:1:90: discovery.file.path: is missing; name a YAML file or a directory of them"},
		"forward to a name":      {text: "dns: {forward: [{zone: consul, to: [consul]}]}\n", want: `roost.yaml:1:36: dns.forward[0].to: "consul" is neither a file (with a leading /) nor IP or IP:PORT`},
		"negative duration":      {text: "dns: {ttl: -1s}\n", want: `roost.yaml:1:12: dns.ttl: "-1s" is negative`},
		"a list for one value":   {text: "domain: [a]\n", want: "roost.yaml:1:9: domain: is a list; one value is wanted"},
		"the file is a list":     {text: "- a\n", want: "roost.yaml:1:1: is a list; a mapping with the keys domain, datacenter, node, trust_domain, data_dir, admin, xds, log, access_log, dns, discovery, store, addresses, capture, loopback, tenants, services, listeners, routes, include is wanted"},
		"tenant with underscore": {text: "tenants: {_x: {}}\n", want: `roost.yaml:1:15: tenants._x: "_x" is no tenant name: a lower-case DNS label, and not "dedicated"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := load(t, c.text, c.more)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("%s", diff)
			}
		})
	}
}

// TestPoolsInAnyOrder: the IPv4 pool is the one that says whether addresses are
// routed, wherever it is written.
func TestPoolsInAnyOrder(t *testing.T) {
	c, bad := load(t, "addresses: {internal: ['fd12:3456::/64', 127.128.0.0/9]}\n", nil)
	if bad != "" {
		t.Fatal(bad)
	}
	if c.Routed() || len(c.DNS.Listen) != 1 || !c.Model.InternalPools[0].Addr().Is4() {
		t.Errorf("routed %v, dns %v, pools %v", c.Routed(), c.DNS.Listen, c.Model.InternalPools)
	}
}

// TestWhichFile: --config, then $ROOST_CONFIG, then ./roost.yaml.
func TestWhichFile(t *testing.T) {
	t.Chdir(t.TempDir())
	t.Setenv("ROOST_CONFIG", "")
	if got := Find(""); got != "" && got != "/etc/roost/roost.yaml" {
		t.Errorf("without any file: %q", got)
	}
	if err := os.WriteFile("roost.yaml", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := Find(""); got != "roost.yaml" {
		t.Errorf("in this directory: %q", got)
	}
	t.Setenv("ROOST_CONFIG", "env.yaml")
	if a, b := Find(""), Find("flag.yaml"); a != "env.yaml" || b != "flag.yaml" {
		t.Errorf("by the environment %q, by the flag %q", a, b)
	}
}

// TestEmptyFileIsTheDefault: what nobody says is as the contract says.
func TestEmptyFileIsTheDefault(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "/state")
	c, bad := load(t, "", nil)
	if bad != "" {
		t.Fatal(bad)
	}
	embedded, err := Load("")
	if err != nil {
		t.Fatal(err)
	}
	got := []any{c.Admin.Address.String(), c.XDS.Address.String(), c.DNS.Listen[0].Address.String(), c.Model.Domain, c.Model.Datacenter, c.Model.TrustDomain, c.DataDir, c.Quarantine.String(), c.Model.TTL.String(), c.Model.Loopback, c.Model.CaptureNode, c.Model.AccessLog.Format, c.DNS.Forward[0].Files[0], c.Model.InternalPools[0].String()}
	want := []any{"127.0.0.1:7480", "127.0.0.1:7481", "127.0.0.1:7453", "roost", "dc1", "roost", "/state/roost", "10m0s", "5s", "all", "bind", "json", "/etc/resolv.conf", "127.128.0.0/9"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if embedded.DataDir != c.DataDir || embedded.Admin.Socket != filepath.Join("/state/roost", "admin.sock") {
		t.Errorf("without a file: data in %q, socket %q", embedded.DataDir, embedded.Admin.Socket)
	}
}
