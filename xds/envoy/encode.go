package envoy

import (
	"crypto/sha256"
	"encoding/hex"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// versionLength is the length of a version in hex digits: 48 bits, so that two
// contents of one resource never meet by chance.
const versionLength = 12

// metadataKey is the namespace of Roost's metadata on clusters and routes.
const metadataKey = "roost"

var deterministic = proto.MarshalOptions{Deterministic: true}

// encode makes a Resource: its version is a hash of the content, its body is
// marshalled once for all proxies.
func encode(t Type, name string, m proto.Message, refs ...Name) *Resource {
	content := pack(m)
	sum := sha256.Sum256(content.Value)
	return encodeAs(hex.EncodeToString(sum[:])[:versionLength], t, name, content, refs...)
}

// encodeAs makes a Resource of a version.
func encodeAs(version string, t Type, name string, content *anypb.Any, refs ...Name) *Resource {
	body := must(deterministic.Marshal(&discoveryv3.Resource{Name: name, Version: version, Resource: content}))
	return &Resource{Name: Name{t, name}, Version: version, Body: body, Refs: refs}
}

// Message decodes the resource's own content.
func (r *Resource) Message() (proto.Message, error) {
	var wrapped discoveryv3.Resource
	if err := proto.Unmarshal(r.Body, &wrapped); err != nil {
		return nil, err
	}
	return wrapped.GetResource().UnmarshalNew()
}

// JSON is the resource's content as protobuf JSON.
func (r *Resource) JSON() ([]byte, error) {
	m, err := r.Message()
	if err != nil {
		return nil, err
	}
	return protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
}

func pack(m proto.Message) *anypb.Any {
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: must(deterministic.Marshal(m))}
}

// must is for marshalling messages that this package has built itself: it can
// only fail for text that is not UTF-8, which config and sources refuse.
func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func seconds(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

func u32(n uint32) *wrapperspb.UInt32Value { return wrapperspb.UInt32(n) }

// address is an IP and port; any text that is not an IP would be refused.
func address(ip string, port uint16) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}

// fromADS is the config source of everything that Roost serves. timeout is how
// long Envoy waits for it before it goes on without.
func fromADS(timeout time.Duration) *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3, InitialFetchTimeout: seconds(timeout),
	}
}

func metadata(pairs ...string) *corev3.Metadata {
	fields := map[string]*structpb.Value{}
	for i := 0; i+1 < len(pairs); i += 2 {
		fields[pairs[i]] = structpb.NewStringValue(pairs[i+1])
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: {Fields: fields}}}
}
