package discovery

import (
	"fmt"
	"net/netip"
	"testing"
)

// BenchmarkMove is one instance of one service that moves, among 10,000
// services with 10 instances each.
func BenchmarkMove(b *testing.B) {
	const services, each = 10_000, 10
	m := newMerge(Config{})
	update := func(n int, port uint16, index uint64) Update {
		name := fmt.Sprintf("s%d", n)
		u := Update{Source: "consul", Scope: name, Index: index}
		for i := range each {
			u.Instances = append(u.Instances, Instance{ID: fmt.Sprintf("%s-%d", name, i), Node: "h1", Key: Key{"acme", name}, Address: netip.AddrFrom4([4]byte{10, byte(i), byte(n >> 8), byte(n)}), Ports: []Port{{Number: port}}, Weight: 1, Health: Passing})
		}
		return u
	}
	var scopes []string
	for n := range services {
		m.apply(update(n, 80, 1))
		scopes = append(scopes, fmt.Sprintf("s%d", n))
	}
	m.apply(Update{Source: "consul", Complete: true, Scopes: scopes, Index: 1})
	m.catalog()
	b.ResetTimer()
	for i := range b.N {
		if !m.apply(update(i%services, uint16(i%60_000+81), uint64(i+2))) {
			b.Fatal("nothing changed")
		}
		m.catalog()
	}
}

// BenchmarkComplete is the end of a first pass over 10,000 services.
func BenchmarkComplete(b *testing.B) {
	const services = 10_000
	m := newMerge(Config{})
	var scopes []string
	for n := range services {
		name := fmt.Sprintf("s%d", n)
		scopes = append(scopes, name)
		m.apply(Update{Source: "consul", Scope: name, Index: 1, Instances: []Instance{{ID: name, Key: Key{"acme", name}}}})
	}
	for b.Loop() {
		m.apply(Update{Source: "consul", Complete: true, Scopes: scopes, Index: 1})
	}
}
