package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/roostmesh/roost/xds/envoy"
)

// reporter is a proxy's load reporting stream.
func (h *harness) reporter(id string) loadv3.LoadReportingService_StreamLoadStatsClient {
	h.t.Helper()
	conn, err := grpc.NewClient(h.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close() })
	stream, err := loadv3.NewLoadReportingServiceClient(conn).StreamLoadStats(h.ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := stream.Send(&loadv3.LoadStatsRequest{Node: &corev3.Node{Id: id}}); err != nil {
		h.t.Fatal(err)
	}
	return stream
}

func report(cluster, at string, active uint64) *loadv3.LoadStatsRequest {
	a := netip.MustParseAddrPort(at)
	return &loadv3.LoadStatsRequest{ClusterStats: []*endpointv3.ClusterStats{{ClusterName: cluster, UpstreamLocalityStats: []*endpointv3.UpstreamLocalityStats{{
		UpstreamEndpointStats: []*endpointv3.UpstreamEndpointStats{{
			Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
				Address: a.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())}}}},
			TotalRequestsInProgress: active,
		}},
	}}}}}
}

// TestLoad: a proxy is asked for nothing until somebody watches; what it says
// is known until it leaves.
func TestLoad(t *testing.T) {
	h := start(t, Config{})
	stream := h.reporter(testID)
	target := Target{"a", netip.MustParseAddrPort("127.0.0.1:9001")}
	before := time.Now()
	stop := h.s.WatchLoad("b", "a")
	q, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, q.GetClusters()); diff != "" || !q.GetReportEndpointGranularity() || q.GetLoadReportingInterval().AsDuration() != reportEvery {
		t.Errorf("asked for %v", q)
	}
	if busy, silent := h.s.InFlight(before, target); len(busy) != 0 || !cmp.Equal(silent, []string{testID}) {
		t.Errorf("before the first report: busy %v, silent %v", busy, silent)
	}
	if err := stream.Send(report("a", "127.0.0.1:9001", 3)); err != nil {
		t.Fatal(err)
	}
	h.until("the report counts", func() bool {
		busy, silent := h.s.InFlight(before, target)
		return busy[testID] == 3 && len(silent) == 0
	})
	if busy, _ := h.s.InFlight(before, Target{"a", netip.MustParseAddrPort("127.0.0.1:9002")}); len(busy) != 0 {
		t.Errorf("another endpoint: %v", busy)
	}
	if err := stream.Send(report("a", "127.0.0.1:9002", 1)); err != nil {
		t.Fatal(err)
	}
	h.until("the next one replaces it", func() bool {
		busy, _ := h.s.InFlight(before, target)
		return len(busy) == 0
	})
	stop()
	if q, err = stream.Recv(); err != nil || len(q.GetClusters()) != 0 || q.GetLoadReportingInterval().AsDuration() != reportIdle {
		t.Errorf("nobody watches: %v, %v", q, err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	h.until("it has left", func() bool {
		_, silent := h.s.InFlight(time.Now(), target)
		return len(silent) == 0
	})
}

func TestLoadRefused(t *testing.T) {
	h := start(t, Config{})
	if _, err := h.reporter("nobody").Recv(); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

// until polls; the harness's deadline ends it.
func (h *harness) until(what string, ok func() bool) {
	h.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-h.ctx.Done():
			h.t.Fatalf("never: %s", what)
		}
	}
}

// TestHolders: who has a listener, from the push on, through its removal until
// that is ACKed, and after the proxy has gone.
func TestHolders(t *testing.T) {
	h := start(t, Config{})
	h.publish("listener/shop:80@1", "listener/api:80@1")
	c := h.dial(testID)
	c.subscribe(envoy.Cluster)
	c.receive("cluster:", "")
	shop := func() (text string) {
		for _, p := range h.s.Holders(envoy.Listener, func(n string) bool { return strings.HasPrefix(n, "shop:") }) {
			text += fmt.Sprintf("%s %q %v;", p.ID, p.Name, p.Connected)
		}
		return text
	}
	unknown, has, gone := testID+` "" true;`, testID+` "shop:80" true;`, testID+` "shop:80" false;`
	if got := shop(); got != unknown {
		t.Errorf("one that has not said what it has: %s", got)
	}
	c.subscribe(envoy.Listener)
	r, err := c.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if got := shop(); got != has {
		t.Errorf("on its way: %s", got)
	}
	c.send(envoy.Listener, &discovery.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()})
	h.acked(1)
	h.publish("-listener/shop:80")
	if got := h.s.Behind(2); !cmp.Equal(got, []string{testID}) {
		t.Errorf("behind: %v", got)
	}
	if got := shop(); got != has {
		t.Errorf("its removal is not ACKed: %s", got)
	}
	c.receive("listener: -shop:80", "")
	h.acked(2)
	if got := shop(); got != "" {
		t.Errorf("after the removal: %s", got)
	}
	if got := h.s.Behind(2); got != nil {
		t.Errorf("behind: %v", got)
	}
	h.publish("listener/shop:80@1")
	c.receive("listener: shop:80@1", "")
	h.acked(3)
	c.close()
	h.until("a proxy that has gone", func() bool { return shop() == gone })
}

// TestAckHook: what a proxy has taken is told with the World it is from.
func TestAckHook(t *testing.T) {
	var mu sync.Mutex
	var told []string
	h := start(t, Config{OnAck: func(id string, version uint64, clusters []string) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, fmt.Sprint(id, " ", version, " ", clusters))
	}})
	h.publish("cluster/a@1,endpoint/a", "endpoint/a@1")
	c := h.dial(testID)
	c.subscribe(envoy.Cluster)
	c.receive("cluster: a@1", "")
	c.subscribe(envoy.Endpoint, "a")
	c.receive("endpoint: a@1", "")
	h.publish("endpoint/a@2")
	c.receive("endpoint: a@2", "")
	h.publish("endpoint/a@3")
	c.receive("endpoint: a@3", "it is refused")
	h.acked(3)
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff([]string{testID + " 1 [a]", testID + " 2 [a]"}, told); diff != "" {
		t.Error(diff)
	}
}
