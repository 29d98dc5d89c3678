// Package ledger remembers who owns which address, and which services exist as
// objects of their own. Wishes (a service wants an address of a pool) go in;
// Records that are written down before anybody hears of them come out.
//
// A Ledger is owned by one goroutine, the reconciler; Records returns an
// immutable list for everybody else. The package starts no goroutine. Where the
// records are kept is a Store: [OpenBolt] is one in a local file.
package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
	Owner  Owner  `json:"owner"`
	Origin string `json:"origin"` // consul:NODE/ID or api
	Spec   []byte `json:"spec"`
}

// Batch is one change of the store: all of it is written, or nothing.
type Batch struct {
	Generation uint64
	Put        []Record
	Delete     []netip.Addr
	PutObjects []Object
	DelObjects []Owner
}

// State is all that a Store holds.
type State struct {
	Generation uint64 // of the last batch; 0 is a new store
	Records    []Record
	Objects    []Object
}

// Store keeps a ledger. Apply returns after the batch is durable. The
// generation of a batch is one more than that of the last; a Store refuses any
// other, so that two writers cannot both succeed.
type Store interface {
	Load(ctx context.Context) (State, error)
	Apply(ctx context.Context, b Batch) error
	Close() error
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

// Ledger is the memory of who owns which address.
type Ledger struct {
	store      Store
	now        func() time.Time
	generation uint64
	byAddress  map[netip.Addr]*Record
	bySlot     map[slot]*Record
	objects    map[Owner]Object
	published  atomic.Pointer[[]Record]
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
	l := &Ledger{store: store, now: now, generation: state.Generation, byAddress: map[netip.Addr]*Record{}, bySlot: map[slot]*Record{}, objects: map[Owner]Object{}}
	for n := range state.Records {
		r := &state.Records[n]
		if other := l.byAddress[r.Address]; other != nil {
			return nil, fmt.Errorf("address %s has two owners, %s and %s: restore the store from a backup", r.Address, other.Owner, r.Owner)
		}
		if other := l.bySlot[slotOf(*r)]; other != nil {
			return nil, fmt.Errorf("%s has two %s addresses, %s and %s: restore the store from a backup", r.Owner, r.Kind, other.Address, r.Address)
		}
		l.keep(*r)
	}
	for _, o := range state.Objects {
		l.objects[o.Owner] = o
	}
	l.publish()
	return l, nil
}

func slotOf(r Record) slot { return slot{r.Owner, r.Kind, r.Address.Is6()} }

func (l *Ledger) keep(r Record) {
	l.byAddress[r.Address], l.bySlot[slotOf(r)] = &r, &r
}

// Records lists every record, ordered by address. It may be called from any
// goroutine and is not to be changed.
func (l *Ledger) Records() []Record { return *l.published.Load() }

func (l *Ledger) publish() {
	list := make([]Record, 0, len(l.byAddress))
	for _, r := range l.byAddress {
		list = append(list, *r)
	}
	slices.SortFunc(list, func(a, b Record) int { return a.Address.Compare(b.Address) })
	l.published.Store(&list)
}

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
	list := make([]Object, 0, len(l.objects))
	for _, o := range l.objects {
		list = append(list, o)
	}
	slices.SortFunc(list, func(a, b Object) int {
		return cmp.Or(strings.Compare(a.Owner.Tenant, b.Owner.Tenant), strings.Compare(a.Owner.Service, b.Owner.Service))
	})
	return list
}

// Refused is a Wish that could not be granted.
type Refused struct {
	Wish
	Err error // wraps ErrPoolFull
}

// Bind gives every wish an address. One that has it already, or has it in
// quarantine, keeps it, also when it lies outside the pool of today. All new
// records are written down in one batch before Bind returns; after an error
// nothing has changed. Reasons name what asked: "declared", "seen in Consul".
func (l *Ledger) Bind(ctx context.Context, wishes []Wish, reason string) (bound []Record, refused []Refused, err error) {
	taken := map[netip.Addr]bool{}
	for _, w := range wishes {
		r := l.bySlot[slot{w.Owner, w.Pool.Kind, w.Pool.Prefix.Addr().Is6()}]
		switch {
		case r != nil && r.State == Bound:
		case r != nil:
			back := *r
			back.State, back.Since, back.Reason = Bound, l.now(), reason
			bound = append(bound, back)
		default:
			at, probed, ok := w.Pool.pick(w.Owner, func(a netip.Addr) bool { return taken[a] || l.byAddress[a] != nil })
			if !ok {
				refused = append(refused, Refused{w, fmt.Errorf("pool %s of %s has no free address: %w", w.Pool.Name, w.Pool.Prefix, ErrPoolFull)})
				continue
			}
			taken[at] = true
			bound = append(bound, Record{Address: at, Kind: w.Pool.Kind, Pool: w.Pool.Name, Owner: w.Owner, State: Bound, Since: l.now(), Reason: reason, Probed: probed})
		}
	}
	return bound, refused, l.put(ctx, bound, Batch{})
}

// Release puts what an owner has of the kinds, or of both where none is named,
// into quarantine. Its addresses reach nobody and go to nobody else; Bind gives
// them back to the owner.
func (l *Ledger) Release(ctx context.Context, o Owner, reason string, kinds ...string) ([]Record, error) {
	if len(kinds) == 0 {
		kinds = []string{Internal, Dedicated}
	}
	var gone []Record
	for _, kind := range kinds {
		for _, v6 := range []bool{false, true} {
			if r := l.bySlot[slot{o, kind, v6}]; r != nil && r.State == Bound {
				q := *r
				q.State, q.Since, q.Reason = Quarantined, l.now(), reason
				gone = append(gone, q)
			}
		}
	}
	return gone, l.put(ctx, gone, Batch{})
}

// PutObjects writes service objects down.
func (l *Ledger) PutObjects(ctx context.Context, objects []Object) error {
	if len(objects) == 0 {
		return nil
	}
	if err := l.put(ctx, nil, Batch{PutObjects: objects}); err != nil {
		return err
	}
	for _, o := range objects {
		l.objects[o.Owner] = o
	}
	return nil
}

// DeleteObject forgets a service object.
func (l *Ledger) DeleteObject(ctx context.Context, o Owner) error {
	if _, ok := l.objects[o]; !ok {
		return nil
	}
	if err := l.put(ctx, nil, Batch{DelObjects: []Owner{o}}); err != nil {
		return err
	}
	delete(l.objects, o)
	return nil
}

func (l *Ledger) put(ctx context.Context, records []Record, b Batch) error {
	if len(records) == 0 && len(b.PutObjects) == 0 && len(b.DelObjects) == 0 {
		return nil
	}
	b.Generation = l.generation + 1
	for n := range records {
		records[n].Generation = b.Generation
	}
	b.Put = records
	if err := l.store.Apply(ctx, b); err != nil {
		return err
	}
	l.generation = b.Generation
	for _, r := range records {
		l.keep(r)
	}
	if len(records) > 0 {
		l.publish()
	}
	return nil
}
