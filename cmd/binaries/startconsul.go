package binaries

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// ConsulToken is the token that may do everything in an agent with ACLs.
	ConsulToken = "00000000-0000-4000-8000-000000000001"

	consulGrace = 5 * time.Second // between SIGTERM and SIGKILL
)

// ConsulConfig describes the Consul agent that a test wants.
type ConsulConfig struct {
	Node string // its node's name; empty: h1
	// DataDir keeps the state of a single server; empty: dev mode, whose state ends with the process.
	DataDir string
	TLS     bool   // an HTTPS port, too, with a certificate of its own
	ACL     bool   // deny everything to those without a token
	Extra   string // further configuration in HCL
}

// ConsulAgent is a Consul that a test started; it ends with the test.
type ConsulAgent struct {
	HTTPAddr  string // host:port
	HTTPSAddr string // the same for TLS; empty: none
	CAFile    string // PEM of the authority of its certificate; empty: none
	Token     string // with ACLs: the one that may do everything
	Log       *Log   // its standard output and error

	t    TB
	path string
	args []string
	run  *Process
}

// StartConsul runs the Consul of ConsulForTest on free loopback ports and returns when it has a leader and takes a write.
// What Consul said is logged when the test fails.
func StartConsul(t TB, c ConsulConfig) *ConsulAgent {
	t.Helper()
	a := &ConsulAgent{t: t, path: ConsulForTest(t), Log: &Log{}}
	dir := t.TempDir()
	config, err := a.configure(dir, c)
	if err != nil {
		t.Fatalf("consul: %v", err)
	}
	file := filepath.Join(dir, "consul.hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatalf("consul: %v", err)
	}
	a.args = []string{"agent", "-config-file", file, "-bind", "127.0.0.1", "-client", "127.0.0.1", "-log-level", "warn"}
	if c.DataDir == "" {
		a.args = append(a.args, "-dev")
	} else {
		a.args = append(a.args, "-server", "-bootstrap-expect", "1", "-data-dir", c.DataDir)
	}
	t.Cleanup(func() {
		a.Stop()
		if t.Failed() {
			t.Logf("consul said:\n%s", a.Log.String())
		}
	})
	a.Restart()
	return a
}

// configure picks the ports and writes the agent's configuration and, for TLS, its certificate.
func (a *ConsulAgent) configure(dir string, c ConsulConfig) (string, error) {
	ports, err := freePorts(4)
	if err != nil {
		return "", err
	}
	a.HTTPAddr = fmt.Sprintf("127.0.0.1:%d", ports[0])
	node := c.Node
	if node == "" {
		node = "h1"
	}
	https := -1
	var b strings.Builder
	if c.TLS {
		https = ports[3]
		a.HTTPSAddr = fmt.Sprintf("127.0.0.1:%d", https)
		a.CAFile = filepath.Join(dir, "ca.pem")
		cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
		if err := writeKeyPair(a.CAFile, cert, key); err != nil {
			return "", err
		}
		_, _ = fmt.Fprintf(&b, "tls { https { cert_file = %q key_file = %q } }\n", cert, key)
	}
	if c.ACL {
		a.Token = ConsulToken
		_, _ = fmt.Fprintf(&b, "acl { enabled = true default_policy = \"deny\" tokens { initial_management = %q agent = %q } }\n", ConsulToken, ConsulToken)
	}
	_, _ = fmt.Fprintf(&b, "node_name = %q\ndisable_update_check = true\nperformance { raft_multiplier = 1 }\n", node)
	_, _ = fmt.Fprintf(&b, "ports { http = %d https = %d dns = -1 grpc = -1 grpc_tls = -1 serf_lan = %d serf_wan = -1 server = %d }\n%s\n", ports[0], https, ports[1], ports[2], c.Extra)
	return b.String(), nil
}

// Restart starts the agent again on the same ports, after Stop or Kill, and returns when it is ready.
func (a *ConsulAgent) Restart() {
	a.t.Helper()
	cmd := exec.Command(a.path, a.args...)
	cmd.Stdout, cmd.Stderr = a.Log, a.Log
	run, err := Start(cmd)
	if err != nil {
		a.t.Fatalf("consul: %v", err)
	}
	a.run = run
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	if err := Poll(ctx, readyPoll, func() error { return a.ready(ctx, cancel) }); err != nil {
		a.t.Fatalf("consul is not up: %v\n%s", err, a.Log.String())
	}
}

// ready tells whether the agent has a leader that takes writes; one that has ended never will.
func (a *ConsulAgent) ready(ctx context.Context, giveUp func()) error {
	select {
	case <-a.run.Done():
		giveUp()
		return fmt.Errorf("ended: %s", a.run.Ending())
	default:
	}
	leader, err := a.do(ctx, http.MethodGet, "/v1/status/leader", "")
	if err != nil {
		return err
	}
	if len(leader) <= len(`""`) {
		return errors.New("it has no leader")
	}
	_, err = a.do(ctx, http.MethodPut, "/v1/kv/ready", "yes")
	return err
}

func (a *ConsulAgent) do(ctx context.Context, method, path, body string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+a.HTTPAddr+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	if a.Token != "" {
		req.Header.Set("X-Consul-Token", a.Token)
	}
	// No connection is kept: a leak check would find it.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	out, err := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %.200s", method, path, res.Status, out)
	}
	return strings.TrimSpace(string(out)), err
}

// Stop ends the agent in good order; one that has ended stays so.
func (a *ConsulAgent) Stop() {
	if a.run != nil {
		a.run.Stop(consulGrace)
	}
}

// Kill ends the agent as a crash would, and returns when it has ended.
func (a *ConsulAgent) Kill() {
	a.t.Helper()
	if err := a.run.Signal(syscall.SIGKILL); err != nil {
		a.t.Fatalf("consul: %v", err)
	}
	<-a.run.Done()
}

// freePorts are loopback ports that nobody holds now. They lie below those that the kernel gives out by itself, so that they
// are still free for a restart.
func freePorts(n int) ([]int, error) {
	const lowest, highest, tries = 21000, 31999, 1000
	var ports []int
	for range tries {
		if len(ports) == n {
			return ports, nil
		}
		port := lowest + mathrand.IntN(highest-lowest+1)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		defer func() { _ = l.Close() }() // all are held at once, so that they differ
		ports = append(ports, port)
	}
	return nil, fmt.Errorf("no %d free ports from %d to %d", n, lowest, highest)
}

// writeKeyPair writes an authority and the key pair that it issued for loopback, for a day.
func writeKeyPair(caFile, certFile, keyFile string) error {
	now := time.Now()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "consul"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		path, kind string
		der        []byte
	}{{caFile, "CERTIFICATE", caDER}, {certFile, "CERTIFICATE", leafDER}, {keyFile, "PRIVATE KEY", keyDER}} {
		if err := os.WriteFile(f.path, pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der}), 0o600); err != nil {
			return err
		}
	}
	return nil
}
