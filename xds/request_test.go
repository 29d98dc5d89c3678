package xds

import (
	"maps"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// decoded is a request as it comes from the wire.
func decoded(m *discovery.DeltaDiscoveryRequest) *request {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	q := &request{}
	if err := q.decode(b); err != nil {
		panic(err)
	}
	return q
}

// TestRequest: what is read of a message is what protobuf reads.
func TestRequest(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		texts := rapid.SliceOfN(rapid.StringN(0, 5, 20), 0, 6)
		m := &discovery.DeltaDiscoveryRequest{
			TypeUrl: rapid.String().Draw(rt, "type"), ResponseNonce: rapid.String().Draw(rt, "nonce"), ResourceNamesSubscribe: texts.Draw(rt, "subscribe"),
			ResourceNamesUnsubscribe: texts.Draw(rt, "unsubscribe"), InitialResourceVersions: rapid.MapOfN(rapid.String(), rapid.String(), 0, 6).Draw(rt, "versions"),
			ResourceLocatorsSubscribe: []*discovery.ResourceLocator{{Name: "not served"}},
		}
		if rapid.Bool().Draw(rt, "refused") {
			m.ErrorDetail = &rpcstatus.Status{Code: 3, Message: rapid.String().Draw(rt, "message")}
		}
		if rapid.Bool().Draw(rt, "node") {
			m.Node = &corev3.Node{Id: "n"}
		}
		q := decoded(m)
		versions := map[string]string{}
		for _, h := range q.versions {
			versions[h.name] = h.version
		}
		node, err := proto.Marshal(m.GetNode())
		if err != nil {
			rt.Fatal(err)
		}
		for what, diff := range map[string]string{
			"type": cmp.Diff(m.GetTypeUrl(), q.typeURL), "nonce": cmp.Diff(m.GetResponseNonce(), q.nonce), "message": cmp.Diff(m.GetErrorDetail().GetMessage(), q.message),
			"subscribe": cmp.Diff(append([]string{}, m.GetResourceNamesSubscribe()...), append([]string{}, q.subscribe...)), "refused": cmp.Diff(m.GetErrorDetail() != nil, q.refused),
			"unsubscribe": cmp.Diff(append([]string{}, m.GetResourceNamesUnsubscribe()...), append([]string{}, q.unsubscribe...)), "node": cmp.Diff(string(node), q.node),
		} {
			if diff != "" {
				rt.Errorf("%s: %s", what, diff)
			}
		}
		if !maps.Equal(versions, m.GetInitialResourceVersions()) && len(versions)+len(m.GetInitialResourceVersions()) > 0 {
			rt.Errorf("versions %v, want %v", versions, m.GetInitialResourceVersions())
		}
	})
}

// TestRequestBounds: what is too large, or no text, is refused before it is kept.
func TestRequestBounds(t *testing.T) {
	message := func(m *discovery.DeltaDiscoveryRequest) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		what, want string
		bytes      []byte
	}{
		{"names", "more than 100000 resources", message(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: make([]string, maxNames+1)})},
		{"a node", "the node has 65549 bytes", message(&discovery.DeltaDiscoveryRequest{Node: &corev3.Node{Id: strings.Repeat("x", maxNode+9)}})},
		{"no text", "not UTF-8", []byte{fieldSubscribe<<3 | 2, 1, 0xff}},
		{"no text in a version", "not UTF-8", []byte{fieldVersions<<3 | 2, 3, fieldKey<<3 | 2, 1, 0xff}},
		{"half a message", "unexpected EOF", []byte{fieldSubscribe<<3 | 2, 9, 'a'}},
		{"half a version", "unexpected EOF", []byte{fieldVersions<<3 | 2, 3, fieldKey<<3 | 2, 9, 'a'}},
	} {
		if err := new(request).decode(c.bytes); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.what, err, c.want)
		}
	}
}

// FuzzRequest: whatever comes, what protobuf takes is taken, and read alike.
func FuzzRequest(f *testing.F) {
	f.Add([]byte{fieldSubscribe<<3 | 2, 1, 'a', fieldResponseNonce<<3 | 2, 1, '7'})
	f.Add([]byte{fieldVersions<<3 | 2, 6, fieldKey<<3 | 2, 1, 'a', fieldValue<<3 | 2, 1, 'b'})
	f.Fuzz(func(t *testing.T, b []byte) {
		q, m := &request{}, &discovery.DeltaDiscoveryRequest{}
		err := q.decode(b)
		if proto.Unmarshal(b, m) != nil {
			return
		}
		if err != nil {
			t.Fatalf("protobuf takes it: %v", err)
		}
		if q.nonce != m.GetResponseNonce() || q.typeURL != m.GetTypeUrl() || len(q.subscribe) != len(m.GetResourceNamesSubscribe()) {
			t.Errorf("read %+v, protobuf %v", q, m)
		}
	})
}
