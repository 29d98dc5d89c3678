package xds

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/roostmesh/roost/xds/envoy"
)

// pushAllocates bounds the heap objects of one push to one stream: a World comes,
// the response is made and encoded, its ACK is read and settled. What gRPC needs to
// move both comes on top.
const pushAllocates = 8

// TestAllocations: a push of one changed resource to a stream that holds many.
func TestAllocations(t *testing.T) {
	const held = 1000
	changed := map[envoy.Name]*envoy.Resource{}
	var names []string
	for i := range held {
		r := resource(t, fmt.Sprintf("endpoint/e%04d@0", i))
		r.Body = []byte("body")
		changed[r.Name] = r
		names = append(names, r.Name.Name)
	}
	w, _ := fakeWorld{}.with(changed)
	s := newState(w, 1, newSets(), nil)
	s.request(envoy.Endpoint, &request{subscribe: names}, time.Time{})
	s.request(envoy.Endpoint, &request{nonce: s.next().nonce}, time.Time{})
	worlds := make([]fakeWorld, 2) // of which one follows the other
	var change envoy.Change
	for i := range worlds {
		r := resource(t, fmt.Sprintf("endpoint/e0500@%d", i+1))
		r.Body = []byte("body")
		worlds[i], change = w.with(map[envoy.Name]*envoy.Resource{r.Name: r})
	}
	c, n := newCodec("roost/h1"), 0
	ack, err := proto.Marshal(&discovery.DeltaDiscoveryRequest{TypeUrl: envoy.Endpoint.URL(), ResponseNonce: "7"})
	if err != nil {
		t.Fatal(err)
	}
	views := []envoy.View{worlds[0], worlds[1]}
	q := &request{}
	got := testing.AllocsPerRun(200, func() {
		n++
		s.update(views[n%2], uint64(n+1), change)
		r := s.next()
		if r == nil || len(r.resources) != 1 {
			t.Fatalf("response %+v", r)
		}
		out, err := c.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		out.Free()
		if err := q.decode(ack); err != nil {
			t.Fatal(err)
		}
		q.nonce = r.nonce
		s.request(envoy.Endpoint, q, time.Time{})
		s.taken.clusters = s.taken.clusters[:0] // as its reader does
	})
	if got > pushAllocates {
		t.Errorf("a push makes %v heap objects, more than %d", got, pushAllocates)
	}
	t.Logf("a push makes %v heap objects", got)
}
