package xds

import (
	"strconv"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/roostmesh/roost/xds/envoy"
)

// Field numbers of envoy.service.discovery.v3.DeltaDiscoveryResponse, of
// DiscoveryResponse where they differ, of Resource, and of
// envoy.config.core.v3.ControlPlane.
const (
	fieldSystemVersion = 1
	fieldResources     = 2
	fieldTypeURL       = 4
	fieldNonce         = 5
	fieldRemoved       = 6
	fieldControlPlane  = 7
	fieldIdentifier    = 1

	fieldVersionInfo       = 1
	fieldWholeControlPlane = 6

	fieldContent = 2
)

// headRoom is what a response needs beside its resources, unless it removes some.
const headRoom = 192

// resourceRoom is what the tag and the length of a resource need at most.
const resourceRoom = 6

// codec encodes responses around the bodies of their resources, which all
// streams share, and leaves every other message to gRPC's own codec.
type codec struct {
	encoding.CodecV2
	controlPlane []byte // who makes the responses, marshalled
}

func newCodec(controlPlane string) codec {
	c := codec{CodecV2: encoding.GetCodecV2(proto.Name)}
	if controlPlane != "" {
		c.controlPlane = appendField(nil, fieldIdentifier, controlPlane)
	}
	return c
}

func appendField(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch r := v.(type) {
	case *response:
		return c.delta(r), nil
	case *wholeResponse:
		return c.whole(r), nil
	}
	return c.CodecV2.Marshal(v)
}

func (c codec) delta(r *response) mem.BufferSlice {
	var number [20]byte
	head := make([]byte, 0, headRoom+len(c.controlPlane)+resourceRoom*len(r.resources))
	head = protowire.AppendBytes(protowire.AppendTag(head, fieldSystemVersion, protowire.BytesType), strconv.AppendUint(number[:0], r.world, 10))
	head = appendField(head, fieldTypeURL, r.URL())
	head = appendField(head, fieldNonce, r.nonce)
	for _, name := range r.removed {
		head = appendField(head, fieldRemoved, name)
	}
	return bodies(c.made(head, fieldControlPlane), r.resources, func(r *envoy.Resource) []byte { return r.Body })
}

func (c codec) whole(r *wholeResponse) mem.BufferSlice {
	head := make([]byte, 0, headRoom+len(c.controlPlane)+resourceRoom*len(r.all))
	head = appendField(head, fieldVersionInfo, r.version())
	head = appendField(head, fieldTypeURL, r.URL())
	head = appendField(head, fieldNonce, r.nonce)
	return bodies(c.made(head, fieldWholeControlPlane), r.all, content)
}

// made adds who has made a response.
func (c codec) made(b []byte, n protowire.Number) []byte {
	if len(c.controlPlane) == 0 {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), c.controlPlane)
}

// bodies adds a part of each resource to what a response begins with.
func bodies(head []byte, resources []*envoy.Resource, part func(*envoy.Resource) []byte) mem.BufferSlice {
	out := make(mem.BufferSlice, 0, 2*len(resources)+1)
	for _, res := range resources {
		body := part(res)
		head = protowire.AppendTag(head, fieldResources, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(len(body)))
		out = append(out, mem.SliceBuffer(head), mem.SliceBuffer(body))
		head = head[len(head):]
	}
	if len(head) > 0 {
		out = append(out, mem.SliceBuffer(head))
	}
	return out
}

// content is the Any inside of a resource's body, whose bytes it shares.
func content(r *envoy.Resource) []byte {
	for b := r.Body; len(b) > 0; {
		n, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			return nil
		}
		if n == fieldContent && typ == protowire.BytesType {
			value, size := protowire.ConsumeBytes(b[size:])
			if size < 0 {
				return nil
			}
			return value
		}
		skip := protowire.ConsumeFieldValue(n, typ, b[size:])
		if skip < 0 {
			return nil
		}
		b = b[size+skip:]
	}
	return nil
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	q, ok := v.(*request)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return q.decode(buf.ReadOnlyData())
}
