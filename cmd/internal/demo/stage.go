package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

// ports are allocated loopback ports by name.
type ports map[string]int

func (p ports) at(name string) string { return "127.0.0.1:" + strconv.Itoa(p[name]) }

// freePorts finds ports that are free for UDP and TCP.
func freePorts() (ports, error) {
	out := ports{}
	var held []net.Listener
	defer func() {
		for _, l := range held {
			_ = l.Close()
		}
	}()
	for _, name := range []string{"admin", "xds", "dns", "web"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		held = append(held, l)
		out[name] = l.Addr().(*net.TCPAddr).Port
	}
	return out, nil
}

// freePool picks a /24 of 127.64.0.0/10 at random, so that a second demo or a
// real Roost does not collide, and looks whether somebody listens in it.
func freePool() (string, error) {
	const tries = 20
	for range tries {
		n := rand.IntN(1 << 14)
		net24 := fmt.Sprintf("127.%d.%d", 64+n>>8, n&0xff)
		l, err := net.Listen("tcp", fmt.Sprintf("%s.1:%d", net24, httpPort))
		if err != nil {
			continue
		}
		_ = l.Close()
		return net24 + ".0/24", nil
	}
	return "", fmt.Errorf("no free range in 127.64.0.0/10: does something listen on 0.0.0.0:%d? stop it for the demo", httpPort)
}

// write writes the config, once, and the instances of now.
func (s *stage) write() error {
	path := s.configPath()
	if _, err := os.Stat(path); err != nil {
		if err := os.WriteFile(path, s.configFile(), 0o600); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(s.dir, "services.d"), 0o700); err != nil {
			return err
		}
	}
	type row struct {
		Tenant  string `json:"tenant"`
		Service string `json:"service"`
		ID      string `json:"id"`
		Address string `json:"address"`
	}
	rows := []row{}
	for _, key := range [][2]string{{"acme", "shop"}, {"acme", "db"}, {"globex", "shop"}} {
		if a := s.at[key[0]+"/"+key[1]]; a != nil {
			rows = append(rows, row{key[0], key[1], key[1] + "-1", a.address})
		}
	}
	data, err := json.Marshal(map[string]any{"instances": rows})
	if err != nil {
		return err
	}
	// JSON is YAML; the rename makes the change one step.
	next := filepath.Join(s.dir, "next")
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(s.dir, "services.d", "instances.yaml"))
}

func (s *stage) configPath() string { return filepath.Join(s.dir, "roost.yaml") }

func (s *stage) configFile() []byte {
	return fmt.Appendf(nil, `node: demo
data_dir: data
admin: {address: %q}
xds: {address: %q}
dns: {addresses: [%q], forward: []}
discovery: {file: {path: services.d}}
addresses: {internal: %s}
loopback: all
tenants:
  acme: {clients: [10.1.0.0/16]}
  globex: {clients: [10.2.0.0/16]}
services:
  - {name: shop, tenant: acme, ports: [{port: %d, protocol: http}]}
  - {name: db, tenant: acme, ports: [{port: %d, protocol: tcp}]}
  - {name: shop, tenant: globex, ports: [{port: %d, protocol: http}]}
listeners:
  - {name: web, address: %q, protocol: http, gateway: edge}
routes:
  - {name: shop, tenant: acme, listeners: [web], hosts: [shop.example.com], to: [{service: shop}]}
`, s.ports.at("admin"), s.ports.at("xds"), s.ports.at("dns"), s.pool, httpPort, tcpPort, httpPort, s.ports.at("web"))
}

// child starts the roost binary; what it says goes into a file.
func (s *stage) child(name string, args ...string) (*binaries.Process, error) {
	out, err := os.OpenFile(filepath.Join(s.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	cmd := exec.Command(s.config.Program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, out, out
	cmd.Env = append(os.Environ(), binaries.EnvoyEnv+"="+s.config.Envoy, "ROOST_CONFIG=", "ROOST_ADDR=")
	return binaries.Start(cmd)
}

// startRun starts `roost run` and waits until it is ready.
func (s *stage) startRun(ctx context.Context) error {
	p, err := s.child("run", "run", "--config", s.configPath())
	if err != nil {
		return err
	}
	s.run = p
	return poll(ctx, startTimeout, func() error {
		select {
		case <-p.Done():
			return permanent{fmt.Errorf("roost run has ended: %s%s", p.Ending(), s.logs())}
		default:
		}
		return s.get(ctx, "/readyz", nil, nil)
	})
}

// permanent is an error that no waiting mends.
type permanent struct{ error }

func poll(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		var p permanent
		if err == nil || errors.As(err, &p) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

func (s *stage) get(ctx context.Context, path string, query url.Values, v any) error {
	target := "http://" + s.ports.at("admin") + path
	if query != nil {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, res.Status)
	}
	if v == nil {
		return nil
	}
	return json.NewDecoder(res.Body).Decode(v)
}

// resolve asks what DNS answers to a caller.
func (s *stage) resolve(ctx context.Context, name, from string) (string, error) {
	var a struct{ Rcode string }
	err := s.get(ctx, "/api/v1/dns/resolve", url.Values{"name": {name}, "from": {from}}, &a)
	return a.Rcode, err
}

// lookup asks Roost's DNS server over the wire.
func (s *stage) lookup(ctx context.Context, name string) (string, error) {
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, s.ports.at("dns"))
	}}
	ips, err := r.LookupNetIP(ctx, "ip4", name+".")
	if err != nil {
		return "", err
	}
	return ips[0].Unmap().String(), nil
}
