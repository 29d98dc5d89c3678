package xds

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testTimeout = 30 * time.Second
	testID      = "sidecar~acme~shop~1@h1"
)

// harness is a Server on real sockets, which ends with the test.
type harness struct {
	t       *testing.T
	s       *Server
	ctx     context.Context
	address string
	world   fakeWorld
	stop    func()

	progress chan Progress // every OnProgress
	events   chan string   // the other hooks
}

func start(t *testing.T, cfg Config, more ...Listener) *harness {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	h := &harness{t: t, ctx: ctx, progress: make(chan Progress, 1000), events: make(chan string, 1000)}
	cfg.Node, cfg.Registry = "h1", prometheus.NewPedanticRegistry()
	cfg.OnProgress = func(p Progress) { h.progress <- p }
	cfg.OnConnect = func(p ProxyStatus) { h.events <- "connect " + p.ID }
	cfg.OnDisconnect = func(p ProxyStatus) { h.events <- "disconnect " + p.ID }
	cfg.OnReject = func(id string, n envoy.Name, version, message string) {
		h.events <- fmt.Sprintf("reject %s %s %s %s: %s", id, n.Type, n.Name, version, message)
	}
	h.s = New(cfg)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.address = tcp.Addr().String()
	ended := make(chan error, 1)
	go func() { ended <- h.s.Run(ctx, append(more, Listener{Listener: tcp})...) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

// publish makes the next World: resources as in a script, -TYPE/NAME removes.
func (h *harness) publish(resources ...string) {
	changed := map[envoy.Name]*envoy.Resource{}
	for _, s := range resources {
		if n, gone := strings.CutPrefix(s, "-"); gone {
			changed[name(h.t, n)] = nil
			continue
		}
		r := resource(h.t, s)
		body, err := proto.Marshal(&discovery.Resource{Name: r.Name.Name, Version: r.Version})
		if err != nil {
			h.t.Fatal(err)
		}
		r.Body = body
		changed[r.Name] = r
	}
	w, c := h.world.with(changed)
	h.world = w
	h.s.Publish(w, c)
}

// acked waits until everything up to a version is settled.
func (h *harness) acked(version uint64) {
	h.t.Helper()
	for {
		select {
		case p := <-h.progress:
			if p.Acked > p.Pushed {
				h.t.Fatalf("progress %+v", p)
			}
			if p.Acked >= version {
				return
			}
		case <-h.ctx.Done():
			h.t.Fatalf("version %d is never settled", version)
		}
	}
}

func (h *harness) event(want string) {
	h.t.Helper()
	select {
	case got := <-h.events:
		if got != want {
			h.t.Errorf("event %q, want %q", got, want)
		}
	case <-h.ctx.Done():
		h.t.Fatalf("no event %q", want)
	}
}

// adsClient is one stream.
type adsClient struct {
	t      *testing.T
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	node   *corev3.Node // until it was sent
	close  func()
}

func dial(t *testing.T, ctx context.Context, target, id string) *adsClient {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &adsClient{t: t, stream: stream, node: &corev3.Node{Id: id, UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "1.40.0"}}}
	c.close = func() {
		cancel()
		_ = conn.Close()
	}
	t.Cleanup(c.close)
	return c
}

func (h *harness) dial(id string) *adsClient { return dial(h.t, h.ctx, h.address, id) }

func (c *adsClient) send(typ envoy.Type, q *discovery.DeltaDiscoveryRequest) {
	c.t.Helper()
	q.TypeUrl, q.Node, c.node = typ.URL(), c.node, nil
	if err := c.stream.Send(q); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *adsClient) subscribe(typ envoy.Type, names ...string) {
	c.t.Helper()
	c.send(typ, &discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: names})
}

// receive wants a response, "TYPE: NAME@VERSION... -NAME...", and ACKs it, or
// NACKs it with a text.
func (c *adsClient) receive(want, nack string) {
	c.t.Helper()
	r, err := c.stream.Recv()
	if err != nil {
		c.t.Fatalf("want %q: %v", want, err)
	}
	typ, _ := envoy.TypeOf(r.GetTypeUrl())
	got := typ.String() + ":"
	for _, res := range r.GetResources() {
		got += " " + res.GetName() + "@" + res.GetVersion()
	}
	for _, n := range r.GetRemovedResources() {
		got += " -" + n
	}
	if got != want {
		c.t.Fatalf("response %q, want %q", got, want)
	}
	if r.GetControlPlane().GetIdentifier() != "roost/h1" || r.GetSystemVersionInfo() == "" {
		c.t.Errorf("response without its makers: %v", r)
	}
	q := &discovery.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()}
	if nack != "" {
		q.ErrorDetail = &rpcstatus.Status{Message: nack}
	}
	c.send(typ, q)
}

// refused wants the stream to end with a code and a text.
func (c *adsClient) refused(code codes.Code, text string) {
	c.t.Helper()
	r, err := c.stream.Recv()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		c.t.Errorf("%v %v, want %v %q", r, err, code, text)
	}
}

func TestServer(t *testing.T) {
	h := start(t, Config{})
	c := h.dial(testID)
	c.subscribe(envoy.Cluster, "*") // waits for the first World
	h.publish("cluster/a@1", "endpoint/a@1", "listener/l@1,cluster/a")
	h.event("connect " + testID)
	c.receive("cluster: a@1", "")
	c.subscribe(envoy.Endpoint, "a")
	c.receive("endpoint: a@1", "")
	c.subscribe(envoy.Listener)
	c.receive("listener: l@1", "")
	h.publish("endpoint/a@2")
	c.receive("endpoint: a@2", "")
	h.acked(2)
	h.publish("endpoint/x@1") // concerns nobody
	h.acked(3)
	h.publish("listener/l@2,cluster/a")
	c.receive("listener: l@2", "Error adding/updating listener(s) l: bad\n")
	h.event("reject " + testID + " listener l 2: l: bad")
	h.acked(4)

	got := h.s.Proxies()[0]
	got.Since, got.Rejected[0].Since = time.Time{}, time.Time{}
	want := ProxyStatus{
		ID: testID, Identity: lb.Identity{Role: lb.Sidecar, Tenant: "acme", Service: "shop", Instance: "1", Node: "h1"},
		EnvoyVersion: "1.40.0", Metadata: map[string]string{}, Connected: true,
		Rejected: []Rejected{{Name: name(t, "listener/l"), Version: "2", Message: "l: bad", Held: "1"}},
	}
	want.Types[envoy.Cluster] = TypeStatus{Sent: 1, Acked: 1}
	want.Types[envoy.Endpoint] = TypeStatus{Sent: 1, Acked: 1}
	want.Types[envoy.Listener] = TypeStatus{Sent: 1, Rejected: 1, LastError: "Error adding/updating listener(s) l: bad\n"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("status: -want +got:\n%s", d)
	}
	held, _ := h.s.Holding(testID, envoy.Listener)
	wantHeld := []Held{{Name: "l", Intended: "2", Sent: "1", Acked: "1", Rejected: "2", Error: "l: bad", Resource: h.world.Get(name(t, "listener/l"))}}
	if d := cmp.Diff(wantHeld, held); d != "" {
		t.Errorf("holding: -want +got:\n%s", d)
	}

	c.close()
	h.event("disconnect " + testID)
	if p, ok := h.s.Proxy(testID); !ok || p.Connected || p.Types[envoy.Cluster].Acked != 1 {
		t.Errorf("after it has gone: %+v %v", p, ok)
	}
	h.publish("cluster/b@1")
	h.acked(5) // with nobody there
	resumes(h)
}

// resumes reconnects the proxy of TestServer: only what differs is sent, and
// the refused listener is not.
func resumes(h *harness) {
	h.t.Helper()
	c := h.dial(testID)
	c.send(envoy.Cluster, &discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: map[string]string{"a": "1"}})
	c.receive("cluster: b@1", "")
	c.send(envoy.Endpoint, &discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"a"}, InitialResourceVersions: map[string]string{"a": "1"}})
	c.receive("endpoint: a@2", "")
	c.send(envoy.Listener, &discovery.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"l": "1"}})
	h.publish("listener/l@3,cluster/b", "-cluster/a", "-endpoint/a")
	c.receive("listener: l@3", "")
	c.receive("cluster: -a", "")
	c.receive("endpoint: -a", "")
	h.acked(6)
	h.event("connect " + testID)
}

func TestServerRefuses(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "acme.sock")
	unix, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	admit := func(i lb.Identity) (lb.Identity, error) {
		if i.Role == lb.Sidecar && i.Node == "" {
			return i, fmt.Errorf("instance %s is on two nodes: name one", i.Instance)
		}
		return i, nil
	}
	h := start(t, Config{Admit: admit}, Listener{Listener: unix, Tenant: "acme"})
	h.publish("cluster/a@1")
	for _, c := range []struct {
		target, id string
		code       codes.Code
		text       string
	}{
		{h.address, "me", codes.InvalidArgument, "want sidecar~TENANT~SERVICE~ID"},
		{h.address, "sidecar~acme~shop~1", codes.FailedPrecondition, "name one"},
		{"unix:" + socket, "sidecar~globex~shop~1@h1", codes.PermissionDenied, "serves sidecars and gRPC clients of tenant acme only"},
		{"unix:" + socket, "node~h1", codes.PermissionDenied, "serves sidecars and gRPC clients of tenant acme only"},
	} {
		client := dial(t, h.ctx, c.target, c.id)
		client.subscribe(envoy.Cluster)
		client.refused(c.code, c.text)
	}
	good := dial(t, h.ctx, "unix:"+socket, testID)
	good.subscribe(envoy.Cluster)
	good.receive("cluster: a@1", "")
}

func TestDuplicate(t *testing.T) {
	h := start(t, Config{})
	h.publish("cluster/a@1")
	old := h.dial(testID)
	old.subscribe(envoy.Cluster)
	old.receive("cluster: a@1", "")
	h.event("connect " + testID)
	newer := h.dial(testID)
	newer.subscribe(envoy.Cluster)
	newer.receive("cluster: a@1", "")
	old.refused(codes.Aborted, "a newer proxy")
	h.event("disconnect " + testID)
	h.event("connect " + testID)
	ps := h.s.Problems()
	if len(ps) != 1 || ps[0].Code != CodeDuplicate || ps[0].Object != testID {
		t.Errorf("problems %+v", ps)
	}
}

func TestRetry(t *testing.T) {
	h := start(t, Config{RetryEvery: time.Millisecond})
	h.publish("listener/l@1", "listener/m@1")
	c := h.dial(testID)
	c.subscribe(envoy.Listener)
	taken := "Error adding/updating listener(s) l: cannot bind '127.128.0.1:80': Address already in use\nm: cannot bind '127.128.0.2:81': Permission denied\n"
	c.receive("listener: l@1 m@1", taken)
	c.receive("listener: l@1 m@1", taken)
	var got []string
	for _, p := range h.s.Problems() {
		got = append(got, strings.Join([]string{p.Code, p.Severity, p.Object, p.Place, p.Message, p.Fix}, "|"))
	}
	want := []string{
		"listener_address_in_use|error|" + testID + "|listener l|Envoy refuses listener l: l: cannot bind '127.128.0.1:80': Address already in use; callers of 127.128.0.1:80 on that host do not reach it|" +
			"another process in the same network namespace holds that port (0.0.0.0:80; find it with: ss -ltnp 'sport = :80'); set capture: {sidecar: nft}, or bind the application to 127.0.0.1 or to its own address; the listener is tried again by itself",
		"listener_no_permission|error|" + testID + "|listener m|Envoy refuses listener m: m: cannot bind '127.128.0.2:81': Permission denied; callers of 127.128.0.2:81 on that host do not reach it|" +
			"in that network namespace: sysctl -w net.ipv4.ip_unprivileged_port_start=81; or start Envoy with AmbientCapabilities=CAP_NET_BIND_SERVICE; the listener is tried again by itself",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("problems: -want +got:\n%s", d)
	}
	c.receive("listener: l@1 m@1", "")
	h.event("connect " + testID)
	h.event("reject " + testID + " listener l 1: l: cannot bind '127.128.0.1:80': Address already in use")
	h.event("reject " + testID + " listener m 1: m: cannot bind '127.128.0.2:81': Permission denied")
	h.publish("listener/l@2")
	c.receive("listener: l@2", "")
	h.acked(2)
	if ps := h.s.Problems(); len(ps) > 0 {
		t.Errorf("problems of the past: %+v", ps)
	}
}

// TestLag has a proxy that reads nothing: neither Publish nor questions wait
// for it, and in the end it gets the newest World.
func TestLag(t *testing.T) {
	const steps = 600
	h := start(t, Config{})
	h.publish("cluster/a@0")
	c := h.dial(testID)
	c.subscribe(envoy.Cluster)
	h.event("connect " + testID)
	for i := range steps {
		h.publish(fmt.Sprintf("cluster/a@%d", i+1), fmt.Sprintf("cluster/b%d@1", i%3))
	}
	if p := h.s.Proxies(); len(p) != 1 {
		t.Errorf("proxies %+v", p)
	}
	got := map[string]string{} // version by name, of what was received and ACKed
	for len(got) < 4 || got["a"] != fmt.Sprint(steps) {
		r, err := c.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, res := range r.GetResources() {
			got[res.GetName()] = res.GetVersion()
		}
		c.send(envoy.Cluster, &discovery.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()})
	}
	h.acked(steps + 1)
}

// TestRunAlone has nothing to listen on: hooks and retries go on until the end.
func TestRunAlone(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	progress := make(chan Progress)
	s := New(Config{OnProgress: func(p Progress) { progress <- p }})
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	w, c := fakeWorld{}.with(nil)
	s.Publish(w, c)
	if got, want := <-progress, (Progress{Pushed: 1, Acked: 1}); got != want {
		t.Errorf("progress %+v, want %+v", got, want)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
