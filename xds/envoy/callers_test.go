package envoy

import (
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
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
