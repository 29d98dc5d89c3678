package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const gatewayRoutes = `
services:
  - {name: shop, tenant: acme, ports: [{port: 18083, protocol: http}], dedicated_ip: {pool: public}, instances: [{id: v1, address: "127.0.0.31:9001", version: v1}, {id: v2, address: "127.0.0.32:9001", version: v2}]}
  - {name: empty, tenant: acme, ports: [{port: 18083, protocol: http}]}
  - {name: sick, tenant: acme, ports: [{port: 18083, protocol: http}], instances: [{id: s, address: "127.0.0.31:9001", health: critical}]}
routes:
  - {name: exact, tenant: acme, listeners: [web], hosts: [shop.example.com], match: {path: /exact}, to: [{service: shop, version: v1}]}
  - {name: beta, tenant: acme, listeners: [web], hosts: [shop.example.com], match: {path_prefix: /, headers: [{name: X-Beta, exact: "1"}]}, to: [{service: shop, version: v2}]}
  - {name: post, tenant: acme, listeners: [web], hosts: [shop.example.com], match: {path_prefix: /write, methods: [POST, PUT]}, to: [{service: shop, version: v2}]}
  - {name: query, tenant: acme, listeners: [web], hosts: [shop.example.com], match: {path_prefix: /find, query: [{name: q, prefix: a}]}, to: [{service: shop, version: v2}]}
  - {name: regex, tenant: acme, listeners: [web], hosts: ["*.example.com"], match: {path_regex: "/r[0-9]+"}, to: [{service: shop, version: v1}]}
  - {name: not, tenant: acme, listeners: [web], hosts: ["not.example.com"], match: {headers: [{name: x-no, exact: "1", invert: true}]}, to: [{service: shop, version: v1}]}
  - {name: api, tenant: acme, listeners: [web], hosts: [shop.example.com], match: {path_prefix: /api}, to: [{service: shop, version: v1}]}
  - {name: api-v2, tenant: acme, listeners: [web], hosts: [shop.example.com], match: {path_prefix: /api/v2}, to: [{service: shop, version: v2}]}
  - {name: empty, tenant: acme, listeners: [web], hosts: [empty.example.com], to: [{service: empty}]}
  - {name: sick, tenant: acme, listeners: [web], hosts: [sick.example.com], to: [{service: sick}]}
  - {name: ghost, tenant: acme, listeners: [web], hosts: [ghost.example.com], to: [{service: ghost}]}
`

// TestExplainAgreesWithEnvoy asks a real gateway and Explain the same, for many
// requests, and compares what comes back.
func TestExplainAgreesWithEnvoy(t *testing.T) {
	port := freePort(t)
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.152.0.0/16, dedicated: {public: {cidr: 127.199.0.0/24}}",
		fmt.Sprintf("listeners:\n  - {name: web, address: \"127.0.0.1:%d\", protocol: http, gateway: edge}\n", port)+gatewayRoutes)).serve()
	h.app("http", "v1", "127.0.0.31:9001")
	h.app("http", "v2", "127.0.0.32:9001")
	r.envoy("--gateway", "edge")
	base := fmt.Sprintf("http://127.0.0.1:%d", port)
	until(t, "the gateway answers", func() error {
		if got := h.call("http", base+"/r1"); !strings.HasPrefix(got, "404 no_host") {
			return errors.New(got) // a host that no route has: the routes are there
		}
		return nil
	})
	asked := 0
	for _, hostname := range []string{"shop.example.com", "SHOP.example.com", "shop.example.com:1234", "other.example.com", "not.example.com", "empty.example.com", "sick.example.com", "ghost.example.com", "nowhere.org", "example.com"} {
		for _, path := range []string{"/", "/exact", "/exact/", "/r12", "/r12x", "/api", "/api/v2/x", "/apix", "/write", "/find?q=abc", "/find?q=b", "//api//v2", "/a/../api"} {
			for _, header := range []map[string]string{nil, {"X-Beta": "1"}, {"X-Beta": "2", "X-No": "1"}} {
				method := []string{http.MethodGet, http.MethodPost}[asked%2]
				asked++
				got := ask(t, base+path, method, hostname, header)
				want := r.explained(t, base+path, method, hostname, header)
				if got.status != want.status || got.reason != want.reason || got.body != want.body && want.body != "" {
					t.Errorf("%s %s%s %v: Envoy %+v, Explain %+v", method, hostname, path, header, got, want)
				}
			}
		}
	}
	if asked < 300 {
		t.Errorf("only %d requests were compared", asked)
	}
	var s serviceJSON
	r.json(&s, "service", "show", "acme/shop")
	if s.DedicatedIP == nil {
		t.Fatal("no dedicated IP")
	}
	if got := h.call("http", "http://"+*s.DedicatedIP+":18083/"); got != "200  v1" && got != "200  v2" {
		t.Errorf("the dedicated IP answers %q", got)
	}
}

type outcome struct {
	status       int
	reason, body string
}

func ask(t *testing.T, url, method, hostname string, headers map[string]string) outcome {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = hostname
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return outcome{res.StatusCode, res.Header.Get("x-roost-reason"), string(data)}
}

// explained is what Explain expects Envoy to answer.
func (r *roost) explained(t *testing.T, target, method, hostname string, headers map[string]string) outcome {
	t.Helper()
	query := url.Values{"url": {target}, "method": {method}, "header": {"Host:" + hostname}}
	for k, v := range headers {
		query.Add("header", k+":"+v)
	}
	res, err := http.Get("http://" + r.args + "/api/v1/explain?" + query.Encode())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	var e struct {
		Outcome string
		To      []struct{ Version string }
	}
	if err := json.NewDecoder(res.Body).Decode(&e); err != nil {
		t.Fatal(err)
	}
	switch e.Outcome {
	case "routed":
		return outcome{http.StatusOK, "", e.To[0].Version}
	case "no_host", "no_route":
		return outcome{http.StatusNotFound, e.Outcome, ""}
	case "no_endpoint", "no_healthy_endpoint":
		return outcome{http.StatusServiceUnavailable, e.Outcome, ""}
	}
	t.Fatalf("explain: %+v", e)
	return outcome{}
}

// pair writes a certificate for a name, with a serial number to know it by, and
// replaces both files by rename.
func pair(t *testing.T, dir, file, name string, serial int64, notAfter time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter, DNSNames: []string{name}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for ext, block := range map[string]*pem.Block{".key": {Type: "EC PRIVATE KEY", Bytes: private}, ".crt": {Type: "CERTIFICATE", Bytes: der}} {
		next := filepath.Join(dir, ".next")
		if err := os.WriteFile(next, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(dir, file+ext)); err != nil {
			t.Fatal(err)
		}
	}
}

// handshake returns the serial number and protocol that a TLS client gets.
func handshake(address, name string) (serial int64, protocol string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}} // what is served is looked at, not trusted
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = conn.Close() }()
	state := conn.(*tls.Conn).ConnectionState()
	return state.PeerCertificates[0].SerialNumber.Int64(), state.NegotiatedProtocol, nil
}

// TestCertificatesBySNI: the most specific certificate answers, an unknown name
// gets an alert, a renewed file is served without a dropped connection, a bad
// one leaves the last good one in place.
func TestCertificatesBySNI(t *testing.T) {
	far := time.Now().Add(90 * 24 * time.Hour)
	port, plain := freePort(t), freePort(t)
	address := fmt.Sprintf("127.0.0.1:%d", port)
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.153.0.0/16", fmt.Sprintf(`
services:
  - {name: shop, tenant: acme, ports: [{port: 18084, protocol: http}], instances: [{id: v1, address: "127.0.0.33:9001"}]}
listeners:
  - {name: web, address: "127.0.0.1:%d", protocol: http, gateway: edge}
  - {name: websecure, address: "%s", protocol: https, gateway: edge, redirect_from: web, external_port: 443, certificates: [{cert_file: wild.crt, key_file: wild.key}, {cert_file: shop.crt, key_file: shop.key}]}
routes:
  - {name: shop, tenant: acme, listeners: [websecure], to: [{service: shop}]}
`, plain, address)))
	pair(t, r.dir, "wild", "*.example.com", 1, far)
	pair(t, r.dir, "shop", "shop.example.com", 2, far)
	r.serve()
	h.app("http", "v1", "127.0.0.33:9001")
	r.envoy("--gateway", "edge/one")
	until(t, "https answers", func() error { _, _, err := handshake(address, "shop.example.com"); return err })
	for name, want := range map[string]int64{"shop.example.com": 2, "other.example.com": 1} {
		if serial, protocol, err := handshake(address, name); serial != want || protocol != "h2" || err != nil {
			t.Errorf("%s gets certificate %d over %q (%v), want %d over h2", name, serial, protocol, err, want)
		}
	}
	var alert *net.OpError
	if _, _, err := handshake(address, "unknown.org"); !errors.As(err, &alert) || alert.Op != "remote error" {
		t.Errorf("an unknown name gets %v, want a TLS alert", err)
	}
	o := ask(t, fmt.Sprintf("http://127.0.0.1:%d/a?b=1", plain), http.MethodGet, "shop.example.com:1234", nil)
	if o.status != http.StatusPermanentRedirect {
		t.Errorf("plain HTTP gets %+v, want a redirect", o)
	}

	// Nothing that a person is shown has a key in it.
	for _, args := range [][]string{{"translate", "--config", r.config}, {"config", "gateway~edge~one", "-o", "json"}, {"certificates", "-o", "json"}} {
		code, out, errOut := r.cli(args...)
		if code != 0 || !strings.Contains(out, "websecure") && args[0] != "certificates" {
			t.Fatalf("roost %v: exit %d %s", args, code, errOut)
		}
		if strings.Contains(out, "PRIVATE") || strings.Contains(out, "private_key\":") || strings.Contains(out, "privateKey") {
			t.Errorf("roost %v shows a private key", args)
		}
	}

	// A connection that was there before the renewal goes on.
	old, err := tls.Dial("tcp", address, &tls.Config{ServerName: "shop.example.com", InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = old.Close() }()
	pair(t, r.dir, "shop", "shop.example.com", 3, far)
	until(t, "the renewed certificate is served", func() error {
		serial, _, err := handshake(address, "shop.example.com")
		if err == nil && serial != 3 {
			err = fmt.Errorf("it is still %d", serial)
		}
		return err
	})
	if _, err := io.WriteString(old, "GET / HTTP/1.1\r\nHost: shop.example.com\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(old); err != nil || !strings.Contains(string(answer), "200 OK") {
		t.Errorf("the old connection: %v %q", err, answer)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "shop.crt"), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p := r.problem("certificate_invalid"); !strings.Contains(p.Place, "roost.yaml:") || !strings.Contains(p.Message, "no PEM block") {
		t.Errorf("problem %+v", p)
	}
	if serial, _, err := handshake(address, "shop.example.com"); serial != 3 || err != nil {
		t.Errorf("with a bad file the certificate is %d (%v), want the last good one", serial, err)
	}
}
