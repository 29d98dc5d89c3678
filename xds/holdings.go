package xds

import (
	"cmp"
	"encoding/binary"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync"
	"weak"

	"github.com/roostmesh/roost/xds/envoy"
)

// holdings are resources of one type, at most one of a name. They are immutable,
// and the same ones are shared: a fleet holds the same many thousand times, and a
// change of one of them leads all of its proxies to the same next ones. nil has
// none.
type holdings struct {
	sorted []*envoy.Resource // by name
	sum    uint64            // of their fingerprints
}

func (h *holdings) all() []*envoy.Resource {
	if h == nil {
		return nil
	}
	return h.sorted
}

func (h *holdings) len() int { return len(h.all()) }

// get returns the resource of a name, or nil.
func (h *holdings) get(name string) *envoy.Resource {
	all := h.all()
	if i, ok := slices.BinarySearchFunc(all, name, compareName); ok {
		return all[i]
	}
	return nil
}

func compareName(r *envoy.Resource, name string) int { return strings.Compare(r.Name.Name, name) }

// sets knows the holdings that are in use, by their sum.
type sets struct {
	mu    sync.Mutex
	known map[setKey]weak.Pointer[holdings] // guarded by mu
	sweep int                               // how many are worth a look for those that nobody uses any more; guarded by mu
}

type setKey struct {
	envoy.Type
	sum uint64
	n   int
}

// sweepFrom is how many holdings are kept without a look at their use.
const sweepFrom = 1024

func newSets() *sets { return &sets{known: map[setKey]weak.Pointer[holdings]{}, sweep: sweepFrom} }

// with returns h with some resources more, in the place of those of the same name.
func (s *sets) with(h *holdings, more ...*envoy.Resource) *holdings {
	if len(more) == 0 {
		return h
	}
	sum, n := uint64(0), h.len()
	if h != nil {
		sum = h.sum
	}
	for _, r := range more {
		if old := h.get(r.Name.Name); old != nil {
			sum -= fingerprintOf(old)
			n--
		}
		sum += fingerprintOf(r)
		n++
	}
	if known := s.find(setKey{more[0].Type, sum, n}); known != nil {
		return known
	}
	return s.keep(&holdings{merged(h.all(), more), sum})
}

// merged is a list with more in it; both are in the order of their names, or more
// is brought into it.
func merged(list, more []*envoy.Resource) []*envoy.Resource {
	sortByName(more, func(r *envoy.Resource) string { return r.Name.Name })
	out := make([]*envoy.Resource, 0, len(list)+len(more))
	for _, r := range more {
		i, same := slices.BinarySearchFunc(list, r.Name.Name, compareName)
		out = append(append(out, list[:i]...), r)
		if same {
			i++
		}
		list = list[i:]
	}
	return slices.Clip(append(out, list...))
}

// without returns h without some names.
func (s *sets) without(h *holdings, names ...string) *holdings {
	if h == nil {
		return nil
	}
	left, sum := slices.Clone(h.sorted), h.sum
	for _, name := range names {
		if i, ok := slices.BinarySearchFunc(left, name, compareName); ok {
			sum -= fingerprintOf(left[i])
			left = slices.Delete(left, i, i+1)
		}
	}
	switch len(left) {
	case h.len():
		return h
	case 0:
		return nil
	}
	return s.keep(&holdings{slices.Clip(left), sum})
}

func (s *sets) find(key setKey) *holdings {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known[key].Value()
}

// keep makes holdings, which are not empty, known, or returns those that became known meanwhile.
func (s *sets) keep(h *holdings) *holdings {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := setKey{h.sorted[0].Type, h.sum, len(h.sorted)}
	if known := s.known[key].Value(); known != nil {
		return known
	}
	s.known[key] = weak.Make(h)
	if len(s.known) >= s.sweep {
		maps.DeleteFunc(s.known, func(_ setKey, p weak.Pointer[holdings]) bool { return p.Value() == nil })
		s.sweep = max(2*len(s.known), sweepFrom)
	}
	return h
}

// fingerprints are of this process: no client can make two that are alike.
var fingerprints = maphash.MakeSeed()

// fingerprint tells a version of a resource from all others, and the sum of many a
// set of versions from all other sets.
func fingerprint(name, version string) uint64 {
	return maphash.String(fingerprints, name) * (maphash.String(fingerprints, version) | 1)
}

// fingerprintOf tells one whose content is unknown from one of the same version
// that is known.
func fingerprintOf(r *envoy.Resource) uint64 {
	f := fingerprint(r.Name.Name, r.Version)
	if r.Body == nil {
		f *= 3
	}
	return f
}

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
