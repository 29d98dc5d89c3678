package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// hostAddressesEvery is how often the host's own addresses are read again.
	hostAddressesEvery = 10 * time.Second
	receiptAge         = 10 * time.Second
	expireEvery        = time.Second
	// ledgerTimeout bounds one write of the ledger; a disk that hangs longer
	// stops changes, not traffic.
	ledgerTimeout = 10 * time.Second
)

// reconciler makes Snapshots. All its state is owned by the goroutine of run.
type reconciler struct {
	d       *Daemon
	config  *config.Config
	objects map[lb.Key]*object
	host    []netip.Addr
	// declared are the file's services by key, rebuilt with the config.
	declared map[lb.Key]*lb.ServiceSpec
	world    *envoy.Translation
	// What the last build found; it holds until dirty says that a service has
	// come, gone or changed.
	dirty     bool
	specs     []*lb.ServiceSpec
	addressed map[lb.Key]lb.Addresses
	groups    map[lb.Key]*discovery.Group // that record has looked at
	// problems are those of the reconciler itself: a full pool, a refused change.
	problems   []lb.Problem
	departures *departures
	served     bool // the first World has been published
	warned     bool // a ledger that cannot be written has been logged
}

// run reconciles whenever something has changed, until ctx ends.
func (r *reconciler) run(ctx context.Context) error {
	hostTick := time.NewTicker(hostAddressesEvery)
	defer hostTick.Stop()
	expire := time.NewTicker(expireEvery)
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.d.aggregator.Changed():
		case <-r.d.files.Changed():
		case c := <-r.d.reloads:
			r.reload(c)
		case f := <-r.d.commands:
			f(r)
		case <-hostTick.C:
			host := hostAddresses(r.config.Model)
			if slices.Equal(host, r.host) {
				continue
			}
			r.host = host
		case <-expire.C:
			r.d.Events.Expire(receiptAge)
			continue
		}
		r.build(ctx)
	}
}

// hostAddresses are the addresses of this host's interfaces that are not
// loopback and not of a pool.
func hostAddresses(c *lb.Config) []netip.Addr {
	var out []netip.Addr
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range list {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		addr, ok := netip.AddrFromSlice(n.IP)
		addr = addr.Unmap()
		pool := slices.ContainsFunc(c.InternalPools, func(p netip.Prefix) bool { return p.Contains(addr) })
		if ok && !addr.IsLoopback() && !pool {
			out = append(out, addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func (r *reconciler) setConfig(c *config.Config) {
	r.config, r.dirty, r.groups = c, true, nil
	r.declared = map[lb.Key]*lb.ServiceSpec{}
	for _, s := range c.Model.Services {
		r.declared[s.Key] = s
	}
	var want []certs.Want
	for _, l := range c.Model.Listeners {
		for _, p := range l.Certificates {
			want = append(want, certs.Want{File: certs.File{CertFile: p.CertFile, KeyFile: p.KeyFile}, Origin: p.Origin})
		}
	}
	r.d.files.Want(want)
	r.d.static.Set(c.Static)
}

// build makes and publishes the next Snapshot.
func (r *reconciler) build(ctx context.Context) {
	catalog := r.d.aggregator.Catalog()
	prev := r.d.snapshot.Load()
	changes := r.record(ctx, catalog)
	if r.dirty {
		r.problems, r.dirty = nil, false
		r.specs = r.services()
		changes = append(changes, r.bind(ctx)...)
		r.addressed = r.addresses()
	}
	snapshot := lb.Build(prev, lb.Input{Config: r.config.Model, Catalog: catalog, Services: r.specs, Addresses: r.addressed, HostAddresses: r.host})
	snapshot.AddProblems(r.problems)
	r.d.snapshot.Store(snapshot)
	// An event is there before the first ACK of it can come.
	r.d.Events.Add(append(changes, r.departures.differences(prev, snapshot)...)...)
	if catalog.Ready || r.served {
		world := envoy.Translate(r.world, snapshot, r.d.files.Pairs())
		r.d.XDS.Publish(world, world.Since(r.world))
		r.world, r.served = world, true
		r.d.world.Store(world)
	}
	r.d.observeProgress()
}

// services lists what exists, declared in a file or recorded, by key.
func (r *reconciler) services() []*lb.ServiceSpec {
	specs := slices.Clone(r.config.Model.Services)
	for _, key := range slices.SortedFunc(maps.Keys(r.objects), lb.Key.Compare) {
		if r.declared[key] == nil {
			specs = append(specs, r.objects[key].spec)
		}
	}
	slices.SortFunc(specs, func(a, b *lb.ServiceSpec) int { return a.Key.Compare(b.Key) })
	return specs
}

// bind gives every service its addresses. Services that the ledger has no room
// for, or whose record cannot be written, stay without: no address is ever
// told that is not written down.
func (r *reconciler) bind(ctx context.Context) []events.Event {
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	changes := r.release(ctx)
	var wishes []ledger.Wish
	for _, s := range r.specs {
		for _, w := range r.wishes(s) {
			if rec, ok := r.d.ledger.Lookup(w.Owner, w.Pool.Kind, w.Pool.Prefix.Addr().Is6()); !ok || rec.State != ledger.Bound {
				wishes = append(wishes, w)
			}
		}
	}
	if len(wishes) > 0 {
		records, refused, err := r.d.ledger.Bind(ctx, wishes, "service exists")
		if err != nil {
			r.ledgerFailed(err)
		} else {
			r.warned = false
			for _, rec := range records {
				changes = append(changes, events.Change(events.AddressBound, rec.Owner.Tenant, rec.Owner.Service, "", fmt.Sprintf("%s address %s of pool %s", rec.Kind, rec.Address, rec.Pool), time.Time{}, 0))
			}
		}
		for _, f := range refused {
			r.problem("pool_full", f.Owner.String(), "addresses", fmt.Sprintf("has no %s address: %v", f.Pool.Kind, f.Err),
				fmt.Sprintf("make pool %s larger, or delete services that nobody needs", f.Pool.Name))
		}
	}
	return changes
}

func (r *reconciler) ledgerFailed(err error) {
	r.dirty = true // the next build tries again
	r.problem("ledger_write_failed", "ledger", r.config.DataDir, "a change of addresses cannot be written down, so that it does not happen: "+err.Error(), "make room on the disk, or make the data directory writable; what is bound goes on")
	if !r.warned {
		r.d.log.Error("ledger cannot be written; new services stay without an address, what is bound goes on", "error", err)
		r.warned = true
	}
}

func (r *reconciler) problem(code, object, place, message, fix string) {
	r.problems = append(r.problems, lb.Problem{Code: code, Severity: discovery.SeverityError, Object: object, Place: place, Message: message, Fix: fix})
}

// wishes are the addresses that a service should have.
func (r *reconciler) wishes(s *lb.ServiceSpec) []ledger.Wish {
	owner := ledger.Owner{Tenant: s.Key.Tenant, Service: s.Key.Service}
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
func (r *reconciler) release(ctx context.Context) []events.Event {
	var changes []events.Event
	exists := make(map[ledger.Owner]*lb.ServiceSpec, len(r.specs))
	for _, s := range r.specs {
		exists[ledger.Owner{Tenant: s.Key.Tenant, Service: s.Key.Service}] = s
	}
	for _, rec := range r.d.ledger.Records() {
		s := exists[rec.Owner]
		if rec.State != ledger.Bound || s != nil && (rec.Kind != ledger.Dedicated || s.DedicatedPool != "") {
			continue
		}
		var gone []ledger.Record
		var err error
		if s == nil {
			gone, err = r.d.ledger.Release(ctx, rec.Owner, "service deleted")
		} else {
			gone, err = r.d.ledger.Release(ctx, rec.Owner, "dedicated IP no longer asked for", ledger.Dedicated)
		}
		if err != nil {
			r.ledgerFailed(err)
			continue
		}
		for _, g := range gone {
			changes = append(changes, events.Change(events.AddressQuarantined, g.Owner.Tenant, g.Owner.Service, "", fmt.Sprintf("%s address %s: %s", g.Kind, g.Address, g.Reason), time.Time{}, 0))
		}
	}
	return changes
}

// addresses reads what the ledger has for each service.
func (r *reconciler) addresses() map[lb.Key]lb.Addresses {
	out := make(map[lb.Key]lb.Addresses, len(r.specs))
	for _, s := range r.specs {
		owner := ledger.Owner{Tenant: s.Key.Tenant, Service: s.Key.Service}
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

// errShutdown is what a command gets when the daemon ends before it ran.
var errShutdown = errors.New("roost is shutting down")

// do runs f in the reconciler's goroutine and builds a Snapshot after it.
func (d *Daemon) do(ctx context.Context, f func(*reconciler) error) error {
	done := make(chan error, 1)
	select {
	case d.commands <- func(r *reconciler) {
		err := f(r)
		if err == nil {
			r.build(ctx)
		}
		done <- err
	}:
	case <-d.stopped:
		return errShutdown
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-d.stopped:
		return errShutdown
	}
}
