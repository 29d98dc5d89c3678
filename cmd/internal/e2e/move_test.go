package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// switchboard forwards TCP to one of several places; a switch ends what is open.
type switchboard struct {
	address string
	to      atomic.Value
	mu      sync.Mutex
	open    map[net.Conn]struct{} // guarded by mu
}

func newSwitchboard(t *testing.T, to string) *switchboard {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &switchboard{address: l.Addr().String(), open: map[net.Conn]struct{}{}}
	s.to.Store(to)
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		s.hangUp()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", s.to.Load().(string))
			if err != nil {
				_ = in.Close()
				continue
			}
			s.mu.Lock()
			s.open[in], s.open[out] = struct{}{}, struct{}{}
			s.mu.Unlock()
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				wg.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					_ = pair[0].Close()
				})
			}
		}
	})
	return s
}

func (s *switchboard) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		_ = c.Close()
	}
	clear(s.open)
}

func (s *switchboard) turn(to string) {
	s.to.Store(to)
	s.hangUp()
}

// metric sums a metric's samples.
func (r *roost) metric(name string) (sum float64) {
	r.t.Helper()
	res, err := http.Get("http://" + r.args + "/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^`+name+`(?:\{[^}]*\})? (\S+)$`).FindAllStringSubmatch(string(data), -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			r.t.Fatal(err)
		}
		sum += v
	}
	return sum
}

// TestEnvoyMovesBetweenReplicas: both have the same bytes under the same
// versions, so that an Envoy that comes from the other is sent nothing; a change
// made at the first is served by the second.
func TestEnvoyMovesBetweenReplicas(t *testing.T) {
	c := newCatalog(t)
	const id = "node~shared"
	const services = `services:
  - {name: shop, tenant: acme, ports: [{port: 18115, protocol: http}], instances: [{id: a, address: "192.0.2.75:9001", node: shared}]}
  - {name: db, tenant: acme, ports: [{port: 18116}]}
`
	r1, r2 := c.replica("h1", services).serve(), c.replica("h2", services).serve()
	r2.sees("acme/shop", r1.address("acme/shop"))
	board := newSwitchboard(t, r1.xds())
	r1.envoy("--node", "shared", "--xds", board.address)
	synced := func(r *roost, held map[string]string) error {
		list, err := r.held(id)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			return errors.New("nothing held")
		}
		for _, v := range list {
			if v.Acked == "" || v.Acked != v.Intended {
				return fmt.Errorf("%+v", v)
			}
			held[v.Type+" "+v.Name] = v.Acked
		}
		return nil
	}
	before := map[string]string{}
	until(t, "it is synced", func() error { return synced(r1, before) })
	for n, to := range []*roost{r2, r1, r2} {
		sent := to.metric("roost_xds_sent_bytes_total")
		board.turn(to.xds())
		now := map[string]string{}
		until(t, "it has moved, and is synced", func() error {
			if to.metric("roost_xds_proxies") != 1 {
				return errors.New("not connected")
			}
			return synced(to, now)
		})
		if diff := cmp.Diff(before, now); diff != "" {
			t.Errorf("move %d: %s", n, diff)
		}
		if got := to.metric("roost_xds_sent_bytes_total"); got != sent {
			t.Errorf("move %d: %v bytes were sent again", n, got-sent)
		}
	}
	r1.ok("service", "create", "acme/late", "--port", "18117:http")
	r2.sees("acme/late", r1.address("acme/late"))
	until(t, "the other serves it", func() error {
		now := map[string]string{}
		if err := synced(r2, now); err != nil {
			return err
		}
		if now["listener late.acme:18117"] == "" {
			return fmt.Errorf("held %v", now)
		}
		return nil
	})
}

// xds is where a Roost serves proxies.
func (r *roost) xds() string {
	r.t.Helper()
	m := regexp.MustCompile(`xds=(\S+)`).FindStringSubmatch(r.log.String())
	if m == nil {
		r.t.Fatal("no ready line")
	}
	return m[1]
}

type heldJSON struct{ Type, Name, Intended, Acked string }

// held is what a proxy has; an error says that it is not known.
func (r *roost) held(proxy string) ([]heldJSON, error) {
	r.t.Helper()
	code, out, errOut := r.cli("config", proxy, "-o", "json")
	if code != 0 {
		return nil, errors.New(errOut)
	}
	var list struct{ Items []heldJSON }
	err := json.Unmarshal([]byte(out), &list)
	return list.Items, err
}
