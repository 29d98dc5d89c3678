package xds

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/roostmesh/roost/xds/envoy"
)

// holdings are resources of one type, at most one of a name. They cost a pointer
// each: a fleet holds the same ones many thousand times.
type holdings struct{ sorted []*envoy.Resource } // by name

func (h *holdings) find(name string) (int, bool) {
	if n := len(h.sorted); n == 0 || h.sorted[n-1].Name.Name < name {
		return n, false // most come in their order
	}
	return slices.BinarySearchFunc(h.sorted, name, func(r *envoy.Resource, name string) int { return strings.Compare(r.Name.Name, name) })
}

// get returns the resource of a name, or nil.
func (h *holdings) get(name string) *envoy.Resource {
	if i, ok := h.find(name); ok {
		return h.sorted[i]
	}
	return nil
}

// put adds a resource, in the place of one of the same name.
func (h *holdings) put(r *envoy.Resource) {
	i, ok := h.find(r.Name.Name)
	if ok {
		h.sorted[i] = r
		return
	}
	h.sorted = slices.Insert(h.sorted, i, r)
}

// drop takes a resource away and says whether it was there.
func (h *holdings) drop(name string) bool {
	i, ok := h.find(name)
	if ok {
		h.sorted = slices.Delete(h.sorted, i, i+1)
	}
	return ok
}

func (h *holdings) len() int { return len(h.sorted) }

// bag is a small map by name that gives the memory of a great load back: a Go map
// never shrinks. The zero value is empty.
type bag[V any] struct {
	m    map[string]V
	most int // keys that m has had
}

// bagKeeps is how many keys an empty bag stays ready for.
const bagKeeps = 8

func (b *bag[V]) get(name string) V { return b.m[name] }

func (b *bag[V]) has(name string) bool {
	_, ok := b.m[name]
	return ok
}

func (b *bag[V]) set(name string, v V) {
	if b.m == nil {
		b.m = map[string]V{}
	}
	b.m[name] = v
	b.most = max(b.most, len(b.m))
}

// reserve makes room for n keys where there is none yet.
func (b *bag[V]) reserve(n int) {
	if len(b.m) == 0 && n > bagKeeps {
		b.m, b.most = make(map[string]V, n), n
	}
}

func (b *bag[V]) del(name string) {
	delete(b.m, name)
	if len(b.m) == 0 && b.most > bagKeeps {
		b.m, b.most = nil, 0
	}
}

func (b *bag[V]) len() int { return len(b.m) }

// expectAtMost bounds what is made ready for resources that may come.
const expectAtMost = 4096

// sortByName puts a list in the order of its names. Names of a fleet are alike and
// many: what follows their common beginning is compared as a number.
func sortByName[T any](list []T, name func(T) string) {
	if slices.IsSortedFunc(list, func(a, b T) int { return strings.Compare(name(a), name(b)) }) {
		return
	}
	skip := len(name(list[0]))
	for _, v := range list {
		skip = common(name(v), name(list[0])[:skip])
	}
	type key struct {
		number uint64
		at     int32
	}
	keys := make([]key, len(list))
	for i, v := range list {
		var head [8]byte
		copy(head[:], name(v)[skip:])
		keys[i] = key{binary.BigEndian.Uint64(head[:]), int32(i)}
	}
	slices.SortFunc(keys, func(a, b key) int {
		if a.number != b.number {
			return cmp.Compare(a.number, b.number)
		}
		return strings.Compare(name(list[a.at]), name(list[b.at]))
	})
	sorted := make([]T, len(list))
	for i, k := range keys {
		sorted[i] = list[k.at]
	}
	copy(list, sorted)
}

// common is how many bytes two texts begin with alike.
func common(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// sortedNames are the keys of a map, in order.
func sortedNames[V any](m map[string]V) []string {
	if len(m) == 0 {
		return nil
	}
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	sortByName(names, func(name string) string { return name })
	return names
}
