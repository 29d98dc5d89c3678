package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// kinds are the services of this test: one for each protocol, with the port that
// callers dial and the one that instances have.
var kinds = []struct {
	name, protocol string
	dial, port     int
}{{"web", "http", 18121, 9021}, {"two", "http2", 18122, 9022}, {"rpc", "grpc", 18123, 9023}, {"raw", "tcp", 18124, 9024}}

// place is one instance of every kind, on one address. closed says that it has
// been drained: nothing new may come.
type place struct {
	address string
	closed  atomic.Bool
	late    atomic.Int64 // what came although it was drained
}

func (p *place) arrived() {
	if p.closed.Load() {
		p.late.Add(1)
	}
}

func newPlace(t *testing.T, address string) *place {
	t.Helper()
	p := &place{address: address}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.arrived()
		if r.Header.Get("Upgrade") != "websocket" {
			_, _ = io.WriteString(w, "here")
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw)
	})
	h2c := &http.Protocols{}
	h2c.SetUnencryptedHTTP2(true)
	calls := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		p.arrived()
		return next(ctx, req)
	}))
	healthpb.RegisterHealthServer(calls, health.NewServer())
	t.Cleanup(calls.Stop)
	web, two := &http.Server{Handler: handler, ReadHeaderTimeout: time.Second}, &http.Server{Handler: handler, Protocols: h2c, ReadHeaderTimeout: time.Second}
	for n, serve := range []func(net.Listener) error{web.Serve, two.Serve, calls.Serve, p.echo} {
		l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", address, kinds[n].port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		wg.Go(func() { _ = serve(l) })
	}
	t.Cleanup(func() { _, _ = web.Close(), two.Close() })
	return p
}

func (p *place) echo(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		p.arrived()
		go func() {
			_, _ = io.Copy(conn, conn)
			_ = conn.Close()
		}()
	}
}

// callers are clients of every kind, under load until stop.
type callers struct {
	t        *testing.T
	address  [4]string // of the kinds
	interval time.Duration
	done     chan struct{}
	wg       sync.WaitGroup
	sent     [6]atomic.Int64
	failed   [6]atomic.Int64
	first    [6]atomic.Value
}

var callerNames = [6]string{"HTTP/1.1", "HTTP/2", "gRPC", "new TCP", "WebSocket", "long TCP"}

func (c *callers) run(n int, once func() error) {
	c.wg.Go(func() {
		tick := time.NewTicker(c.interval)
		defer tick.Stop()
		for {
			select {
			case <-c.done:
				return
			case <-tick.C:
			}
			c.sent[n].Add(1)
			if err := once(); err != nil {
				c.failed[n].Add(1)
				c.first[n].CompareAndSwap(nil, err.Error())
			}
		}
	})
}

func (c *callers) get(client *http.Client, url string) func() error {
	return func() error {
		res, err := client.Get(url)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		data, err := io.ReadAll(res.Body)
		if err == nil && (res.StatusCode != http.StatusOK || string(data) != "here") {
			err = fmt.Errorf("%d %s %s", res.StatusCode, res.Header.Get("x-roost-reason"), data)
		}
		return err
	}
}

// start opens the long connections and begins to call.
func (c *callers) start() {
	c.t.Helper()
	one := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}}
	h2c := &http.Protocols{}
	h2c.SetUnencryptedHTTP2(true)
	two := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{Protocols: h2c}}
	conn, err := grpc.NewClient(c.address[2], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	rpc := healthpb.NewHealthClient(conn)
	check := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := rpc.Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	}
	fresh := func() error {
		conn, err := net.Dial("tcp", c.address[3])
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		return ping(conn, conn)
	}
	first := []func() error{c.get(one, "http://"+c.address[0]+"/"), c.get(two, "http://"+c.address[1]+"/"), check, fresh}
	for n, once := range first {
		until(c.t, callerNames[n]+" is answered", once)
	}
	ws, long := c.upgrade(), c.dial(c.address[3])
	wsReader := bufio.NewReader(ws)
	res, err := http.ReadResponse(wsReader, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	_ = res.Body.Close() // it has none: the connection goes on
	for n, once := range append(first, func() error { return ping(ws, wsReader) }, func() error { return ping(long, long) }) {
		c.run(n, once)
	}
}

func (c *callers) dial(at string) net.Conn {
	c.t.Helper()
	conn, err := net.Dial("tcp", at)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (c *callers) upgrade() net.Conn {
	c.t.Helper()
	conn := c.dial(c.address[0])
	if _, err := io.WriteString(conn, "GET /socket HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"); err != nil {
		c.t.Fatal(err)
	}
	return conn
}

func ping(conn net.Conn, from io.Reader) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "ping"); err != nil {
		return err
	}
	var back [4]byte
	if _, err := io.ReadFull(from, back[:]); err != nil {
		return err
	}
	if string(back[:]) != "ping" {
		return fmt.Errorf("got %q", back)
	}
	return nil
}

// fromEnv is a number of the environment, for longer runs.
func fromEnv(name string, or int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil && n > 0 {
		return n
	}
	return or
}

// TestEveryProtocolMoves: planned moves under load: register the new instance,
// drain the old one, deregister it. No request fails, connections that are open
// live on, nothing new comes to a drained instance, and each move's receipts say
// that the proxy had confirmed it. ROOST_E2E_MOVES and ROOST_E2E_RATE (requests a
// second of all kinds together) make it longer.
func TestEveryProtocolMoves(t *testing.T) {
	moves, rate := fromEnv("ROOST_E2E_MOVES", 10), fromEnv("ROOST_E2E_RATE", 600)
	c := newCatalog(t)
	r := newRoost(host{t, ""}, onLoopback(t, "127.176.0.0/16", "discovery: {consul: {address: \"http://"+c.addr+"\"}}\n")).serve()
	places := []*place{newPlace(t, "127.0.0.91"), newPlace(t, "127.0.0.92")}
	register := func(p *place, id string) {
		t.Helper()
		for _, k := range kinds {
			err := c.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: k.name + id, Name: k.name, Address: p.address, Port: k.port,
				Meta: map[string]string{"roost-tenant": "acme", "roost-port": strconv.Itoa(k.dial), "roost-protocol": k.protocol}})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	serving := func(id string, n int) {
		t.Helper()
		until(t, id+" serves", func() error {
			var list struct{ Items []struct{ ID, Health string } }
			r.json(&list, "instances")
			have := 0
			for _, i := range list.Items {
				if strings.HasSuffix(i.ID, id) {
					have++
				}
			}
			if have != n {
				return fmt.Errorf("%d of it", have)
			}
			return nil
		})
	}
	register(places[0], "-0")
	serving("-0", len(kinds))
	load := &callers{t: t, interval: time.Duration(len(callerNames)) * time.Second / time.Duration(rate), done: make(chan struct{})}
	for n, k := range kinds {
		load.address[n] = fmt.Sprintf("%s:%d", r.address("acme/"+k.name), k.dial)
	}
	r.envoy("--node", "h1")
	load.start()
	for i := range moves {
		old, next := places[i%2], places[(i+1)%2]
		next.closed.Store(false)
		id := fmt.Sprintf("-%d", i+1)
		register(next, id)
		serving(id, len(kinds))
		for _, k := range kinds {
			// What is open for long outlives the drain, which has done its part when
			// the proxy has confirmed.
			var out drainJSON
			r.json(&out, "drain", fmt.Sprintf("acme/%s/%s-%d", k.name, k.name, i), "--timeout", "200ms")
			if len(out.Waiting) > 0 {
				t.Errorf("move %d: drain of %s: %+v", i, k.name, out)
			}
		}
		old.closed.Store(true)
		for _, k := range kinds {
			c.deregister(fmt.Sprintf("%s-%d", k.name, i))
		}
		serving(fmt.Sprintf("-%d", i), 0)
	}
	close(load.done)
	load.wg.Wait()
	total := int64(0)
	for n, name := range callerNames {
		total += load.sent[n].Load()
		if failed := load.failed[n].Load(); failed > 0 || load.sent[n].Load() == 0 {
			t.Errorf("%s: %d of %d failed, the first with %v", name, failed, load.sent[n].Load(), load.first[n].Load())
		}
	}
	for _, p := range places {
		if n := p.late.Load(); n > 0 {
			t.Errorf("%s: %d arrived after its drain", p.address, n)
		}
	}
	t.Logf("%d moves of %d services, %d calls", moves, len(kinds), total)
	r.receipts(moves * len(kinds))
}

// receipts checks that every move was told, and confirmed by the proxy.
func (r *roost) receipts(moves int) {
	r.t.Helper()
	until(r.t, "receipts", func() error {
		got := r.ask("GET", "/api/v1/events?limit=10000", "")
		counts, odd := map[string]int{}, ""
		for _, kind := range []string{"instance_added", "instance_draining"} {
			for _, e := range strings.Split(got.body, `{"seq":`) {
				if strings.Contains(e, `"kind":"`+kind+`"`) && strings.Contains(e, `"acked_by":["node~h1"]`) && !strings.Contains(e, `"acked":null`) && (kind != "instance_added" || strings.Contains(e, `"source":"consul"`)) {
					counts[kind]++
				} else if strings.Contains(e, `"kind":"`+kind+`"`) {
					odd = e
				}
			}
		}
		if counts["instance_added"] < moves || counts["instance_draining"] < moves {
			return errors.New(fmt.Sprint("confirmed ", counts, ", want ", moves, "; not like ", odd))
		}
		return nil
	})
}
