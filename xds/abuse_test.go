package xds

import (
	"bytes"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/roostmesh/roost/xds/envoy"
)

// rawConn speaks HTTP/2 frame by frame.
type rawConn struct {
	net.Conn
	*http2.Framer
	buf bytes.Buffer
	enc *hpack.Encoder
}

func rawDial(t *testing.T, address string) *rawConn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(testTimeout)); err != nil {
		t.Fatal(err)
	}
	c := &rawConn{Conn: conn, Framer: http2.NewFramer(conn, conn)}
	c.enc = hpack.NewEncoder(&c.buf)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return c
}

// headers encodes those of an ADS call, and more.
func (c *rawConn) headers(more ...hpack.HeaderField) []byte {
	c.buf.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "xds"},
		{Name: ":path", Value: "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, more...) {
		_ = c.enc.WriteField(f) // a bytes.Buffer takes everything
	}
	return c.buf.Bytes()
}

// drained reads until the server ends the connection.
func (c *rawConn) drained() {
	for {
		if _, err := c.ReadFrame(); err != nil {
			return
		}
	}
}

// TestAbuse opens and resets streams as fast as it can, and sends headers
// without end; a proxy beside it is served all the time.
func TestAbuse(t *testing.T) {
	h := start(t, Config{})
	h.publish("cluster/a@0")
	c := h.dial(testID)
	c.subscribe(envoy.Cluster)
	c.receive("cluster: a@0", "")

	reset := rawDial(t, h.address)
	for i := range uint32(2000) {
		if reset.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: reset.headers(), EndHeaders: true}) != nil ||
			reset.WriteRSTStream(2*i+1, http2.ErrCodeCancel) != nil {
			break // it has had enough
		}
	}
	h.publish("cluster/a@1")
	c.receive("cluster: a@1", "")

	flood := rawDial(t, h.address)
	big := hpack.HeaderField{Name: "x-big", Value: strings.Repeat("x", 8<<10)}
	block := bytes.Clone(flood.headers(big, big, big, big))
	for i := range uint32(100) {
		if flood.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: block[:16<<10]}) != nil ||
			flood.WriteContinuation(2*i+1, true, block[16<<10:]) != nil {
			break
		}
	}
	endless := rawDial(t, h.address)
	if err := endless.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: endless.headers()}); err != nil {
		t.Fatal(err)
	}
	for range 10000 {
		if endless.WriteContinuation(1, false, block[:16<<10]) != nil {
			break
		}
	}
	endless.drained()
	h.publish("cluster/a@2")
	c.receive("cluster: a@2", "")
	h.acked(3)
	if ps := h.s.Proxies(); len(ps) != 1 || !ps[0].Connected {
		t.Errorf("proxies %+v", ps)
	}
}
