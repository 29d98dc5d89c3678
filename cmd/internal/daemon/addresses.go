package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
)

// stage has a change written down by the next build. f may run more than once.
func (r *reconciler) stage(f func(*ledger.Tx)) {
	r.staged = append(r.staged, f)
	r.dirty = true
}

// commit writes down what was staged and gives every service its addresses, all
// at once: no address is ever told that is not written down. After an error
// nothing that was staged has happened; services that are new in the config stay
// without an address until the next build.
func (r *reconciler) commit(ctx context.Context) ([]events.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	staged, facts := r.staged, r.stagedEvents
	r.staged, r.stagedEvents = nil, nil
	clear(r.put)
	var p plan
	err := r.d.ledger.Update(ctx, func(tx *ledger.Tx) error {
		for _, f := range staged {
			f(tx)
		}
		p = r.plan(tx)
		return nil
	})
	if err != nil {
		r.groups = lb.Table[lb.Key, *discovery.Group]{} // what sources show is looked at again
		r.objects = r.parse(r.d.ledger.Objects())
		r.specs = r.services(r.objects)
		r.ledgerFailed(err)
		return nil, err
	}
	r.warned, r.patience = false, patience{}
	r.objects, r.specs = p.objects, p.specs
	for _, f := range p.refused {
		r.problem("pool_full", f.Owner.String(), "addresses", fmt.Sprintf("has no %s address: %v", f.Pool.Kind, f.Err),
			fmt.Sprintf("make pool %s larger, or delete services that nobody needs", f.Pool.Name))
	}
	// What was freed by this very transaction can be given by the next one.
	r.dirty = len(facts) > 0 && len(p.refused) > 0
	return append(p.changes, facts...), nil
}

// plan is what one transaction comes to.
type plan struct {
	objects map[lb.Key]*object
	specs   []*lb.ServiceSpec
	refused []ledger.Refused
	changes []events.Event
}

func (r *reconciler) plan(tx *ledger.Tx) plan {
	p := plan{objects: r.parse(tx.Objects())}
	p.specs = r.services(p.objects)
	for _, g := range r.release(tx, p.specs) {
		p.changes = append(p.changes, addressEvent(events.AddressQuarantined, g, g.Reason))
	}
	var wishes []ledger.Wish
	for _, s := range p.specs {
		for _, w := range r.wishes(s) {
			if rec, ok := tx.Lookup(w.Owner, w.Pool.Kind, w.Pool.Prefix.Addr().Is6()); !ok || rec.State != ledger.Bound {
				wishes = append(wishes, w)
			}
		}
	}
	bound, refused := tx.Bind(wishes, "service exists")
	for _, rec := range bound {
		p.changes = append(p.changes, addressEvent(events.AddressBound, rec, "pool "+rec.Pool))
	}
	p.refused = refused
	return p
}

func addressEvent(kind string, r ledger.Record, why string) events.Event {
	return events.Change(kind, r.Owner.Tenant, r.Owner.Service, "", fmt.Sprintf("%s address %s: %s", r.Kind, r.Address, why), time.Time{}, 0)
}

// services lists what exists, declared in a file or recorded, by key.
func (r *reconciler) services(objects map[lb.Key]*object) []*lb.ServiceSpec {
	specs := slices.Clone(r.config.Model.Services)
	for key, o := range objects {
		if r.declared[key] == nil {
			specs = append(specs, o.spec)
		}
	}
	slices.SortFunc(specs, func(a, b *lb.ServiceSpec) int { return a.Key.Compare(b.Key) })
	return specs
}

// wishes are the addresses that a service should have.
func (r *reconciler) wishes(s *lb.ServiceSpec) []ledger.Wish {
	owner := ownerOf(s.Key)
	var out []ledger.Wish
	for _, p := range r.config.Model.InternalPools {
		pool := ledger.Pool{Name: p.String(), Kind: ledger.Internal, Prefix: p}
		if p.Addr().Is4() {
			pool.Exclude = append(pool.Exclude, config.PoolDNS(p))
		}
		out = append(out, ledger.Wish{Owner: owner, Pool: pool})
	}
	for _, p := range r.config.Model.DedicatedPools {
		if p.Name == s.DedicatedPool {
			out = append(out, ledger.Wish{Owner: owner, Pool: ledger.Pool{Name: p.Name, Kind: ledger.Dedicated, Prefix: p.Prefix}})
		}
	}
	return out
}

// release puts the addresses of services that are gone into quarantine.
func (r *reconciler) release(tx *ledger.Tx, specs []*lb.ServiceSpec) (gone []ledger.Record) {
	exists := make(map[ledger.Owner]*lb.ServiceSpec, len(specs))
	for _, s := range specs {
		exists[ownerOf(s.Key)] = s
	}
	alone := r.d.alone()
	r.blocked = false
	for _, rec := range tx.Records() {
		s := exists[rec.Owner]
		switch {
		case rec.State != ledger.Bound:
		case s == nil && !alone && r.objects[keyOf(rec.Owner)] == nil: // another replica's file may declare it
			r.blocked = true
		case s == nil && r.unread[keyOf(rec.Owner)]: // it exists, though its record cannot be read
		case s == nil:
			gone = append(gone, tx.Release(rec.Owner, "service deleted", rec.Kind)...)
		case rec.Kind == ledger.Dedicated && s.DedicatedPool == "":
			gone = append(gone, tx.Release(rec.Owner, "dedicated IP no longer asked for", ledger.Dedicated)...)
		}
	}
	return gone
}

// addresses reads what the ledger has for each service.
func (r *reconciler) addresses() map[lb.Key]lb.Addresses {
	out := make(map[lb.Key]lb.Addresses, len(r.specs))
	for _, s := range r.specs {
		owner := ownerOf(s.Key)
		var a lb.Addresses
		if rec, ok := r.bound(owner, ledger.Internal, false); ok {
			a.Internal, a.Generation, a.Probed = rec.Address, rec.Generation, rec.Probed
			r.outside(rec)
		}
		if rec, ok := r.bound(owner, ledger.Internal, true); ok {
			a.Internal6 = rec.Address
		}
		for _, v6 := range []bool{false, true} {
			if rec, ok := r.bound(owner, ledger.Dedicated, v6); ok && s.DedicatedPool != "" && !a.Dedicated.IsValid() {
				a.Dedicated = rec.Address
			}
		}
		out[s.Key] = a
	}
	return out
}

func ownerOf(k lb.Key) ledger.Owner { return ledger.Owner{Tenant: k.Tenant, Service: k.Service} }

func keyOf(o ledger.Owner) lb.Key { return lb.Key{Tenant: o.Tenant, Service: o.Service} }

func (r *reconciler) bound(o ledger.Owner, kind string, v6 bool) (ledger.Record, bool) {
	rec, ok := r.d.ledger.Lookup(o, kind, v6)
	return rec, ok && rec.State == ledger.Bound
}

func (r *reconciler) outside(rec ledger.Record) {
	if slices.ContainsFunc(r.config.Model.InternalPools, func(p netip.Prefix) bool { return p.Contains(rec.Address) }) {
		return
	}
	r.problems = append(r.problems, lb.Problem{Code: "address_outside_pool", Severity: discovery.SeverityWarning, Object: rec.Owner.String(), Place: "addresses.internal",
		Message: fmt.Sprintf("its address %s lies outside today's internal pool and is kept", rec.Address),
		Fix:     "callers may go on; delete and create the service again when none is left to get an address of the new pool"})
}

func (r *reconciler) ledgerFailed(err error) {
	r.dirty = true // a later build tries again
	r.patience.failed(r.now(), err)
	r.problem("ledger_write_failed", "ledger", r.config.DataDir, "a change of addresses cannot be written down, so that it does not happen: "+err.Error(), "make room on the disk, or make the data directory writable; what is bound goes on")
	if !r.warned {
		r.d.log.Error("ledger cannot be written; new services stay without an address, what is bound goes on", "error", err)
		r.warned = true
	}
}

func (r *reconciler) problem(code, object, place, message, fix string) {
	r.problems = append(r.problems, lb.Problem{Code: code, Severity: discovery.SeverityError, Object: object, Place: place, Message: message, Fix: fix})
}
