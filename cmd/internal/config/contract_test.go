package config

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"

	"github.com/roostmesh/roost/lb"
)

// contract is every key of the config file, as the documentation shows it.
const contract = `
domain: roost
datacenter: dc1
node: h1
trust_domain: roost
data_dir: /var/lib/roost
admin: {address: 127.0.0.1:7480, socket: ""}
xds:
  address: 127.0.0.1:7481
  insecure: false
  sockets: [{path: /run/roost/acme.sock, tenant: acme, mode: "0660", group: ""}]
log:   {level: info, format: text}
access_log: {format: json, proxies: gateway, errors: all}
dns:
  addresses: [127.0.0.1:7453, {address: "127.0.0.1:7454", tenant: acme}]
  ttl: 5s
  forward: [/etc/resolv.conf, {zone: consul, to: ["127.0.0.1:8600"]}]
discovery:
  consul: {address: "http://127.0.0.1:8500", token_file: "", default_tenant: "", max_connections: 150, tenant_meta: roost-tenant, tls: {ca_file: ca.pem, cert_file: c.pem, key_file: k.pem, server_name: consul}}
  file:   {path: services.d}
addresses:
  internal: 127.128.0.0/9
  quarantine: 10m
  dedicated:
    public: {cidr: 198.51.100.16/28, interface: eth0}
capture: {node: bind, sidecar: bind}
loopback: all
tenants:
  acme:   {clients: [10.42.0.0/16, {cidr: 172.20.0.0/16, node: h1}]}
  globex: {hosts: ["*.globex.example.com"]}
services:
  - name: shop
    tenant: acme
    ports: [{name: http, port: 80, protocol: http}]
    allow: [globex/web]
    dedicated_ip: {pool: public}
    load_balancing: {policy: least_request}
    health_check: {http: {path: /healthz}, interval: 2s}
    outlier_detection: {consecutive_5xx: 5, ejection_time: 30s}
    circuit_breaker: {max_connections: 1024}
    timeout: 15s
    retry: {on: [connect-failure, refused-stream, 503], attempts: 2}
    drain: {timeout: 30s}
    instances:
      - {id: shop-1, address: 127.0.0.1:9001, node: h1, weight: 1, zone: a, version: v1}
listeners:
  - {name: web, address: 0.0.0.0:8080, protocol: http, gateway: edge}
  - {name: websecure, address: 0.0.0.0:8443, protocol: https, gateway: edge, redirect_from: web, external_port: 443, certificates: [{cert_file: shop.crt, key_file: shop.key}]}
routes:
  - name: shop
    tenant: acme
    listeners: [websecure]
    hosts: [shop.example.com]
    match: {path_prefix: /, methods: [GET], headers: [{name: x-beta, exact: "1"}], query: [{name: q, prefix: a}]}
    to: [{service: shop, version: v1, weight: 90}, {service: shop, version: v2, weight: 10}]
    timeout: 5s
`

// TestTheContractsFile: the loader and the schema take every key that the
// documentation shows, and mean what it says.
func TestTheContractsFile(t *testing.T) {
	c, bad := load(t, contract, nil)
	if bad != "" {
		t.Fatal(bad)
	}
	if err := validate(t, contract); err != nil {
		t.Errorf("the schema refuses it: %v", err)
	}
	shop := c.Model.Services[0]
	if diff := cmp.Diff(&lb.Retry{On: []string{"connect-failure", "refused-stream", "503"}, Attempts: 2}, shop.Retry); diff != "" {
		t.Error(diff)
	}
	if shop.HealthCheck.HTTPPath != "/healthz" || shop.OutlierDetection.Consecutive5xx != 5 || shop.CircuitBreaker.MaxConnections != 1024 || shop.Policy != "least_request" || shop.DrainTimeout.String() != "30s" || shop.DedicatedPool != "public" {
		t.Errorf("service %+v", shop)
	}
	if l := c.Model.Listeners[1]; l.RedirectFrom != "web" || l.ExternalPort != 443 || !strings.HasSuffix(l.Certificates[0].KeyFile, "/shop.key") || !strings.HasPrefix(l.Certificates[0].KeyFile, "/") {
		t.Errorf("listener %+v", l)
	}
	if r := c.Model.Routes[0]; r.To[0].Weight != 90 || r.To[1].Version != "v2" || r.Match.Methods[0] != "GET" || r.Match.Query[0].Prefix != "a" {
		t.Errorf("route %+v", r)
	}
	if s := c.XDS.Sockets[0]; s.Mode != 0o660 || s.Tenant != "acme" || c.DNS.Listen[1].Tenant != "acme" || c.DNS.Forward[1].Zone != "consul" || c.Consul.ServerName != "consul" {
		t.Errorf("socket %+v, dns %+v, consul %+v", s, c.DNS, c.Consul)
	}
}

// TestSchemaRefuses: what a schema can see to be wrong, it does; the loader
// refuses all of it, too.
func TestSchemaRefuses(t *testing.T) {
	for _, change := range [][2]string{
		{"domain: roost", "domian: roost"}, {"port: 80", "port: 70000"}, {"port: 80", "port: -1"}, {"port: 80", "port: eighty"}, {"protocol: http}]", "protocol: htp}]"},
		{"policy: least_request", "policy: fastest"}, {"level: info", "level: loud"}, {"proxies: gateway", "proxies: some"}, {"node: bind", "node: magic"},
		{"listeners: [websecure]", "listeners: websecure"}, {"tenants:\n  acme:   {", "tenants:\n  acme:   {color: red, "}, {"attempts: 2", "attempts: many"}, {"insecure: false", "insecure: perhaps"},
	} {
		text := strings.Replace(contract, change[0], change[1], 1)
		if text == contract {
			t.Fatalf("%q is not in the file", change[0])
		}
		if validate(t, text) == nil {
			t.Errorf("the schema takes %q", change[1])
		}
		if _, bad := load(t, text, nil); bad == "" {
			t.Errorf("the loader takes %q", change[1])
		}
	}
}

func validate(t *testing.T, text string) error {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema()))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("roost.json", doc); err != nil {
		t.Fatal(err)
	}
	var v any
	if err := yaml.Load([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return compiler.MustCompile("roost.json").Validate(v)
}
