package ledger

import (
	"crypto/sha256"
	"encoding/binary"
	"math/big"
	"net/netip"
	"slices"
)

// maxProbes bounds the search in a pool too large to walk; it is far beyond
// what a pool that still has room needs.
const maxProbes = 1 << 20

// pick returns the first free address for an owner. The first candidate comes
// from a hash of tenant and service, so that independent replicas, and a
// rebuild after a loss of all state, agree in nearly every case; then the
// neighbours are probed in order. probed says that it is not the first.
func (p Pool) pick(o Owner, taken func(netip.Addr) bool) (at netip.Addr, probed, ok bool) {
	first, count := p.usable()
	if count.Sign() <= 0 {
		return netip.Addr{}, false, false
	}
	offset := new(big.Int).Mod(hash(o), count)
	limit := uint64(maxProbes)
	if count.IsUint64() {
		limit = min(limit, count.Uint64())
	}
	one := big.NewInt(1)
	for n := range limit {
		a := add(first, offset)
		if !taken(a) && !slices.Contains(p.Exclude, a) {
			return a, n > 0, true
		}
		if offset.Add(offset, one); offset.Cmp(count) == 0 {
			offset.SetInt64(0)
		}
	}
	return netip.Addr{}, false, false
}

// usable is the range to give out: all but the network address and, in IPv4,
// the broadcast address, where the pool has more than two.
func (p Pool) usable() (first netip.Addr, count *big.Int) {
	prefix := p.Prefix.Masked()
	host := uint(prefix.Addr().BitLen() - prefix.Bits())
	count = new(big.Int).Lsh(big.NewInt(1), host)
	first = prefix.Addr()
	if host < 2 {
		return first, count
	}
	if first.Is4() {
		return first.Next(), count.Sub(count, big.NewInt(2))
	}
	return first.Next(), count.Sub(count, big.NewInt(1))
}

// Size is how many addresses the pool can give.
func (p Pool) Size() *big.Int {
	_, count := p.usable()
	excluded := 0
	for _, a := range p.Exclude {
		if p.Prefix.Contains(a) {
			excluded++
		}
	}
	return count.Sub(count, big.NewInt(int64(excluded)))
}

func hash(o Owner) *big.Int {
	h := sha256.New()
	var length [8]byte
	for _, s := range []string{o.Tenant, o.Service} {
		binary.BigEndian.PutUint64(length[:], uint64(len(s)))
		h.Write(length[:])
		h.Write([]byte(s))
	}
	return new(big.Int).SetBytes(h.Sum(nil))
}

func add(a netip.Addr, n *big.Int) netip.Addr {
	bytes := a.AsSlice()
	sum := new(big.Int).Add(new(big.Int).SetBytes(bytes), n)
	out, _ := netip.AddrFromSlice(sum.FillBytes(make([]byte, len(bytes))))
	return out
}
