package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	// updateTries bounds how often an Update is begun anew after a conflict; with
	// forty writers at once a dozen are seen.
	updateTries = 64
	retryMin    = 2 * time.Millisecond
	retryMax    = 500 * time.Millisecond
)

// Update runs f against a transaction. All that f did is written as one batch,
// or nothing is, also when f returns an error. When another writer was first, the
// ledger adopts what that one wrote and runs f again: f must decide by what the
// Tx shows, and whatever it leaves outside must be what its last run left.
//
// With a Store that has a Limit a large change becomes a sequence of batches; see
// Limited.
func (l *Ledger) Update(ctx context.Context, f func(*Tx) error) error { return l.update(ctx, 0, f) }

// update is Update with a generation that must be passed.
func (l *Ledger) update(ctx context.Context, floor uint64, f func(*Tx) error) error {
	var err error
	for try := range updateTries {
		if try > 0 {
			if waited := pause(ctx, try); waited != nil {
				return errors.Join(err, waited)
			}
		}
		tx := newTx(l)
		if err := f(tx); err != nil {
			return err
		}
		if err = l.write(ctx, tx.batch(), floor); err == nil {
			return nil
		}
		if !errors.Is(err, ErrConflict) || errors.Is(err, ErrLost) {
			return err
		}
		if loaded := l.reload(ctx); loaded != nil {
			return errors.Join(err, loaded)
		}
	}
	return fmt.Errorf("gave up after %d tries: %w", updateTries, err)
}

// pause waits longer after each lost race, and by chance, so that the others of
// the race do not come back together.
func pause(ctx context.Context, try int) error {
	d := min(retryMin<<min(try, 10), retryMax)
	timer := time.NewTimer(rand.N(d))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// reload adopts what the store has.
func (l *Ledger) reload(ctx context.Context) error {
	state, err := l.store.Load(ctx)
	if err != nil {
		return err
	}
	_, err = l.Adopt(state)
	return err
}

// Tx is a change in the making. What it shows is the ledger with all that was
// done in it so far. It ends with the function it was given to.
type Tx struct {
	l   *Ledger
	now time.Time

	// What is changed; nil is gone. A freed address stays in records, so that it
	// is given to nobody else in the same transaction.
	records map[netip.Addr]*Record
	slots   map[slot]*Record
	objects map[Owner]*Object
	marks   map[MarkKey]*Mark
	full    map[poolKey]error // pools that had no room
}

type poolKey struct {
	name   string
	prefix netip.Prefix
}

func newTx(l *Ledger) *Tx {
	return &Tx{l: l, now: l.now().UTC().Round(0), records: map[netip.Addr]*Record{}, slots: map[slot]*Record{}, objects: map[Owner]*Object{}, marks: map[MarkKey]*Mark{}, full: map[poolKey]error{}}
}

func (tx *Tx) put(r Record) { tx.records[r.Address], tx.slots[slotOf(r)] = &r, &r }

func (tx *Tx) slot(s slot) *Record {
	if r, ok := tx.slots[s]; ok {
		return r
	}
	return tx.l.bySlot[s]
}

func (tx *Tx) taken(a netip.Addr) bool {
	_, here := tx.records[a]
	return here || tx.l.byAddress[a] != nil
}

// Lookup finds what an owner has of a kind, bound or in quarantine.
func (tx *Tx) Lookup(o Owner, kind string, v6 bool) (Record, bool) {
	r := tx.slot(slot{o, kind, v6})
	if r == nil {
		return Record{}, false
	}
	return *r, true
}

// Records lists every record, ordered by address; it is not to be changed.
func (tx *Tx) Records() []Record {
	if len(tx.records) == 0 {
		return tx.l.Records()
	}
	return merge(tx.l.Records(), tx.records)
}

// Bind gives every wish an address and returns the records that are new or back
// from quarantine. An owner that has an address of the kind and family keeps it,
// also when it lies outside the pool of today. Reasons name what asked:
// "declared", "seen in Consul". The records' Generation is known after Update.
func (tx *Tx) Bind(wishes []Wish, reason string) (bound []Record, refused []Refused) {
	for _, w := range wishes {
		s := slot{w.Owner, w.Pool.Kind, w.Pool.Prefix.Addr().Is6()}
		r := tx.slot(s)
		if r != nil && r.State == Bound {
			continue
		}
		if r == nil {
			r = tx.l.bySlot[s] // freed in this very transaction: nobody else can have it
		}
		var rec Record
		switch {
		case r != nil:
			rec = *r
			rec.State, rec.Since, rec.Reason = Bound, tx.now, reason
		default:
			at, probed, err := tx.pick(w)
			if err != nil {
				refused = append(refused, Refused{w, err})
				continue
			}
			rec = Record{Address: at, Kind: w.Pool.Kind, Pool: w.Pool.Name, Owner: w.Owner, State: Bound, Since: tx.now, Reason: reason, Probed: probed}
		}
		tx.put(rec)
		bound = append(bound, rec)
	}
	return bound, refused
}

// pick finds a free address. A pool that was full is not searched again:
// nothing becomes free within a transaction.
func (tx *Tx) pick(w Wish) (netip.Addr, bool, error) {
	key := poolKey{w.Pool.Name, w.Pool.Prefix}
	if err := tx.full[key]; err != nil {
		return netip.Addr{}, false, err
	}
	at, probed, ok := w.Pool.pick(w.Owner, tx.taken)
	if ok {
		return at, probed, nil
	}
	tx.full[key] = fmt.Errorf("pool %s of %s has no free address, %d of %s are used: %w", w.Pool.Name, w.Pool.Prefix, tx.used(w.Pool), w.Pool.Size(), ErrPoolFull)
	return netip.Addr{}, false, tx.full[key]
}

// used counts the records in a pool, quarantined and freed ones too: they have
// no room for others yet.
func (tx *Tx) used(p Pool) int {
	n := 0
	for a := range tx.l.byAddress {
		if p.Prefix.Contains(a) {
			n++
		}
	}
	for a := range tx.records {
		if tx.l.byAddress[a] == nil && p.Prefix.Contains(a) {
			n++
		}
	}
	return n
}

// Release puts what an owner has of the kinds, or of both where none is named,
// into quarantine and returns it. Its addresses reach nobody and go to nobody
// else; Bind gives them back to the owner.
func (tx *Tx) Release(o Owner, reason string, kinds ...string) []Record {
	if len(kinds) == 0 {
		kinds = []string{Internal, Dedicated}
	}
	var gone []Record
	for _, kind := range kinds {
		for _, v6 := range []bool{false, true} {
			if r := tx.slot(slot{o, kind, v6}); r != nil && r.State == Bound {
				q := *r
				q.State, q.Since, q.Reason = Quarantined, tx.now, reason
				tx.put(q)
				gone = append(gone, q)
			}
		}
	}
	return gone
}

// Free forgets a quarantined record: later transactions may give its address to
// anybody. It says whether there was one; a bound record stays.
func (tx *Tx) Free(a netip.Addr) bool {
	r, changed := tx.records[a]
	if !changed {
		r = tx.l.byAddress[a]
	}
	if r == nil || r.State != Quarantined {
		return false
	}
	tx.records[a], tx.slots[slotOf(*r)] = nil, nil
	return true
}

// Object finds a recorded service.
func (tx *Tx) Object(o Owner) (Object, bool) {
	if changed, ok := tx.objects[o]; ok {
		if changed == nil {
			return Object{}, false
		}
		return *changed, true
	}
	obj, ok := tx.l.objects[o]
	return obj, ok
}

// Objects lists the recorded services, ordered by owner.
func (tx *Tx) Objects() []Object {
	if len(tx.objects) == 0 {
		return tx.l.Objects()
	}
	all := maps.Clone(tx.l.objects)
	overlay(all, tx.objects)
	return slices.SortedFunc(maps.Values(all), func(a, b Object) int { return a.Owner.compare(b.Owner) })
}

// PutObject records a service. One that says nothing new keeps its generation.
func (tx *Tx) PutObject(o Object) {
	if old, ok := tx.Object(o.Owner); ok && old.Origin == o.Origin && bytes.Equal(old.Spec, o.Spec) {
		return
	}
	tx.objects[o.Owner] = &o
}

// DeleteObject forgets a service and says whether it was there.
func (tx *Tx) DeleteObject(o Owner) bool {
	_, ok := tx.Object(o)
	if ok {
		tx.objects[o] = nil
	}
	return ok
}

// Mark finds a mark.
func (tx *Tx) Mark(k MarkKey) (Mark, bool) {
	if changed, ok := tx.marks[k]; ok {
		if changed == nil {
			return Mark{}, false
		}
		return *changed, true
	}
	return tx.l.Mark(k)
}

// Marks lists the marks, ordered by kind and name.
func (tx *Tx) Marks() []Mark {
	all := maps.Clone(tx.l.marks)
	overlay(all, tx.marks)
	return slices.SortedFunc(maps.Values(all), func(a, b Mark) int { return a.Key().compare(b.Key()) })
}

// PutMark sets a mark; without Since it is of now. One that says nothing new
// keeps its time and its generation.
func (tx *Tx) PutMark(m Mark) {
	if old, ok := tx.Mark(m.Key()); ok && bytes.Equal(old.Data, m.Data) && (m.Since.IsZero() || m.Since.Equal(old.Since)) {
		return
	}
	if m.Since.IsZero() {
		m.Since = tx.now
	}
	tx.marks[m.Key()] = &m
}

// DeleteMark takes a mark away and says whether it was there.
func (tx *Tx) DeleteMark(k MarkKey) bool {
	_, ok := tx.Mark(k)
	if ok {
		tx.marks[k] = nil
	}
	return ok
}

func overlay[K comparable, V any](all map[K]V, changed map[K]*V) {
	for k, v := range changed {
		if v == nil {
			delete(all, k)
		} else {
			all[k] = *v
		}
	}
}

// batch is all that the transaction changes, in an order that depends on nothing
// else. Generations are set by write.
func (tx *Tx) batch() Batch {
	var b Batch
	for _, a := range slices.SortedFunc(maps.Keys(tx.records), netip.Addr.Compare) {
		if r := tx.records[a]; r != nil {
			b.Put = append(b.Put, *r)
		} else if tx.l.byAddress[a] != nil {
			b.Delete = append(b.Delete, a)
		}
	}
	for _, o := range slices.SortedFunc(maps.Keys(tx.objects), Owner.compare) {
		if obj := tx.objects[o]; obj != nil {
			b.PutObjects = append(b.PutObjects, *obj)
		} else if _, ok := tx.l.objects[o]; ok {
			b.DelObjects = append(b.DelObjects, o)
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(tx.marks), MarkKey.compare) {
		if m := tx.marks[k]; m != nil {
			b.PutMarks = append(b.PutMarks, *m)
		} else if _, ok := tx.l.marks[k]; ok {
			b.DelMarks = append(b.DelMarks, k)
		}
	}
	return b
}
