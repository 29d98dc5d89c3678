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
	switch r := v.(type) {
	case *response:
		return c.delta(r), nil
	case *wholeResponse:
		return c.whole(r), nil
	}
	return c.CodecV2.Marshal(v)
}

func (c codec) delta(r *response) mem.BufferSlice {
	b := textField(nil, fieldSystemVersion, strconv.FormatUint(r.world, 10))
	b = textField(b, fieldTypeURL, r.URL())
	b = textField(b, fieldNonce, r.nonce)
	for _, name := range r.removed {
		b = textField(b, fieldRemoved, name)
	}
	return bodies(c.maker(b, fieldControlPlane), r.resources, func(r *envoy.Resource) []byte { return r.Body })
}

func (c codec) whole(r *wholeResponse) mem.BufferSlice {
	b := textField(nil, fieldVersionInfo, r.version())
	b = textField(b, fieldTypeURL, r.URL())
	b = textField(b, fieldNonce, r.nonce)
	return bodies(c.maker(b, fieldWholeControlPlane), r.all, content)
}

func textField(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

// maker adds who has made a response.
func (c codec) maker(b []byte, n protowire.Number) []byte {
	if c.controlPlane == "" {
		return b
	}
	return textField(b, n, string(textField(nil, fieldIdentifier, c.controlPlane)))
}

// bodies adds a part of each resource to what a response begins with.
func bodies(b []byte, resources []*envoy.Resource, part func(*envoy.Resource) []byte) mem.BufferSlice {
	out := make(mem.BufferSlice, 0, 2*len(resources)+1)
	for _, res := range resources {
		body := part(res)
		b = protowire.AppendTag(b, fieldResources, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(len(body)))
		out = append(out, mem.SliceBuffer(b), mem.SliceBuffer(body))
		b = nil
	}
	if len(b) > 0 {
		out = append(out, mem.SliceBuffer(b))
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

// size is about how many bytes a response has.
func (r *response) size() int {
	n := 0
	for _, res := range r.resources {
		n += len(res.Body)
	}
	for _, name := range r.removed {
		n += len(name)
	}
	return n
}

func (r *response) kind() envoy.Type { return r.Type }
