package xds

import (
	"strconv"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of envoy.service.discovery.v3.DeltaDiscoveryResponse, and of
// envoy.config.core.v3.ControlPlane.
const (
	fieldSystemVersion = 1
	fieldResources     = 2
	fieldTypeURL       = 4
	fieldNonce         = 5
	fieldRemoved       = 6
	fieldControlPlane  = 7
	fieldIdentifier    = 1
)

// headRoom is what a response needs beside its resources, unless it removes some.
const headRoom = 192

// resourceRoom is what the tag and the length of a resource need at most.
const resourceRoom = 6

// codec encodes responses around the bodies of their resources, which all
// streams share, and leaves every other message to gRPC's own codec.
type codec struct {
	encoding.CodecV2
	controlPlane []byte // the field of a response
}

func newCodec(controlPlane string) codec {
	c := codec{CodecV2: encoding.GetCodecV2(proto.Name)}
	if controlPlane != "" {
		c.controlPlane = appendField(nil, fieldControlPlane, string(appendField(nil, fieldIdentifier, controlPlane)))
	}
	return c
}

func appendField(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(*response)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	var number [20]byte
	head := make([]byte, 0, headRoom+len(c.controlPlane)+resourceRoom*len(r.resources))
	head = protowire.AppendBytes(protowire.AppendTag(head, fieldSystemVersion, protowire.BytesType), strconv.AppendUint(number[:0], r.world, 10))
	head = appendField(head, fieldTypeURL, r.URL())
	head = appendField(head, fieldNonce, r.nonce)
	for _, name := range r.removed {
		head = appendField(head, fieldRemoved, name)
	}
	head = append(head, c.controlPlane...)
	out := make(mem.BufferSlice, 0, 2*len(r.resources)+1)
	for _, res := range r.resources {
		head = protowire.AppendTag(head, fieldResources, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(len(res.Body)))
		out = append(out, mem.SliceBuffer(head), mem.SliceBuffer(res.Body))
		head = head[len(head):]
	}
	if len(head) > 0 {
		out = append(out, mem.SliceBuffer(head))
	}
	return out, nil
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
