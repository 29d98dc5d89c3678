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

// codec encodes responses around the bodies of their resources, which all
// streams share, and leaves every other message to gRPC's own codec.
type codec struct {
	encoding.CodecV2
	controlPlane string
}

func newCodec(controlPlane string) codec {
	return codec{encoding.GetCodecV2(proto.Name), controlPlane}
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(*response)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	field := func(b []byte, n protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
	}
	out := make(mem.BufferSlice, 0, 2*len(r.resources)+1)
	b := field(nil, fieldSystemVersion, strconv.FormatUint(r.world, 10))
	b = field(b, fieldTypeURL, r.URL())
	b = field(b, fieldNonce, r.nonce)
	for _, name := range r.removed {
		b = field(b, fieldRemoved, name)
	}
	if c.controlPlane != "" {
		b = field(b, fieldControlPlane, string(field(nil, fieldIdentifier, c.controlPlane)))
	}
	for _, res := range r.resources {
		b = protowire.AppendTag(b, fieldResources, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(len(res.Body)))
		out = append(out, mem.SliceBuffer(b), mem.SliceBuffer(res.Body))
		b = nil
	}
	if len(b) > 0 {
		out = append(out, mem.SliceBuffer(b))
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
