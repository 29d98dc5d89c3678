// Package ledger remembers who owns which address, and which services exist as
// objects of their own. Wishes (a service wants an address of a pool) go in;
// Records that are written down before anybody hears of them come out.
//
// A Ledger is owned by one goroutine, the reconciler; Records returns an
// immutable list for everybody else. The package starts no goroutine. Where the
// records are kept is a Store: [OpenBolt] is one in a local file, package
// consulstore has one that several replicas share.
package ledger

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Owner names the service that an address belongs to.
type Owner struct {
	Tenant  string `json:"tenant"`
	Service string `json:"service"`
}

// String gives "tenant/service".
func (o Owner) String() string { return o.Tenant + "/" + o.Service }

// Kinds of address.
const (
	Internal  = "internal"
	Dedicated = "dedicated"
)

// States of a Record.
const (
	Bound       = "bound"
	Quarantined = "quarantined"
)

// Record says who owns one address. Its JSON is the format of the store.
type Record struct {
	Address    netip.Addr `json:"address"`
	Kind       string     `json:"kind"` // internal dedicated
	Pool       string     `json:"pool"` // CIDR of an internal pool, name of a dedicated one
	Owner      Owner      `json:"owner"`
	Generation uint64     `json:"generation"` // of the ledger when the record last changed
	State      string     `json:"state"`      // bound quarantined
	Since      time.Time  `json:"since"`
	Reason     string     `json:"reason"`
	Probed     bool       `json:"probed"` // not the first candidate of its hash
}

// Object is a service that exists although no file declares it: seen in Consul
// or made through the API. Spec is opaque here.
type Object struct {
	Owner      Owner  `json:"owner"`
	Origin     string `json:"origin"` // consul:NODE/ID or api
	Spec       []byte `json:"spec"`
	Generation uint64 `json:"generation,omitempty"` // of the ledger when the object last changed; its ETag
}

// Kinds of Mark.
const (
	MarkDrain   = "drain"   // Name is the qualified name of an instance
	MarkRelease = "release" // Name is a source whose held instances are to go
	MarkTTL     = "ttl"     // Name is what is kept for so many seconds
	MarkPin     = "pin"     // Name is a version of a resource that proxies refuse
)

// Mark is a wish that outlives a restart and that every replica acts on.
type Mark struct {
	Kind       string          `json:"kind"`
	Name       string          `json:"name"`
	Since      time.Time       `json:"since"`
	Generation uint64          `json:"generation"` // of the ledger when the mark last changed
	Data       json.RawMessage `json:"data,omitempty"`
}

// MarkKey names a Mark: there is one of a kind and a name.
type MarkKey struct{ Kind, Name string }

// Key is what the mark is kept under.
func (m Mark) Key() MarkKey { return MarkKey{m.Kind, m.Name} }

// Batch is one change of the store: all of it is written, or nothing.
type Batch struct {
	After      uint64 // the generation that the store must be at
	Generation uint64 // the one it is at afterwards; more than After
	Put        []Record
	Delete     []netip.Addr
	PutObjects []Object
	DelObjects []Owner
	PutMarks   []Mark
	DelMarks   []MarkKey
}

// State is all that a Store holds.
type State struct {
	Generation uint64 // of the last batch; 0 is a new store
	Records    []Record
	Objects    []Object
	Marks      []Mark
}

// ErrPoolFull is wrapped by Bind when a pool has no free address.
var ErrPoolFull = errors.New("pool is full")

// Pool is a range of addresses to give out.
type Pool struct {
	Name    string // in Records: CIDR of an internal pool, name of a dedicated one
	Kind    string
	Prefix  netip.Prefix
	Exclude []netip.Addr // never given
}

// Wish asks for an address of a pool.
type Wish struct {
	Owner Owner
	Pool  Pool
}

type slot struct {
	owner Owner
	kind  string
	v6    bool
}

func slotOf(r Record) slot { return slot{r.Owner, r.Kind, r.Address.Is6()} }

// Ledger is the memory of who owns which address.
type Ledger struct {
	// Fixed at construction.
	store Store
	now   func() time.Time

	// Owned by the goroutine that owns the Ledger.
	byAddress map[netip.Addr]*Record
	bySlot    map[slot]*Record
	objects   map[Owner]Object
	marks     map[MarkKey]Mark
	foreign   uint64

	// For everybody.
	generation atomic.Uint64
	published  atomic.Pointer[view]
}

// Open loads a ledger from its store. now is the clock; nil is time.Now.
func Open(ctx context.Context, store Store, now func() time.Time) (*Ledger, error) {
	state, err := store.Load(ctx)
	if err != nil {
		return nil, err
	}
	if now == nil {
		now = time.Now
	}
	l := &Ledger{store: store, now: now}
	if err := l.take(state); err != nil {
		return nil, fmt.Errorf("%w: restore the store from a backup", err)
	}
	return l, nil
}

// take replaces all that is known, or nothing when the state contradicts itself.
func (l *Ledger) take(state State) error {
	addresses, slots := make(map[netip.Addr]*Record, len(state.Records)), make(map[slot]*Record, len(state.Records))
	for n := range state.Records {
		r := state.Records[n]
		if other := addresses[r.Address]; other != nil {
			return fmt.Errorf("address %s has two owners, %s and %s", r.Address, other.Owner, r.Owner)
		}
		if other := slots[slotOf(r)]; other != nil {
			return fmt.Errorf("%s has two %s addresses, %s and %s", r.Owner, r.Kind, other.Address, r.Address)
		}
		addresses[r.Address], slots[slotOf(r)] = &r, &r
	}
	l.byAddress, l.bySlot = addresses, slots
	l.objects, l.marks = make(map[Owner]Object, len(state.Objects)), make(map[MarkKey]Mark, len(state.Marks))
	for _, o := range state.Objects {
		l.objects[o.Owner] = o
	}
	for _, m := range state.Marks {
		l.marks[m.Key()] = m
	}
	l.generation.Store(state.Generation)
	l.published.Store(newView(slices.Clone(state.Records)))
	return nil
}

// Adopt takes over what another replica has written and says whether that is
// news. It refuses a state that is older than what the ledger has (ErrOlder) and
// one that contradicts itself; the last good state then stays.
func (l *Ledger) Adopt(s State) (changed bool, err error) {
	have := l.generation.Load()
	switch {
	case s.Generation < have:
		return false, fmt.Errorf("generation %d is lower than %d: %w", s.Generation, have, ErrOlder)
	case s.Generation == have:
		return false, nil
	}
	if err := l.take(s); err != nil {
		return false, fmt.Errorf("generation %d of the store is not taken over: %w", s.Generation, err)
	}
	l.foreign++
	return true, nil
}

// Foreign counts how often the changes of another writer were taken over: when
// it moves, records, objects and marks may have changed.
func (l *Ledger) Foreign() uint64 { return l.foreign }

// Generation counts the changes. It may be called from any goroutine.
func (l *Ledger) Generation() uint64 { return l.generation.Load() }

// Records lists every record, ordered by address. It may be called from any
// goroutine and is not to be changed.
func (l *Ledger) Records() []Record { return l.published.Load().records() }

// Lookup finds what an owner has of a kind, bound or in quarantine.
func (l *Ledger) Lookup(o Owner, kind string, v6 bool) (Record, bool) {
	r := l.bySlot[slot{o, kind, v6}]
	if r == nil {
		return Record{}, false
	}
	return *r, true
}

// Objects lists the recorded services, ordered by owner.
func (l *Ledger) Objects() []Object {
	return slices.SortedFunc(maps.Values(l.objects), func(a, b Object) int { return a.Owner.compare(b.Owner) })
}

// Mark finds a mark.
func (l *Ledger) Mark(k MarkKey) (Mark, bool) {
	m, ok := l.marks[k]
	return m, ok
}

// Marks lists the marks, ordered by kind and name.
func (l *Ledger) Marks() []Mark {
	return slices.SortedFunc(maps.Values(l.marks), func(a, b Mark) int { return a.Key().compare(b.Key()) })
}

// State is all that the ledger knows: for an export, or to repair a store.
func (l *Ledger) State() State {
	return State{Generation: l.Generation(), Records: l.Records(), Objects: l.Objects(), Marks: l.Marks()}
}

func (o Owner) compare(p Owner) int {
	return cmp.Or(strings.Compare(o.Tenant, p.Tenant), strings.Compare(o.Service, p.Service))
}

func (k MarkKey) compare(o MarkKey) int {
	return cmp.Or(strings.Compare(k.Kind, o.Kind), strings.Compare(k.Name, o.Name))
}

// Refused is a Wish that could not be granted.
type Refused struct {
	Wish
	Err error // wraps ErrPoolFull
}

// Bind is Tx.Bind in an Update of its own. Where a lost race made the Update begin
// again, bound lists what its last run gave: a part of a split change that was
// already written is not in it.
func (l *Ledger) Bind(ctx context.Context, wishes []Wish, reason string) (bound []Record, refused []Refused, err error) {
	err = l.Update(ctx, func(tx *Tx) error {
		bound, refused = tx.Bind(wishes, reason)
		return nil
	})
	if err != nil {
		return nil, refused, err
	}
	return l.refresh(bound), refused, nil
}

// Release is Tx.Release in an Update of its own.
func (l *Ledger) Release(ctx context.Context, o Owner, reason string, kinds ...string) (gone []Record, err error) {
	err = l.Update(ctx, func(tx *Tx) error {
		gone = tx.Release(o, reason, kinds...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return l.refresh(gone), nil
}

// refresh fills in the generation under which records were written.
func (l *Ledger) refresh(records []Record) []Record {
	for n := range records {
		if r := l.byAddress[records[n].Address]; r != nil {
			records[n] = *r
		}
	}
	return records
}

// PutObjects writes service objects down.
func (l *Ledger) PutObjects(ctx context.Context, objects []Object) error {
	return l.Update(ctx, func(tx *Tx) error {
		for _, o := range objects {
			tx.PutObject(o)
		}
		return nil
	})
}

// DeleteObject forgets a service object.
func (l *Ledger) DeleteObject(ctx context.Context, o Owner) error {
	return l.Update(ctx, func(tx *Tx) error {
		tx.DeleteObject(o)
		return nil
	})
}

// restoreGap is how far a repaired store is ahead of the replica that repaired
// it: further than any other replica can have been, so that its generation goes
// forwards for them, too.
const restoreGap = 1 << 16

// Restore writes all that the ledger knows into a Shared store that has lost it.
// When another replica was first, its state is adopted instead: changes that only
// this one had seen are gone then, and asking again for an address gives the
// same one in nearly every case.
func (l *Ledger) Restore(ctx context.Context) error {
	shared, ok := l.store.(Shared)
	if !ok {
		return errors.New("the store is not one that can be restored")
	}
	state := l.State()
	state.Generation += restoreGap
	err := shared.Restore(ctx, state)
	if err == nil {
		l.generation.Store(state.Generation)
		return nil
	}
	if !errors.Is(err, ErrConflict) {
		return err
	}
	return l.reload(ctx)
}
