package xds

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	statusv3 "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/roostmesh/roost/xds/envoy"
)

// counted is the value of a counter.
func counted(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// TestAdmission: who is one too many is told to come back, and those that are
// there notice nothing.
func TestAdmission(t *testing.T) {
	for _, c := range []struct {
		what, reason, text string
		admission          Admission
	}{
		{"too many at once", refusedRate, "too many proxies come at once", Admission{PerSecond: 1, Burst: 1}},
		{"too many", refusedFull, "1 proxies are connected", Admission{Streams: 1}},
	} {
		t.Run(c.what, func(t *testing.T) {
			h := start(t, Config{Admission: c.admission})
			h.publish("cluster/a@1")
			first := h.dial("sidecar~acme~shop~1")
			first.subscribe(envoy.Cluster)
			first.receive("cluster: a@1", "")
			second := h.dial("sidecar~acme~shop~2")
			second.refused(codes.ResourceExhausted, c.text)
			if n := counted(t, h.s.metrics.refused.WithLabelValues(c.reason)); n != 1 {
				t.Errorf("%v were refused for %s", n, c.reason)
			}
			h.publish("cluster/a@2")
			first.receive("cluster: a@2", "")
		})
	}
}

// TestTooManyNames: a client that asks for more than one may is cut off.
func TestTooManyNames(t *testing.T) {
	h := start(t, Config{})
	h.publish("cluster/a@1")
	c := h.dial(testID)
	names := make([]string, maxNames)
	for i := range names {
		names[i] = fmt.Sprint("n", i)
	}
	c.subscribe(envoy.Endpoint, names...)
	c.subscribe(envoy.Endpoint, "one more")
	for {
		if _, err := c.stream.Recv(); err != nil {
			if !strings.Contains(err.Error(), "100001 subscriptions of type endpoint, more than 100000") {
				t.Error(err)
			}
			break
		}
	}
	if n := counted(t, h.s.metrics.refused.WithLabelValues(refusedBounds)); n != 1 {
		t.Errorf("%v were refused", n)
	}
}

// TestEvict: a proxy that does not answer for long is cut off and counted; one
// that does is not.
func TestEvict(t *testing.T) {
	var late atomic.Int64
	now := func() time.Time { return time.Unix(1_800_000_000+late.Load(), 0) }
	h := start(t, Config{Now: now, RetryEvery: 10 * time.Millisecond})
	h.publish("cluster/a@1")
	good, bad := h.dial("sidecar~acme~shop~1"), h.dial("sidecar~acme~shop~2")
	good.subscribe(envoy.Cluster)
	good.receive("cluster: a@1", "")
	h.acked(1)
	bad.subscribe(envoy.Cluster)
	if _, err := bad.stream.Recv(); err != nil {
		t.Fatal(err)
	}
	late.Add(int64(answerWithin/time.Second) + 1)
	bad.refused(codes.DeadlineExceeded, "no answer to a response for 1m0s")
	if n := counted(t, h.s.metrics.evicted); n != 1 {
		t.Errorf("%v were evicted", n)
	}
	h.publish("cluster/a@2")
	good.receive("cluster: a@2", "")
}

// TestDrain: before it stops, the Server says so, takes nobody any more and serves
// those that are there.
func TestDrain(t *testing.T) {
	h := start(t, Config{})
	h.publish("cluster/a@1")
	old := h.dial("sidecar~acme~shop~1")
	old.subscribe(envoy.Cluster)
	old.receive("cluster: a@1", "")
	conn, err := grpc.NewClient(h.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	health := func() healthpb.HealthCheckResponse_ServingStatus {
		a, err := healthpb.NewHealthClient(conn).Check(h.ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return a.GetStatus()
	}
	before := health()
	h.s.Drain()
	if after := health(); before != healthpb.HealthCheckResponse_SERVING || after != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health was %s and is %s", before, after)
	}
	late := h.dial("sidecar~acme~shop~2")
	late.refused(codes.Unavailable, "the control plane stops")
	h.publish("cluster/a@2")
	old.receive("cluster: a@2", "")
}

// TestCSDS: the client status discovery service tells what a proxy was sent, has
// ACKed and refuses.
func TestCSDS(t *testing.T) {
	h := start(t, Config{})
	h.publish("cluster/a@1", "endpoint/a@1", "listener/l@1")
	c := h.dial(testID)
	c.subscribe(envoy.Cluster)
	c.receive("cluster: a@1", "")
	c.subscribe(envoy.Endpoint, "a", "hidden")
	c.receive("endpoint: a@1 -hidden", "")
	c.subscribe(envoy.Listener)
	c.receive("listener: l@1", "Error adding/updating listener(s) l: bad\n")
	other := h.dial("sidecar~acme~shop~2")
	other.subscribe(envoy.Cluster)
	if _, err := other.stream.Recv(); err != nil { // and does not answer
		t.Fatal(err)
	}
	h.event("connect " + testID)
	h.event(fmt.Sprintf("reject %s listener l 1: l: bad", testID))
	conn, err := grpc.NewClient(h.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	client := statusv3.NewClientStatusDiscoveryServiceClient(conn)
	stream, err := client.StreamClientStatus(h.ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(m *matcherv3.StringMatcher) (out []string) {
		q := &statusv3.ClientStatusRequest{NodeMatchers: []*matcherv3.NodeMatcher{{NodeId: m}}}
		if m == nil {
			q.NodeMatchers = nil
		}
		if err := stream.Send(q); err != nil {
			t.Fatal(err)
		}
		a, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range a.GetConfig() {
			for _, x := range p.GetGenericXdsConfigs() {
				typ, _ := envoy.TypeOf(x.GetTypeUrl())
				out = append(out, fmt.Sprintf("%s %s %s %s %s %s%s", p.GetNode().GetId(), typ, x.GetName(), x.GetVersionInfo(), x.GetConfigStatus(), x.GetClientStatus(), x.GetErrorState().GetDetails()))
			}
		}
		return out
	}
	mine := []string{testID + " cluster a 1 SYNCED ACKED", testID + " endpoint a 1 SYNCED ACKED", testID + " listener l  ERROR NACKEDl: bad"}
	all := append(append([]string{}, "sidecar~acme~shop~1@h1 "+mine[0][len(testID)+1:]), mine[1:]...)
	all = append(all, "sidecar~acme~shop~2 cluster a  STALE REQUESTED")
	if diff := cmp.Diff(all, ask(nil)); diff != "" {
		t.Errorf("all: %s", diff)
	}
	if diff := cmp.Diff(mine, ask(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: "@H1"}, IgnoreCase: true})); diff != "" {
		t.Errorf("one: %s", diff)
	}
	if got := ask(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: "nobody"}}); len(got) > 0 {
		t.Errorf("nobody: %v", got)
	}
	if _, err := client.FetchClientStatus(h.ctx, &statusv3.ClientStatusRequest{NodeMatchers: []*matcherv3.NodeMatcher{{NodeId: &matcherv3.StringMatcher{
		MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: "("}}}}}}); err == nil || !strings.Contains(err.Error(), "missing closing") {
		t.Errorf("a bad pattern: %v", err)
	}
}
