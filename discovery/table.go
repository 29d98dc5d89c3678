package discovery

import (
	"hash/maphash"
	"iter"
	"maps"
)

// tableShards is how many parts a Table has: an edit copies the parts that it
// touches, a comparison looks into those that differ.
const tableShards = 256

// tableSeed is the same for all Tables, so that equal keys lie in equal shards.
var tableSeed = maphash.MakeSeed()

// Table is an immutable map. An edited one shares with its origin what was not
// edited, so that an edit, and the list of what differs between the two, cost
// what has changed and not what is there. The zero value is empty.
type Table[K, V comparable] struct {
	shards *[tableShards]*tableShard[K, V] // nil: empty; so may a shard be
	n      int
}

type tableShard[K, V comparable] struct{ m map[K]V }

func shardOf[K comparable](k K) uint8 { return uint8(maphash.Comparable(tableSeed, k)) }

// TableOf makes a Table of a map's content.
func TableOf[K, V comparable](m map[K]V) Table[K, V] {
	e := Table[K, V]{}.Edit()
	for k, v := range m {
		e.Set(k, v)
	}
	return e.Table()
}

// Len is the number of keys.
func (t Table[K, V]) Len() int { return t.n }

// Find returns the value of a key.
func (t Table[K, V]) Find(k K) (v V, ok bool) {
	if t.shards == nil {
		return v, false
	}
	s := t.shards[shardOf(k)]
	if s == nil {
		return v, false
	}
	v, ok = s.m[k]
	return v, ok
}

// Get returns the value of a key, or the zero value where there is none.
func (t Table[K, V]) Get(k K) V {
	v, _ := t.Find(k)
	return v
}

// All lists everything, in no order.
func (t Table[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if t.shards == nil {
			return
		}
		for _, s := range t.shards {
			if s == nil {
				continue
			}
			for k, v := range s.m {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// Keys lists the keys, in no order.
func (t Table[K, V]) Keys() iter.Seq[K] {
	return func(yield func(K) bool) {
		for k := range t.All() {
			if !yield(k) {
				return
			}
		}
	}
}

// Differs lists the keys whose values differ, or that only one of both has, in no
// order.
func (t Table[K, V]) Differs(o Table[K, V]) iter.Seq[K] {
	return func(yield func(K) bool) {
		if t.shards == o.shards {
			return
		}
		for i := range tableShards {
			if a, b := t.shard(i), o.shard(i); a != b && !differs(a, b, yield) {
				return
			}
		}
	}
}

func differs[K, V comparable](a, b *tableShard[K, V], yield func(K) bool) bool {
	for k, v := range a.all() {
		if w, ok := b.all()[k]; (!ok || v != w) && !yield(k) {
			return false
		}
	}
	for k := range b.all() {
		if _, ok := a.all()[k]; !ok && !yield(k) {
			return false
		}
	}
	return true
}

func (t Table[K, V]) shard(i int) *tableShard[K, V] {
	if t.shards == nil {
		return nil
	}
	return t.shards[i]
}

func (s *tableShard[K, V]) all() map[K]V {
	if s == nil {
		return nil
	}
	return s.m
}

// TableEdit makes the next Table. It is used by one goroutine.
type TableEdit[K, V comparable] struct {
	from    Table[K, V]
	shards  *[tableShards]*tableShard[K, V] // nil: nothing was edited
	own     [tableShards]bool               // shards that this edit has made
	changed int                             // keys more than from has
}

// Edit starts from t, which stays as it is.
func (t Table[K, V]) Edit() *TableEdit[K, V] { return &TableEdit[K, V]{from: t} }

// Set gives a key a value.
func (e *TableEdit[K, V]) Set(k K, v V) {
	if was, ok := e.find(k); ok && was == v {
		return
	}
	m := e.edit(shardOf(k))
	before := len(m)
	m[k] = v
	e.changed += len(m) - before
}

// Delete takes a key away.
func (e *TableEdit[K, V]) Delete(k K) {
	if _, ok := e.find(k); !ok {
		return
	}
	delete(e.edit(shardOf(k)), k)
	e.changed--
}

func (e *TableEdit[K, V]) find(k K) (V, bool) { return Table[K, V]{shards: e.now()}.Find(k) }

func (e *TableEdit[K, V]) now() *[tableShards]*tableShard[K, V] {
	if e.shards == nil {
		return e.from.shards
	}
	return e.shards
}

func (e *TableEdit[K, V]) edit(i uint8) map[K]V {
	if e.shards == nil {
		e.shards = new([tableShards]*tableShard[K, V])
		if e.from.shards != nil {
			*e.shards = *e.from.shards
		}
	}
	if !e.own[i] {
		e.own[i] = true
		m := maps.Clone(e.shards[i].all())
		if m == nil {
			m = map[K]V{}
		}
		e.shards[i] = &tableShard[K, V]{m}
	}
	return e.shards[i].m
}

// Table is the result; the edit is over. One that changed nothing gives the
// Table that it began with.
func (e *TableEdit[K, V]) Table() Table[K, V] {
	out := Table[K, V]{shards: e.now(), n: e.from.n + e.changed}
	e.from, e.shards, e.own, e.changed = out, nil, [tableShards]bool{}, 0
	return out
}
