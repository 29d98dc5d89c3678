package envoy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// begins tells what the expression of a TCP rule tells of an address.
func begins(p netip.Prefix, a netip.Addr) bool {
	text := netip.AddrPortFrom(a, 4242).String()
	for _, prefix := range textPrefixes(p) {
		if strings.HasPrefix(text, prefix) {
			return true
		}
	}
	return false
}

// TestTextPrefixesAreThePrefix: for IPv4 the texts admit exactly the prefix; for
// IPv6 never more than it.
func TestTextPrefixesAreThePrefix(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		near := func(base []byte) []byte {
			out := append([]byte{}, base...)
			i := rapid.IntRange(0, len(out)-1).Draw(rt, "byte")
			out[i] ^= byte(1 << rapid.IntRange(0, 7).Draw(rt, "bit"))
			return out
		}
		raw := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(rt, "v4")
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte(raw)), rapid.IntRange(0, 32).Draw(rt, "bits"))
		for _, b := range [][]byte{raw, near(raw), rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(rt, "other")} {
			if a := netip.AddrFrom4([4]byte(b)); begins(p, a) != p.Contains(a) {
				rt.Fatalf("%s in %s: %v by its text, %v", a, p, begins(p, a), p.Contains(a))
			}
		}
		raw = rapid.SliceOfN(rapid.SampledFrom([]byte{0, 0, 1, 0x12, 0xfd}), 16, 16).Draw(rt, "v6")
		p = netip.PrefixFrom(netip.AddrFrom16([16]byte(raw)), rapid.IntRange(0, 128).Draw(rt, "bits6"))
		for _, b := range [][]byte{raw, near(raw), rapid.SliceOfN(rapid.SampledFrom([]byte{0, 0, 1, 0x12, 0xfd}), 16, 16).Draw(rt, "other6")} {
			if a := netip.AddrFrom16([16]byte(b)); !a.Is4In6() && begins(p, a) && !p.Contains(a) {
				rt.Fatalf("%s is let through by %s", a, p)
			}
		}
	})
	if !begins(netip.MustParsePrefix("fd12:3456:789a::/48"), netip.MustParseAddr("fd12:3456:789a::1")) {
		t.Error("a plain IPv6 prefix admits nobody")
	}
}

// TestNoMoreListenersThanDescriptors: a proxy is given the listeners that its
// file descriptors allow; Get and All agree, and what is beyond is counted.
func TestNoMoreListenersThanDescriptors(t *testing.T) {
	c := &lb.Config{Domain: "roost", Node: "h1", CaptureNode: lb.CaptureNft}
	var specs []*lb.ServiceSpec
	addresses := map[lb.Key]lb.Addresses{}
	for i := range 50 {
		key := lb.Key{Tenant: "acme", Service: fmt.Sprintf("s%02d", i)}
		specs = append(specs, &lb.ServiceSpec{Key: key, Ports: []lb.PortSpec{{Name: "tcp", Port: 80, Protocol: lb.TCP}}})
		addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 0, byte(i + 1)})}
	}
	world := Translate(nil, lb.Build(nil, lb.Input{Config: c, Catalog: discovery.NewCatalog(nil), Services: specs, Addresses: addresses}), nil)
	id := lb.Identity{Role: lb.Node, Node: "h1"}
	for _, test := range []struct {
		metadata       map[string]string
		listed, beyond int
	}{
		{nil, 51, 0}, // the capture listener beside them
		{map[string]string{MetadataFDs: "1000000", MetadataWorker: "2"}, 51, 0},
		{map[string]string{MetadataFDs: "224", MetadataWorker: "2"}, 21, 30}, // (224*3/4-128)/2 = 20
	} {
		p := ProxyOf(id, test.metadata)
		v := world.View(p)
		n := 0
		for r := range v.All(Listener) {
			n++
			if v.Get(r.Name) != r && r.Name.Name != CaptureListener {
				t.Errorf("%s is listed and not found", r.Name.Name)
			}
		}
		if n != test.listed || world.Beyond(p) != test.beyond {
			t.Errorf("%v: %d listed, %d beyond; want %d, %d", test.metadata, n, world.Beyond(p), test.listed, test.beyond)
		}
		if last := v.Get(Name{Listener, "s49.acme:80"}); (last != nil) != (test.beyond == 0) {
			t.Errorf("%v: the last listener is %v", test.metadata, last)
		}
	}
}
