package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// window is more than a proxy receives in its life: it never has to update it.
	window       = 1<<31 - 1
	frameSize    = 16 << 10
	firstWindow  = 65535 // RFC 9113, 6.9.2
	streamID     = 1
	method       = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	readerBuffer = 4 << 10
)

// proxy is one simulated Envoy: a connection with one stream of delta ADS, and
// what it holds. Its goroutine owns it while it is connected.
type proxy struct {
	fleet *fleet
	id    string

	conn    net.Conn
	framer  *http2.Framer
	writer  *bufio.Writer
	closing atomic.Bool // the fleet has dropped it
	done    chan struct{}

	out     []byte // requests that wait for the server's window
	connWin int64
	strWin  int64
	initial int64 // the stream window that the server's settings give

	in       reader
	fresh    []uint32        // clusters of the message, whose endpoints are to be asked for
	held     [kinds][]uint32 // version by name
	count    [kinds]int
	complete bool
	seen     *round    // the last one that it has been counted in
	arrivals []arrival // while the fleet records

	at int64 // when it was counted in seen, in Unix nanoseconds
}

// arrival is a version of endpoints that a proxy got.
type arrival struct {
	name, version uint32
	at            int64
}

// counter counts what is read. The server's end is left as it is: gRPC treats
// what is not a bare TCP connection in another way.
type counter struct {
	io.Reader
	n *atomic.Int64
}

func (c counter) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// open connects and sends the first requests, as far as the windows let it.
func (p *proxy) open(address string, requests ...[]byte) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	p.conn, p.done = conn, make(chan struct{})
	p.writer = bufio.NewWriterSize(conn, readerBuffer)
	p.framer = http2.NewFramer(p.writer, bufio.NewReaderSize(counter{conn, &p.fleet.received}, readerBuffer))
	p.framer.SetReuseFrames()
	p.closing.Store(false)
	p.out, p.connWin, p.strWin, p.initial = nil, firstWindow, firstWindow, firstWindow
	p.in = reader{}
	_, _ = p.writer.WriteString(http2.ClientPreface) // an error stays in the writer
	_ = p.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	_ = p.framer.WriteWindowUpdate(0, window-firstWindow)
	_ = p.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: streamID, BlockFragment: callHeaders(), EndHeaders: true})
	for _, r := range requests {
		p.out = append(p.out, r...)
	}
	return p.flush()
}

func callHeaders() []byte {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "xds"}, {Name: ":path", Value: method},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	} {
		_ = enc.WriteField(f) // a bytes.Buffer takes everything
	}
	return buf.Bytes()
}

// flush sends what the windows allow.
func (p *proxy) flush() error {
	waited := len(p.out) > 0
	for len(p.out) > 0 {
		n := min(int64(len(p.out)), frameSize, p.connWin, p.strWin)
		if n <= 0 {
			return p.writer.Flush()
		}
		if err := p.framer.WriteData(streamID, false, p.out[:n]); err != nil {
			return err
		}
		p.out, p.connWin, p.strWin = p.out[n:], p.connWin-n, p.strWin-n
	}
	err := p.writer.Flush()
	if waited {
		p.out = nil
		p.fleet.counts(p, func(r *round) bool { return r.what == written })
	}
	return err
}

func (p *proxy) send(request []byte) { p.out = append(p.out, request...) }

// run reads until the connection ends, which is a failure where the fleet has
// not dropped it.
func (p *proxy) run() {
	defer close(p.done)
	if err := p.read(); !p.closing.Load() {
		p.fleet.fail(fmt.Errorf("proxy %s: %w", p.id, err))
	}
	_ = p.conn.Close()
}

// read returns why it cannot go on.
func (p *proxy) read() error {
	decoder := hpack.NewDecoder(4096, nil)
	for {
		f, err := p.framer.ReadFrame()
		if err != nil {
			return err
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			err = p.in.feed(f.Data(), p.take, p.end)
		case *http2.HeadersFrame:
			fields, derr := decoder.DecodeFull(f.HeaderBlockFragment())
			if err = derr; derr == nil && f.StreamEnded() {
				err = fmt.Errorf("the stream has ended: %v", fields)
			}
		case *http2.SettingsFrame:
			err = p.settings(f)
		case *http2.WindowUpdateFrame:
			if f.StreamID == 0 {
				p.connWin += int64(f.Increment)
			} else {
				p.strWin += int64(f.Increment)
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = p.framer.WritePing(true, f.Data)
			}
		case *http2.GoAwayFrame:
			err = errors.New("GOAWAY " + f.ErrCode.String())
		case *http2.RSTStreamFrame:
			err = errors.New("RST_STREAM " + f.ErrCode.String())
		}
		if err == nil && (len(p.out) > 0 || p.writer.Buffered() > 0) {
			err = p.flush()
		}
		if err != nil {
			return err
		}
	}
}

func (p *proxy) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
		p.strWin += int64(v) - p.initial
		p.initial = int64(v)
	}
	return p.framer.WriteSettingsAck()
}

// take holds a resource.
func (p *proxy) take(r resource) error {
	k, err := kindOf(r.url)
	if err != nil {
		return err
	}
	f := p.fleet
	name, version := f.names.id(r.name), f.versions.id(r.version)
	for len(p.held[k]) <= int(name) {
		p.held[k] = append(p.held[k], make([]uint32, int(name)+1-len(p.held[k]))...)
	}
	old := p.held[k][name]
	p.held[k][name] = version
	if old == 0 {
		p.count[k]++
		if k == clusters {
			p.fresh = append(p.fresh, name)
		}
	}
	if k != endpoints || old == version {
		return nil
	}
	if f.records.Load() {
		p.arrivals = append(p.arrivals, arrival{name, version, time.Now().UnixNano()})
	}
	if old != 0 {
		f.counts(p, func(r *round) bool { return r.what == changed && r.name == name })
	}
	return nil
}

// end ACKs a message, and asks for the endpoints of its clusters.
func (p *proxy) end() error {
	p.send(ack(p.in.kind, p.in.nonce))
	if len(p.fresh) > 0 {
		names := make([]string, len(p.fresh))
		for i, id := range p.fresh {
			names[i] = p.fleet.names.text(id)
		}
		p.send(subscribe(endpoints, "", names, nil))
		p.fresh = nil
	}
	err := p.flush()
	if want := p.fleet.want; !p.complete && p.count[clusters] == want && p.count[endpoints] == want {
		p.complete = true
		p.fleet.counts(p, func(r *round) bool { return r.what == filled })
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
