package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/lb/ledger/consulstore"
)

// fleet is many replicas in one process, on one Consul.
type fleet struct {
	t       *testing.T
	consul  string
	daemons []*Daemon
}

// eventually polls until ok says nothing.
func eventually(t *testing.T, what string, ok func() string) {
	t.Helper()
	const patience, every = 60 * time.Second, 20 * time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		said := ok()
		if said == "" {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %s", what, patience, said)
		}
	}
}

// start starts n replicas at once, with the same services.
func (f *fleet) start(n int, services string) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	f.t.Cleanup(func() {
		cancel()
		wg.Wait()
		for _, d := range f.daemons {
			d.Close()
		}
	})
	var mu sync.Mutex
	var starting sync.WaitGroup
	for i := range n {
		dir := f.t.TempDir()
		path := filepath.Join(dir, "roost.yaml")
		yaml := fmt.Sprintf("node: h%d\ndata_dir: data\nadmin: {address: 127.0.0.1:0}\nxds: {address: 127.0.0.1:0}\ndns: {addresses: [127.0.0.1:0], forward: []}\n"+
			"discovery: {consul: {address: %q}}\nstore: {consul: {}}\naddresses: {internal: 127.180.0.0/27}\n%s", i, "http://"+f.consul, services)
		if err := os.WriteFile(path, []byte(yaml), 0o600); err != nil {
			f.t.Fatal(err)
		}
		c, err := config.Load(path)
		if err != nil {
			f.t.Fatal(err)
		}
		starting.Go(func() {
			d, err := New(ctx, c, slog.New(slog.DiscardHandler))
			if err != nil {
				f.t.Errorf("replica %d: %v", i, err)
				return
			}
			mu.Lock()
			f.daemons = append(f.daemons, d)
			mu.Unlock()
			wg.Go(func() {
				if err := d.Run(ctx); err != nil {
					f.t.Errorf("replica %d: %v", i, err)
				}
			})
		})
	}
	starting.Wait()
	eventually(f.t, "all are ready and know each other", func() string {
		for _, d := range f.daemons {
			if w := d.NotReady(); len(w) > 0 {
				return fmt.Sprint(w)
			}
			if list, _ := d.group.Others(); len(list) != n-1 {
				return fmt.Sprintf("%s knows %d others", d.start.Model.Node, len(list))
			}
		}
		return ""
	})
}

// TestFortyReplicas: forty Roosts that start at once, with services whose hashes
// collide in a small pool, agree on every address; a drain asked of one waits
// for all, and names the one that is silent.
func TestFortyReplicas(t *testing.T) {
	const replicas, services = 40, 24
	agent := binaries.StartConsul(t, binaries.ConsulConfig{Extra: "limits { http_max_conns_per_client = 2000 }"}) // all come from one address
	f := &fleet{t: t, consul: agent.HTTPAddr}
	yaml := "services:\n"
	for i := range services {
		yaml += fmt.Sprintf("  - {name: s%d, tenant: acme, ports: [{port: 80, protocol: http}], instances: [{id: i%d, address: \"192.0.2.1:%d\", node: h1}]}\n", i, i, 9000+i)
	}
	f.start(replicas, yaml)
	d := f.daemons[0]
	eventually(t, "they agree", func() string {
		want := owners(d)
		if len(want) != services {
			return fmt.Sprintf("%d addresses", len(want))
		}
		for _, other := range f.daemons[1:] {
			if diff := cmp.Diff(want, owners(other)); diff != "" {
				return other.start.Model.Node + ": " + diff
			}
		}
		return ""
	})
	if !slices.ContainsFunc(d.Records(), func(r ledger.Record) bool { return r.Probed }) {
		t.Error("no hashes collide: the pool is too large for this test")
	}
	before := owners(d)

	out, err := d.Drain(t.Context(), "i3", 20*time.Second)
	if err != nil || !out.Drained || out.TimedOut || len(out.Waiting) != 0 {
		t.Errorf("drain: %+v, %v", out, err)
	}
	// A drain ends when every replica has said so; all of them then let go.
	eventually(t, "it is drained everywhere", func() string {
		for _, other := range f.daemons {
			if e := other.Snapshot().Order[slices.IndexFunc(other.Snapshot().Order, func(s *lb.Service) bool { return s.Key.Service == "s3" })].Endpoints[0]; e.Drain != lb.Drained {
				return fmt.Sprintf("%s: %v", other.start.Model.Node, e.Drain)
			}
		}
		return ""
	})

	silent, err := consulstore.New(consulstore.Config{Address: "http://" + agent.HTTPAddr, Name: "silent"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	if err := silent.Announce(t.Context(), ledger.Replica{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is known", func() string {
		if list, _ := d.group.Others(); len(list) != replicas {
			return fmt.Sprint(len(list))
		}
		return ""
	})
	if out, err = d.Drain(t.Context(), "i4", 3*time.Second); err != nil || out.Drained || !slices.Contains(out.Waiting, "replica silent has not confirmed") {
		t.Errorf("with a silent replica: %+v, %v", out, err)
	}
	if diff := cmp.Diff(before, owners(d)); diff != "" {
		t.Errorf("an address has changed: %s", diff)
	}
}

func owners(d *Daemon) map[string]string {
	out := map[string]string{}
	for _, r := range d.Records() {
		if r.State == ledger.Bound {
			out[r.Owner.String()] = r.Address.String()
		}
	}
	return out
}

// TestConditionsAcrossReplicas: of clients of two replicas that may each make a
// service only where there is none, one does.
func TestConditionsAcrossReplicas(t *testing.T) {
	f := &fleet{t: t, consul: binaries.StartConsul(t, binaries.ConsulConfig{}).HTTPAddr}
	f.start(2, "")
	for i := range 15 {
		key := lb.Key{Tenant: "acme", Service: fmt.Sprintf("s%d", i)}
		var made, refused atomic.Int64
		var clients sync.WaitGroup
		for n, d := range f.daemons {
			clients.Go(func() {
				body := fmt.Sprintf(`{"ports": [{"port": %d}]}`, 80+n)
				switch _, _, err := d.PutService(t.Context(), key, []byte(body), Condition{None: true}); {
				case err == nil:
					made.Add(1)
				case errors.Is(err, ErrChanged):
					refused.Add(1)
				default:
					t.Errorf("%s: %v", key, err)
				}
			})
		}
		clients.Wait()
		if made.Load() != 1 || refused.Load() != 1 {
			t.Fatalf("%s: made %d times, refused %d times", key, made.Load(), refused.Load())
		}
	}
}
