package consulstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"go.uber.org/goleak"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/lb/ledger"
)

const (
	helperEnv  = "CONSULSTORE_TEST_HELPER"
	management = "0c9f0a5c-management"
	patience   = 60 * time.Second
)

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		if err := writeUntilRefused(os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(withAgent{m})
}

// withAgent ends the agent that the tests share.
type withAgent struct{ m *testing.M }

func (w withAgent) Run() int {
	code := w.m.Run()
	if a := shared.Load(); a != nil {
		a.stop()
		_ = os.RemoveAll(a.dir)
	}
	return code
}

var (
	shared   atomic.Pointer[agent]
	sharing  sync.Mutex
	prefixes atomic.Int64
)

// agent is a real Consul, one server.
type agent struct {
	dir, file, address string
	program            string
	process            *binaries.Process
	log                *binaries.Log
	client             *api.Client
}

// consul is the agent that all tests share, each below a prefix of its own.
func consul(t *testing.T) *agent {
	t.Helper()
	sharing.Lock()
	defer sharing.Unlock()
	if a := shared.Load(); a != nil {
		return a
	}
	dir, err := os.MkdirTemp("", "consulstore")
	if err != nil {
		t.Fatal(err)
	}
	a := newAgent(t, dir)
	shared.Store(a)
	return a
}

func newAgent(t *testing.T, dir string) *agent {
	t.Helper()
	a := &agent{dir: dir, file: filepath.Join(dir, "consul.hcl"), program: binaries.ConsulForTest(t), log: &binaries.Log{}}
	ports := freePorts(t, 7)
	a.address = fmt.Sprintf("127.0.0.1:%d", ports[0])
	config := fmt.Sprintf(`disable_update_check = true
node_name = "h1"
server = true
bootstrap_expect = 1
bind_addr = "127.0.0.1"
data_dir = %q
session_ttl_min = "1s"
performance { raft_multiplier = 1 }
acl { enabled = true default_policy = "allow" tokens { initial_management = %q } }
`, filepath.Join(dir, "data"), management) + fmt.Sprintf("ports { http = %d https = -1 dns = %d grpc = %d grpc_tls = %d serf_lan = %d serf_wan = %d server = %d }\n", ports...)
	if err := os.WriteFile(a.file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if a.client, err = api.NewClient(&api.Config{Address: a.address}); err != nil {
		t.Fatal(err)
	}
	a.start(t)
	return a
}

// freePorts are loopback ports that nobody has now.
func freePorts(t *testing.T, n int) (ports []any) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}

func (a *agent) start(t *testing.T) {
	t.Helper()
	launch := func() {
		cmd := exec.Command(a.program, "agent", "-config-file", a.file, "-log-level", "error")
		cmd.Stdout, cmd.Stderr = a.log, a.log
		var err error
		if a.process, err = binaries.Start(cmd); err != nil {
			t.Fatal(err)
		}
	}
	launch()
	until(t, "consul takes writes", func() error {
		select {
		case <-a.process.Done():
			// A connection of somebody's may have taken one of its ports for a moment.
			ending := a.process.Ending()
			launch()
			return fmt.Errorf("consul ended: %s: %s", ending, a.log)
		default:
		}
		// A session needs the node to be registered.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		o := (&api.WriteOptions{}).WithContext(ctx)
		id, _, err := a.client.Session().CreateNoChecks(&api.SessionEntry{TTL: "1s"}, o)
		if err == nil {
			_, err = a.client.Session().Destroy(id, o)
		}
		return err
	})
}

func (a *agent) stop() {
	a.process.Stop(5 * time.Second)
}

func until(t *testing.T, what string, f func() error) {
	t.Helper()
	if err := eventually(f); err != nil {
		t.Fatalf("%s: not within %s: %v", what, patience, err)
	}
}

// eventually calls f until it succeeds or patience ends.
func eventually(f func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return binaries.Poll(ctx, 20*time.Millisecond, f)
}

func newPrefix() string { return fmt.Sprintf("test-%d/", prefixes.Add(1)) }

func (a *agent) store(t *testing.T, prefix, name string, change ...func(*Config)) *Store {
	t.Helper()
	c := Config{Address: "http://" + a.address, Prefix: prefix, Name: name, TTL: 10 * time.Second}
	for _, f := range change {
		f(&c)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (a *agent) ledger(t *testing.T, prefix, name string) (*ledger.Ledger, *Store) {
	t.Helper()
	s := a.store(t, prefix, name)
	l, err := ledger.Open(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	return l, s
}

func (a *agent) put(t *testing.T, key, value string) {
	t.Helper()
	if _, err := a.client.KV().Put(&api.KVPair{Key: key, Value: []byte(value)}, nil); err != nil {
		t.Fatal(err)
	}
}

func (a *agent) get(t *testing.T, key string) string {
	t.Helper()
	p, _, err := a.client.KV().Get(key, nil)
	if err != nil || p == nil {
		t.Fatalf("%s: %v %v", key, p, err)
	}
	return string(p.Value)
}

// run keeps a store's session alive until the test ends.
func run(t *testing.T, s *Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func owner(n int) ledger.Owner { return ledger.Owner{Tenant: "acme", Service: fmt.Sprint("s", n)} }

func wish(o ledger.Owner, cidr string) ledger.Wish {
	return ledger.Wish{Owner: o, Pool: ledger.Pool{Name: cidr, Kind: ledger.Internal, Prefix: netip.MustParsePrefix(cidr)}}
}

func bind(t *testing.T, l *ledger.Ledger, o ledger.Owner) ledger.Record {
	t.Helper()
	if _, refused, err := l.Bind(t.Context(), []ledger.Wish{wish(o, "127.130.0.0/16")}, "test"); err != nil || len(refused) > 0 {
		t.Fatal(err, refused)
	}
	r, ok := l.Lookup(o, ledger.Internal, false)
	if !ok {
		t.Fatalf("%s has no address after Bind", o)
	}
	return r
}

// wantErr checks that an error is one of a kind and names the Consul and more.
func wantErr(t *testing.T, what string, err, is error, a *agent, says ...string) {
	t.Helper()
	if err == nil || is != nil && !errors.Is(err, is) {
		t.Errorf("%s: %v, want %v", what, err, is)
		return
	}
	for _, s := range append(says, a.address) {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v, want %q", what, err, s)
		}
	}
}

// writeUntilRefused writes generation after generation and prints each, until a
// write is refused.
func writeUntilRefused(address, prefix string) error {
	s, err := New(Config{Address: address, Prefix: prefix, Name: "child", TTL: 2 * time.Second})
	if err != nil {
		return err
	}
	ctx := context.Background()
	l, err := ledger.Open(ctx, s, nil)
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		if _, _, err := l.Bind(ctx, []ledger.Wish{wish(owner(n), "127.130.0.0/16")}, "test"); err != nil {
			if errors.Is(err, ledger.ErrSessionLost) {
				fmt.Println("refused")
				return nil
			}
			return err
		}
		fmt.Println(l.Generation())
	}
}
