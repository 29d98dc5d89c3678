package main

import (
	"encoding/binary"
	"errors"
	"io"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
)

// kind is a type of resource that a proxy holds.
type kind uint8

const (
	clusters kind = iota
	endpoints
	kinds
)

var typeURLs = [kinds]string{
	"type.googleapis.com/envoy.config.cluster.v3.Cluster",
	"type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
}

func kindOf(url []byte) (kind, error) {
	for k, u := range typeURLs {
		if string(url) == u {
			return kind(k), nil
		}
	}
	return 0, errors.New("a type that nobody asked for: " + string(url))
}

// Field numbers of DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, Any
// and Node.
const (
	requestNode      = 1
	requestType      = 2
	requestSubscribe = 3
	requestVersions  = 5
	requestNonce     = 6

	responseResource = 2
	responseType     = 4
	responseNonce    = 5

	resourceVersion = 1
	resourceAny     = 2
	resourceName    = 3

	anyType = 1
	nodeID  = 1
)

// message puts gRPC's prefix before a request.
func message(body []byte) []byte {
	out := make([]byte, 5, 5+len(body))
	binary.BigEndian.PutUint32(out[1:], uint32(len(body)))
	return append(out, body...)
}

func appendText(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

// ack is the request that takes a response.
func ack(k kind, nonce []byte) []byte {
	b := appendText(nil, requestType, typeURLs[k])
	b = protowire.AppendTag(b, requestNonce, protowire.BytesType)
	return message(protowire.AppendBytes(b, nonce))
}

// subscribe is the request for resources by name; an id makes it a stream's
// first, versions one that tells what the proxy has.
func subscribe(k kind, id string, names []string, versions map[string]string) []byte {
	var b []byte
	if id != "" {
		b = appendText(b, requestNode, string(appendText(nil, nodeID, id)))
	}
	b = appendText(b, requestType, typeURLs[k])
	for _, name := range names {
		b = appendText(b, requestSubscribe, name)
	}
	for name, version := range versions {
		b = appendText(b, requestVersions, string(appendText(appendText(nil, 1, name), 2, version)))
	}
	return message(b)
}

// resource is what a proxy reads of one: which it is, and which version.
type resource struct{ url, name, version []byte }

// field reads one length-delimited field, and skips others with a nil value.
func field(b []byte) (n protowire.Number, value []byte, size int) {
	n, typ, tag := protowire.ConsumeTag(b)
	if tag < 0 {
		return 0, nil, tag
	}
	if typ == protowire.BytesType {
		value, size = protowire.ConsumeBytes(b[tag:])
	} else {
		size = protowire.ConsumeFieldValue(n, typ, b[tag:])
	}
	if size < 0 {
		return 0, nil, size
	}
	return n, value, tag + size
}

func readResource(b []byte) (r resource, err error) {
	for len(b) > 0 {
		n, v, size := field(b)
		if size < 0 {
			return r, protowire.ParseError(size)
		}
		b = b[size:]
		switch n {
		case resourceVersion:
			r.version = v
		case resourceName:
			r.name = v
		case resourceAny:
			if n, url, size := field(v); size > 0 && n == anyType {
				r.url = url
			}
		}
	}
	return r, nil
}

// reader takes a response apart as its bytes come, so that no proxy keeps more
// than one resource of it.
type reader struct {
	rest  []byte // of an earlier frame
	left  int    // bytes of the message that are to come
	open  bool   // a message has begun
	kind  kind   // of the message, known at its end
	nonce []byte // likewise
}

// feed calls each for every resource and end for every message.
func (r *reader) feed(data []byte, each func(resource) error, end func() error) error {
	if len(r.rest) > 0 {
		r.rest = append(r.rest, data...)
		data = r.rest
	}
	for {
		n, err := r.step(data, each, end)
		if err != nil {
			return err
		}
		if n == 0 {
			r.rest = append(r.rest[:0], data...)
			return nil
		}
		data = data[n:]
	}
}

// step takes the next piece and says how long it is; 0 is not all there yet.
func (r *reader) step(data []byte, each func(resource) error, end func() error) (int, error) {
	if !r.open {
		if len(data) < 5 {
			return 0, nil
		}
		if data[0] != 0 {
			return 0, errors.New("a compressed message")
		}
		r.open, r.left = true, int(binary.BigEndian.Uint32(data[1:]))
		return 5, nil
	}
	if r.left == 0 {
		return 0, errors.New("an empty message")
	}
	n, value, size := field(data[:min(len(data), r.left)])
	if size < 0 {
		if len(data) < r.left && errors.Is(protowire.ParseError(size), io.ErrUnexpectedEOF) {
			return 0, nil
		}
		return 0, protowire.ParseError(size)
	}
	if err := r.take(n, value, each); err != nil {
		return 0, err
	}
	if r.left -= size; r.left == 0 {
		r.open = false
		return size, end()
	}
	return size, nil
}

func (r *reader) take(n protowire.Number, value []byte, each func(resource) error) (err error) {
	switch n {
	case responseType:
		r.kind, err = kindOf(value)
	case responseNonce:
		r.nonce = append(r.nonce[:0], value...)
	case responseResource:
		res, err := readResource(value)
		if err != nil {
			return err
		}
		return each(res)
	}
	return err
}

// words gives numbers to texts, so that two thousand proxies can hold a
// thousand versions each. The first number is 1.
type words struct {
	mu   sync.RWMutex
	ids  map[string]uint32 // guarded by mu
	list []string          // guarded by mu
}

func newWords() *words { return &words{ids: map[string]uint32{}, list: []string{""}} }

func (w *words) id(text []byte) uint32 {
	w.mu.RLock()
	id, ok := w.ids[string(text)]
	w.mu.RUnlock()
	if ok {
		return id
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if id, ok := w.ids[string(text)]; ok {
		return id
	}
	id = uint32(len(w.list))
	w.list = append(w.list, string(text))
	w.ids[w.list[id]] = id
	return id
}

func (w *words) text(id uint32) string {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.list[id]
}
