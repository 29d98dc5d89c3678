package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// ttlMargin is added to the longest TTL: caches count in whole seconds and start
// when the answer arrives.
const ttlMargin = 2 * time.Second

// quarantine decides when an address of a deleted service may be given to
// another. It must reach nobody who was told of it, so two things are waited for:
// every proxy that may have its listener has confirmed a world without it, or has
// been gone for the forget time; and every DNS answer that named it has expired.
//
// All waiting is counted on this process's own clock from when it saw the record,
// so that neither a clock that jumps nor one of another replica shortens it. It
// begins anew with the process: what was told before a restart is covered. It is
// owned by the reconciler.
type quarantine struct {
	now    func() time.Time
	forget time.Duration // also the least that an address stays
	ttl    time.Duration // the longest that this process has answered with
	from   time.Time     // when proxies could first hear that the address is gone; zero: not yet
	held   map[netip.Addr]heldAddress
}

type heldAddress struct {
	record ledger.Record
	seen   time.Time // in quarantine, by this process
}

func newQuarantine(now func() time.Time) *quarantine {
	return &quarantine{now: now, held: map[netip.Addr]heldAddress{}}
}

func (q *quarantine) configure(forget, ttl time.Duration) {
	q.forget, q.ttl = forget, max(q.ttl, ttl)
}

// serving says that proxies have been told of the first World.
func (q *quarantine) serving() { q.from = q.now() }

// sync takes over which records are in quarantine.
func (q *quarantine) sync(records []ledger.Record) {
	next := make(map[netip.Addr]heldAddress)
	for _, r := range records {
		if r.State != ledger.Quarantined {
			continue
		}
		h, ok := q.held[r.Address]
		if !ok || h.record.Generation != r.Generation {
			h = heldAddress{r, q.now()}
		}
		next[r.Address] = h
	}
	q.held = next
}

// wait is how long an address stays at least.
func (q *quarantine) wait() time.Duration { return max(q.forget, q.ttl+ttlMargin) }

// freeAfter is the earliest time at which a record may be free; zero while that
// cannot be said.
func (q *quarantine) freeAfter(h heldAddress) time.Time {
	if q.from.IsZero() {
		return time.Time{}
	}
	since := h.seen
	if q.from.After(since) {
		since = q.from
	}
	return since.Add(q.wait())
}

// due lists the records that nobody can have any more; holders tells who has
// wanted listeners.
func (q *quarantine) due(holders func(wanted func(listener string) bool) []xds.Holder) (free []ledger.Record) {
	waited := map[listenerOwner][]ledger.Record{} // both families of an owner share their listeners
	for _, h := range q.held {
		if at := q.freeAfter(h); !at.IsZero() && !q.now().Before(at) {
			waited[ownerOfRecord(h.record)] = append(waited[ownerOfRecord(h.record)], h.record)
		}
	}
	if len(waited) == 0 {
		return nil
	}
	for _, p := range holders(func(name string) bool { return len(waited[ownerOfListener(name)]) > 0 }) {
		switch {
		case !p.Connected && q.now().Sub(p.Since) >= q.forget:
		case p.Name == "": // it has not said yet what it has
			return nil
		default:
			delete(waited, ownerOfListener(p.Name))
		}
	}
	for _, records := range waited {
		free = append(free, records...)
	}
	slices.SortFunc(free, func(a, b ledger.Record) int { return a.Address.Compare(b.Address) })
	return free
}

// listenerOwner is what a listener's name says of the address that it is on.
type listenerOwner struct {
	service string // SERVICE.TENANT
	kind    string
}

func ownerOfRecord(r ledger.Record) listenerOwner {
	return listenerOwner{r.Owner.Service + "." + r.Owner.Tenant, r.Kind}
}

func ownerOfListener(name string) listenerOwner {
	service, port, _ := strings.Cut(name, ":")
	if strings.HasSuffix(port, envoy.DedicatedSuffix) {
		return listenerOwner{service, ledger.Dedicated}
	}
	return listenerOwner{service, ledger.Internal}
}

// AddressUse is a record of the ledger, who has its listeners, and when it may be
// free.
type AddressUse struct {
	ledger.Record
	Holders   []string  // proxies, and what is known of them
	FreeAfter time.Time // zero: it is bound, or nobody can say yet
}

// maxHolders bounds the proxies that are named for one address.
const maxHolders = 100

// Addresses lists the ledger's records, by address, with who has their listeners.
func (d *Daemon) Addresses() []AddressUse {
	by := map[listenerOwner][]string{}
	for _, h := range d.XDS.Holders(envoy.Listener, func(string) bool { return true }) {
		owner := ownerOfListener(h.Name)
		text := h.ID
		if !h.Connected {
			text = fmt.Sprintf("%s (gone since %s)", h.ID, h.Since.UTC().Format(time.RFC3339))
		}
		if !slices.Contains(by[owner], text) && len(by[owner]) < maxHolders {
			by[owner] = append(by[owner], text)
		}
	}
	free := d.freeAfter.Load()
	records := d.ledger.Records()
	out := make([]AddressUse, 0, len(records))
	for _, r := range records {
		use := AddressUse{Record: r, Holders: by[ownerOfRecord(r)]}
		if r.State == ledger.Quarantined && free != nil {
			use.FreeAfter = (*free)[r.Address]
		}
		out = append(out, use)
	}
	return out
}

// publishFree tells everybody when addresses may be free.
func (r *reconciler) publishFree() {
	free := make(map[netip.Addr]time.Time, len(r.quarantine.held))
	for a, h := range r.quarantine.held {
		free[a] = r.quarantine.freeAfter(h)
	}
	r.d.freeAfter.Store(&free)
}

// free ends the quarantine of addresses that nobody can have any more, and says
// whether a build has to write that down.
func (r *reconciler) free() bool {
	due := r.quarantine.due(func(wanted func(string) bool) []xds.Holder { return r.proxies.Holders(envoy.Listener, wanted) })
	r.clear(due)
	staged := false
	for _, rec := range due {
		if !r.d.othersCleared(rec.Generation, r.quarantine.forget) {
			continue
		}
		staged = true
		r.stage(func(tx *ledger.Tx) {
			if now, ok := tx.Lookup(rec.Owner, rec.Kind, rec.Address.Is6()); ok && now.Address == rec.Address && now.Generation == rec.Generation {
				tx.Free(rec.Address)
			}
		})
		r.stagedEvents = append(r.stagedEvents, addressEvent(events.AddressFreed, rec, "nobody has it any more"))
	}
	return staged
}
