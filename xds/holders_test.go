package xds

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/roostmesh/roost/xds/envoy"
)

// holders says who has listeners of a service; "" is every one.
func (h *harness) holders(service string) (text string) {
	for _, p := range h.s.Holders(envoy.Listener, func(n string) bool { return strings.HasPrefix(n, service) }) {
		text += fmt.Sprintf("%s %q %v;", p.ID, p.Name, p.Connected)
	}
	return text
}

// TestHoldersOnItsWay: a listener whose ACK was lost with the stream may be
// there, also while the proxy has come back and not said yet what it has.
func TestHoldersOnItsWay(t *testing.T) {
	h := start(t, Config{})
	h.publish("listener/shop:80@1")
	c := h.dial(testID)
	c.subscribe(envoy.Listener)
	c.receive("listener: shop:80@1", "")
	h.acked(1)
	h.publish("listener/api:80@1")
	if _, err := c.stream.Recv(); err != nil {
		t.Fatal(err)
	}
	c.close()
	gone := testID + ` "api:80" false;`
	h.until("it has gone", func() bool { return h.holders("api:") == gone })
	h.publish("-listener/api:80")
	c = h.dial(testID)
	c.subscribe(envoy.Cluster)
	c.receive("cluster:", "")
	if got := h.holders("api:"); got != testID+` "api:80" true;` {
		t.Errorf("after it has come back: %s", got)
	}
	c.send(envoy.Listener, &discovery.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"shop:80": "1"}})
	h.until("it says that it has no such listener", func() bool { return h.holders("api:") == "" })
}

// TestHoldersUnsaid: a proxy that resumes and goes again before it has named its
// listeners may have any; one that starts anew has none.
func TestHoldersUnsaid(t *testing.T) {
	h := start(t, Config{})
	h.publish("cluster/a@1", "listener/shop:80@1")
	c := h.dial(testID)
	c.send(envoy.Cluster, &discovery.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"a": "1"}})
	h.until("it is there", func() bool { return h.holders("") == testID+` "" true;` })
	c.close()
	h.until("it may have any", func() bool { return h.holders("") == testID+` "" false;` })
	const other = "sidecar~acme~shop~2@h1"
	c = h.dial(other)
	c.subscribe(envoy.Cluster)
	c.receive("cluster: a@1", "")
	h.until("it is there", func() bool { return strings.Contains(h.holders(""), other) })
	c.close()
	h.until("it has none", func() bool { return h.holders("") == testID+` "" false;` })
}

// TestHoldersWhileOneComesBack: a proxy is not overlooked because it comes back
// while others are asked.
func TestHoldersWhileOneComesBack(t *testing.T) {
	const other = "sidecar~acme~shop~2@h1"
	h := start(t, Config{})
	h.publish("listener/shop:80@1")
	for _, id := range []string{testID, other} {
		c := h.dial(id)
		c.subscribe(envoy.Listener)
		h.event("connect " + id)
		c.receive("listener: shop:80@1", "")
		if id == other {
			h.until("it is there", func() bool { return strings.Count(h.holders(""), "true") == 2 })
			c.close()
			h.event("disconnect " + other)
		}
	}
	back := false
	found := h.s.Holders(envoy.Listener, func(string) bool {
		if !back { // in the goroutine of the first proxy
			back = true
			h.dial(other).subscribe(envoy.Cluster)
			h.event("connect " + other)
		}
		return true
	})
	if len(found) != 2 {
		t.Errorf("holders: %+v", found)
	}
}

// TestRemember: a proxy that has gone is known for as long as was asked for.
func TestRemember(t *testing.T) {
	var ahead atomic.Int64
	h := start(t, Config{RetryEvery: time.Millisecond, Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
	h.s.Remember(3 * time.Hour)
	h.s.Remember(time.Minute) // what was promised stays
	h.publish("listener/shop:80@1")
	c := h.dial(testID)
	c.subscribe(envoy.Listener)
	c.receive("listener: shop:80@1", "")
	h.acked(1)
	c.close()
	gone := testID + ` "shop:80" false;`
	h.until("it has gone", func() bool { return h.holders("") == gone })
	ahead.Store(int64(2 * time.Hour))
	h.s.forget()
	if got := h.holders(""); got != gone {
		t.Errorf("after two hours: %q", got)
	}
	ahead.Store(int64(4 * time.Hour))
	h.until("it is forgotten", func() bool { return h.holders("") == "" })
}
