package consulstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/lb/ledger"
)

// agree loads what the store has into every ledger and checks that all hold the
// same, and no address twice.
func agree(t *testing.T, all []*ledger.Ledger, s *Store) ledger.State {
	t.Helper()
	state := load(t, s)
	for n, l := range all {
		if _, err := l.Adopt(state); err != nil {
			t.Fatalf("ledger %d: %v", n, err)
		}
		same(t, fmt.Sprintf("ledger %d", n), all[0].State(), l.State())
	}
	seen := map[netip.Addr]ledger.Owner{}
	for _, r := range state.Records {
		if o, ok := seen[r.Address]; ok {
			t.Errorf("%s belongs to %s and %s", r.Address, o, r.Owner)
		}
		seen[r.Address] = r.Owner
	}
	return state
}

// TestTwoReplicasBindTheSameServices in other orders, at once: each service gets
// one address, and both hear of it.
func TestTwoReplicasBindTheSameServices(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	const services = 500
	var all []*ledger.Ledger
	var g errgroup.Group
	var last *Store
	for n := range 2 {
		l, s := a.ledger(t, prefix, fmt.Sprint("r", n))
		all, last = append(all, l), s
		g.Go(func() error {
			order := rand.Perm(services)
			for len(order) > 0 {
				size := min(len(order), 1+rand.IntN(40))
				var wishes []ledger.Wish
				for _, i := range order[:size] {
					wishes = append(wishes, wish(owner(i), "127.130.0.0/23"))
				}
				if _, refused, err := l.Bind(t.Context(), wishes, "test"); err != nil || len(refused) > 0 {
					return fmt.Errorf("%v: %w", refused, err)
				}
				order = order[size:]
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	state := agree(t, all, last)
	if len(state.Records) != services {
		t.Errorf("%d records, want %d", len(state.Records), services)
	}
	t.Logf("adopted %d and %d times", all[0].Foreign(), all[1].Foreign())
}

// TestFortyStoresAndATinyPool: their hashes collide; whoever is first has the
// address, and everybody agrees on who that was.
func TestFortyStoresAndATinyPool(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	const stores, room = 40, 30
	var all []*ledger.Ledger
	var g errgroup.Group
	var last *Store
	var refusals atomic.Int64
	for n := range stores {
		l, s := a.ledger(t, prefix, fmt.Sprint("r", n))
		all, last = append(all, l), s
		g.Go(func() error {
			_, refused, err := l.Bind(t.Context(), []ledger.Wish{wish(owner(n), "127.130.0.0/27")}, "test")
			refusals.Add(int64(len(refused)))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	state := agree(t, all, last)
	probed := 0
	for _, r := range state.Records {
		if r.Probed {
			probed++
		}
	}
	if len(state.Records) != room || refusals.Load() != stores-room || probed == 0 {
		t.Errorf("%d records, %d probed, %d refused", len(state.Records), probed, refusals.Load())
	}
}

// TestAStoppedReplicaWritesNothing: its process is stopped for longer than its
// session lives, and goes on.
func TestAStoppedReplicaWritesNothing(t *testing.T) {
	t.Parallel() // it waits most of the time
	a, prefix := consul(t), newPrefix()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "http://"+a.address, prefix)
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	out, problem := &binaries.Log{}, &binaries.Log{}
	cmd.Stdout, cmd.Stderr = out, problem
	child, err := binaries.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Stop(0) })
	until(t, "the child writes", func() error {
		if !strings.HasPrefix(out.String(), "1\n") {
			return fmt.Errorf("%q %s", out, problem)
		}
		return nil
	})
	if err := child.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, "the session has ended", func() error {
		p, _, err := a.client.KV().Get(prefix+"replicas/child", nil)
		if err == nil && p != nil {
			err = errors.New("the key is there")
		}
		return err
	})
	before := a.get(t, prefix+"generation")
	if err := child.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	<-child.Done()
	if !strings.HasSuffix(out.String(), "refused\n") || child.Ending() != "exit status 0" {
		t.Errorf("%q, %s: %s", out, child.Ending(), problem)
	}
	if after := a.get(t, prefix+"generation"); after != before {
		t.Errorf("generation %s, then %s", before, after)
	}
}

func TestALostSessionWritesNothing(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	l, s := a.ledger(t, prefix, "one")
	first := bind(t, l, owner(1))
	if _, err := a.client.Session().Destroy(s.session, nil); err != nil {
		t.Fatal(err)
	}
	before := a.get(t, prefix+"generation")
	_, _, err := l.Bind(t.Context(), []ledger.Wish{wish(owner(2), "127.130.0.0/16")}, "test")
	wantErr(t, "a write with a lost session", err, ledger.ErrSessionLost, a, prefix+"replicas/one")
	if after := a.get(t, prefix+"generation"); after != before || len(l.Records()) != 1 {
		t.Errorf("generation %s, then %s; %d records", before, after, len(l.Records()))
	}
	if again := bind(t, l, owner(2)); again.Address == first.Address || l.Generation() != 2 {
		t.Errorf("with a new session: %+v", again)
	}
}

// between is a proxy in front of Consul that can change what happens to a
// transaction.
func (a *agent) between(t *testing.T, txn func(w http.ResponseWriter, r *http.Request, next http.Handler)) *agent {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: a.address})
	proxy.Transport = transport
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/txn" {
			txn(w, r, proxy)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	b := *a
	b.address = strings.TrimPrefix(server.URL, "http://")
	return &b
}

// TestALostAnswer: the change was written although nobody said so. It is found,
// and the service keeps the address that it got.
func TestALostAnswer(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	var lose atomic.Bool
	flaky := a.between(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if lose.Swap(false) {
			next.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	})
	l, s := flaky.ledger(t, prefix, "one")
	bind(t, l, owner(0))
	lose.Store(true)
	_, _, err := l.Bind(t.Context(), []ledger.Wish{wish(owner(1), "127.130.0.0/16")}, "test")
	wantErr(t, "an answer that was lost", err, nil, flaky)
	written := load(t, s)
	if written.Generation != 2 || l.Generation() != 1 {
		t.Fatalf("generation %d in Consul, %d here", written.Generation, l.Generation())
	}
	got := bind(t, l, owner(1))
	if got.Generation != 2 || l.Foreign() != 1 || len(l.Records()) != 2 {
		t.Errorf("%+v after %d adoptions", got, l.Foreign())
	}
}

// TestAnOlderServer takes 64 operations only.
func TestAnOlderServer(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	older := a.between(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		body, err := io.ReadAll(r.Body)
		var ops []json.RawMessage
		if err != nil || json.Unmarshal(body, &ops) != nil {
			t.Error("no transaction")
		}
		if len(ops) > 64 {
			http.Error(w, fmt.Sprintf("Transaction contains too many operations (%d > 64)", len(ops)), http.StatusRequestEntityTooLarge)
			return
		}
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		next.ServeHTTP(w, r)
	})
	l, s := older.ledger(t, prefix, "one")
	var wishes []ledger.Wish
	for n := range 100 {
		wishes = append(wishes, wish(owner(n), "127.130.0.0/16"))
	}
	if _, _, err := l.Bind(t.Context(), wishes, "test"); err != nil {
		t.Fatal(err)
	}
	if got := load(t, s); len(got.Records) != 100 || got.Generation != 4 {
		t.Errorf("%d records of generation %d", len(got.Records), got.Generation)
	}
	// And no server takes an object of a megabyte.
	err := l.PutObjects(t.Context(), []ledger.Object{{Owner: owner(1), Spec: make([]byte, 1<<20)}})
	wantErr(t, "an object of 1 MB", err, ledger.ErrTooLarge, older, "services/acme/s1")
}

// TestWatch returns when another has written, and when its time is up.
func TestWatch(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	one, _ := a.ledger(t, prefix, "one")
	two, s := a.ledger(t, prefix, "two")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for n := range 3 {
		type result struct {
			state ledger.State
			err   error
		}
		got := make(chan result, 1)
		after := two.Generation()
		go func() {
			state, err := s.Watch(ctx, after)
			got <- result{state, err}
		}()
		bind(t, one, owner(n))
		r := <-got
		if r.err != nil {
			t.Fatal(r.err)
		}
		if changed, err := two.Adopt(r.state); err != nil || !changed || two.Generation() != one.Generation() {
			t.Errorf("%v %v, generation %d", changed, err, two.Generation())
		}
	}
	short, done := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer done()
	if _, err := s.Watch(short, two.Generation()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without a change: %v", err)
	}
}
