package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/netip"
)

// empty says that a batch changes nothing.
func (b Batch) empty() bool {
	return len(b.Put)+len(b.Delete)+len(b.PutObjects)+len(b.DelObjects)+len(b.PutMarks)+len(b.DelMarks) == 0
}

// stamp sets the generation of the batch and of all that it puts.
func (b *Batch) stamp(after, floor uint64) {
	b.After, b.Generation = after, max(after, floor)+1
	for n := range b.Put {
		b.Put[n].Generation = b.Generation
	}
	for n := range b.PutObjects {
		b.PutObjects[n].Generation = b.Generation
	}
	for n := range b.PutMarks {
		b.PutMarks[n].Generation = b.Generation
	}
}

// write hands a batch to the store, in pieces where that has a limit, and takes
// over each piece that was written. floor is a generation that must be passed.
func (l *Ledger) write(ctx context.Context, b Batch, floor uint64) error {
	for !b.empty() || l.generation.Load() <= floor && floor > 0 {
		limit := Limit{math.MaxInt, math.MaxInt}
		limited, ok := l.store.(Limited)
		if ok {
			limit = limited.Limit()
		}
		piece, rest := b.cut(limit)
		piece.stamp(l.generation.Load(), floor)
		err := l.store.Apply(ctx, piece)
		if ok && errors.Is(err, ErrTooLarge) && limited.Limit() != limit {
			continue
		}
		if err != nil {
			return err
		}
		l.keep(piece)
		b = rest
	}
	return nil
}

// keep takes over what was written.
func (l *Ledger) keep(b Batch) {
	changed := make(map[netip.Addr]*Record, len(b.Put)+len(b.Delete))
	for _, a := range b.Delete {
		if r := l.byAddress[a]; r != nil {
			delete(l.byAddress, a)
			delete(l.bySlot, slotOf(*r))
			changed[a] = nil
		}
	}
	for n := range b.Put {
		r := b.Put[n]
		l.byAddress[r.Address], l.bySlot[slotOf(r)] = &r, &r
		changed[r.Address] = &r
	}
	for _, o := range b.DelObjects {
		delete(l.objects, o)
	}
	for _, o := range b.PutObjects {
		l.objects[o.Owner] = o
	}
	for _, k := range b.DelMarks {
		delete(l.marks, k)
	}
	for _, m := range b.PutMarks {
		l.marks[m.Key()] = m
	}
	if len(changed) > 0 {
		l.published.Store(l.published.Load().with(changed))
	}
	l.generation.Store(b.Generation)
}

// cut takes as much from a batch as fits under the limit, at least one item. The
// services come first: an address without its service would be released again.
func (b Batch) cut(limit Limit) (piece, rest Batch) {
	c := cutter{limit: limit}
	if limit.Operations == math.MaxInt {
		return b, Batch{}
	}
	piece.PutObjects, rest.PutObjects = part(&c, 1, b.PutObjects)
	piece.Put, rest.Put = part(&c, 2, b.Put)
	piece.PutMarks, rest.PutMarks = part(&c, 1, b.PutMarks)
	piece.DelMarks, rest.DelMarks = part(&c, 1, b.DelMarks)
	piece.Delete, rest.Delete = part(&c, 2, b.Delete)
	piece.DelObjects, rest.DelObjects = part(&c, 1, b.DelObjects)
	return piece, rest
}

type cutter struct {
	limit       Limit
	used, bytes int
	full        bool
}

func part[T any](c *cutter, operations int, items []T) (taken, rest []T) {
	for n, item := range items {
		size := 0
		if data, err := json.Marshal(item); err == nil { // the store meets the error again
			size = len(data)
		}
		if c.full || c.used > 0 && (c.used+operations > c.limit.Operations || c.bytes+size > c.limit.Bytes) {
			c.full = true
			return items[:n:n], items[n:]
		}
		c.used, c.bytes = c.used+operations, c.bytes+size
	}
	return items, nil
}
