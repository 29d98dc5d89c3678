package daemon

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/cmd/internal/changes"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// hostAddressesEvery is how often the host's own addresses are read again.
	hostAddressesEvery = 10 * time.Second
	receiptAge         = 10 * time.Second
	tickEvery          = time.Second
	// ledgerTimeout bounds one write of the ledger; a disk that hangs longer
	// stops changes, not traffic.
	ledgerTimeout = 10 * time.Second
)

// reconciler makes Snapshots. All its state is owned by the goroutine of run.
type reconciler struct {
	d       *Daemon
	now     func() time.Time
	catalog func() *discovery.Catalog // the newest
	proxies proxies                   // those of this replica
	config  *config.Config
	objects map[lb.Key]*object
	unread  map[lb.Key]bool // recorded, and not understood: a newer Roost's
	blocked bool            // services that are gone keep their address until the replicas agree
	host    []netip.Addr
	// declared are the file's services by key, rebuilt with the config.
	declared map[lb.Key]*lb.ServiceSpec
	world    *envoy.Translation
	overlaid *envoy.Pinned // world with what is pinned; what proxies are given
	pins     *pinning
	// What the last build found; it holds until dirty says that a service has
	// come, gone or changed.
	dirty     bool
	specs     []*lb.ServiceSpec
	addressed map[lb.Key]lb.Addresses
	groups    lb.Table[lb.Key, *discovery.Group] // that record has looked at
	built     bool                               // a Snapshot was made of specs and addressed
	// staged is what commands and sources want written down by the next build.
	staged       []func(*ledger.Tx)
	stagedEvents []events.Event // of what is staged, told when it is written down
	// put are the objects that are staged, nil for one that is deleted: the next
	// command of the same build has to know them.
	put map[lb.Key]*object
	// problems are those of the reconciler itself: a full pool, a refused change.
	problems   []lb.Problem
	changes    *changes.Memory
	quarantine *quarantine
	drains     *drains
	shorter    time.Time             // when the config in force came, whose TTL may be shorter than the one before
	shortened  shortened             // the last one that model has made
	released   map[string]releasedAt // marks of the mass-loss guard that were acted on, by source
	served     bool                  // the first World has been published
	warned     bool                  // a ledger that cannot be written has been logged
	asked      bool                  // somebody waits for what is staged
	patience   patience              // with a ledger that cannot be written
}

// patience is when to try again what has failed: a store that does not answer
// costs the time of every build.
type patience struct {
	at   time.Time
	wait time.Duration
	err  error // of the last try
}

const (
	patienceMin = time.Second
	patienceMax = 30 * time.Second
)

func (p *patience) failed(now time.Time, err error) {
	p.at, p.err = now.Add(p.wait), err
	p.wait = min(max(2*p.wait, patienceMin), patienceMax)
}

// replicasChanged is poked when the other replicas say something new; without
// any it never is.
func (r *reconciler) replicasChanged() <-chan struct{} {
	if r.d.group == nil {
		return nil
	}
	return r.d.group.Changed()
}

// proxies are what Worlds are published to, and who has what of them.
type proxies interface {
	Publish(w envoy.World, c envoy.Change)
	Holders(t envoy.Type, wanted func(name string) bool) []xds.Holder
	Stands(names ...envoy.Name) map[envoy.Name][]xds.Stand
	// Remember is for how long at least Holders names those that have gone.
	Remember(d time.Duration)
}

func newReconciler(d *Daemon, now func() time.Time) *reconciler {
	return &reconciler{d: d, now: now, put: map[lb.Key]*object{}, changes: changes.New(now), quarantine: newQuarantine(now), drains: newDrains(d, now), released: map[string]releasedAt{}, pins: newPinning(d)}
}

// run reconciles whenever something has changed, until ctx ends.
func (r *reconciler) run(ctx context.Context) error {
	hostTick := time.NewTicker(hostAddressesEvery)
	defer hostTick.Stop()
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.d.aggregator.Changed():
			r.pace(ctx)
		case <-r.d.files.Changed():
		case <-r.replicasChanged():
			// What waited for them may go on.
			if r.dirty = r.dirty || r.blocked; !r.dirty {
				continue
			}
		case <-r.d.refusals.changed:
			if !r.judge() {
				continue
			}
		case c := <-r.d.reloads:
			r.reload(c)
		case c := <-r.d.commands:
			r.execute(ctx, c)
			continue
		case <-hostTick.C:
			host := hostAddresses(r.config.Model)
			if slices.Equal(host, r.host) {
				continue
			}
			r.host = host
		case <-tick.C:
			r.d.Events.Expire(receiptAge)
			if !r.tick() {
				continue
			}
		}
		_ = r.build(ctx) // a Problem says so
	}
}

// What streams cannot keep up with is built less often: a build for each change
// would only be skipped by them.
const (
	pacePerStream = 20 * time.Microsecond
	paceAtMost    = 10 * time.Millisecond
)

// pace waits a little while streams still wait for an earlier World.
func (r *reconciler) pace(ctx context.Context) {
	wait := min(time.Duration(r.d.XDS.Queued())*pacePerStream, paceAtMost)
	if wait == 0 {
		return
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
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
	r.config, r.dirty, r.groups, r.shorter = c, true, lb.Table[lb.Key, *discovery.Group]{}, r.now()
	r.patience = patience{} // what is declared counts at once
	r.quarantine.configure(c.Quarantine, c.Model.TTL)
	c.Model.DrainCheck = r.d.drainCheck(c)
	if r.proxies != nil { // Offline has none
		r.proxies.Remember(c.Quarantine)
	}
	for _, o := range r.objects {
		o.raw = nil // what a record means depends on the config
	}
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

// build makes and publishes the next Snapshot. The error is that of the ledger,
// when something could not be written down: what was staged has not happened.
func (r *reconciler) build(ctx context.Context) error {
	catalog := r.catalog()
	prev := r.d.snapshot.Load()
	var changes []events.Event
	err := r.patience.err // while something waits to be written down
	writes := r.asked || !r.now().Before(r.patience.at)
	if writes {
		changes = r.record(catalog)
	}
	if r.dirty && writes {
		r.problems, r.dirty = nil, false
		r.recordAnswers()
		var bound []events.Event
		if bound, err = r.commit(ctx); err == nil {
			changes = append(changes, bound...)
		} else {
			changes = nil
		}
		r.addressed, r.built = r.addresses(), false
		r.quarantine.sync(r.d.ledger.Records())
		r.publishFree()
	}
	marks := r.d.ledger.Marks()
	r.releaseHeld(marks)
	drains := r.drains.phases(catalog, marks)
	pinned := r.pins.load(marks)
	snapshot := lb.Build(prev, lb.Input{Config: r.model(), Catalog: catalog, Services: r.specs, Addresses: r.addressed, Same: r.built, HostAddresses: r.host, Drains: drains, Keep: envoy.Keeps(pinned)})
	r.built = true
	snapshot.AddProblems(r.problems)
	r.d.snapshot.Store(snapshot)
	r.d.publishClosing(snapshot)
	// An event is there before the first ACK of it can come.
	r.d.Events.Add(append(changes, r.changes.Between(prev, snapshot)...)...)
	if catalog.Ready || r.served {
		world := envoy.Translate(r.world, snapshot, r.d.files.Pairs())
		overlaid := world.Pinned(pinned)
		r.proxies.Publish(overlaid, overlaid.Since(r.overlaid))
		if !r.served {
			r.quarantine.serving()
			r.publishFree()
		}
		r.pinsApplied(world, overlaid)
		r.world, r.overlaid, r.served = world, overlaid, true
		r.d.world.Store(world)
	}
	r.d.note(snapshot.Version)
	r.d.observeProgress()
	r.drains.follow(ctx, snapshot)
	return err
}

// errShutdown is what a command gets when the daemon ends before it ran.
var errShutdown = errors.New("roost is shutting down")

// tick does what time asks for, and says whether a build has to write something
// down: also what could not be written before.
func (r *reconciler) tick() bool {
	if r.now().Before(r.patience.at) {
		return false // what would be decided now would be written down late
	}
	due := r.free() || r.dirty
	due = r.forgetAnswers() || due
	due = r.judge() || due
	marks := r.d.ledger.Marks()
	for _, key := range append(r.drains.stale(r.catalog(), marks), append(r.spent(marks), r.unbuilt()...)...) {
		r.stage(func(tx *ledger.Tx) { tx.DeleteMark(key) })
		due = true
	}
	return due
}

// everySource names all sources in a release mark.
const everySource = "*"

// releaseLasts is how long a release mark stays, for every replica to see it.
const releaseLasts = time.Minute

type releasedAt struct {
	generation uint64
	seen       time.Time
}

// releaseHeld acts on new wishes to let go of what the mass-loss guard holds.
func (r *reconciler) releaseHeld(marks []ledger.Mark) {
	for _, m := range marks {
		if m.Kind != ledger.MarkRelease || r.released[m.Name].generation == m.Generation {
			continue
		}
		r.released[m.Name] = releasedAt{m.Generation, r.now()}
		source := m.Name
		if source == everySource {
			source = ""
		}
		r.d.aggregator.Release(source)
	}
}

// spent lists the release marks that every replica has had time to act on.
func (r *reconciler) spent(marks []ledger.Mark) (out []ledger.MarkKey) {
	for _, m := range marks {
		if at := r.released[m.Name]; m.Kind == ledger.MarkRelease && at.generation == m.Generation && r.now().Sub(at.seen) > releaseLasts {
			out = append(out, m.Key())
		}
	}
	return out
}

// command is work for the reconciler's goroutine: f changes or stages
// something, and done is answered after the build that has it.
type command struct {
	f    func(*reconciler) error
	done chan error
}

// maxCommands bounds how many share one build, and so one write of the ledger.
const maxCommands = 512

// execute runs a command and those that wait behind it, builds once for all, and
// answers them.
func (r *reconciler) execute(ctx context.Context, c command) {
	var waiting []command
	for more := true; more; {
		if err := c.f(r); errors.Is(err, errLooked) {
			c.done <- nil
		} else if err != nil {
			c.done <- err
		} else {
			waiting = append(waiting, c)
		}
		more = false
		if len(waiting) < maxCommands {
			select {
			case c = <-r.d.commands:
				more = true
			default:
			}
		}
	}
	if len(waiting) == 0 {
		return
	}
	r.asked = true
	err := r.build(ctx)
	r.asked = false
	for _, c := range waiting {
		c.done <- err
	}
}

// errLooked says that a command has changed nothing.
var errLooked = errors.New("nothing to build")

// look runs f in the reconciler's goroutine.
func (d *Daemon) look(ctx context.Context, f func(*reconciler)) error {
	return d.do(ctx, func(r *reconciler) error {
		f(r)
		return errLooked
	})
}

// do runs f in the reconciler's goroutine and returns after a Snapshot was built
// with what it did. An error says that nothing has happened.
func (d *Daemon) do(ctx context.Context, f func(*reconciler) error) error {
	c := command{f, make(chan error, 1)}
	select {
	case d.commands <- c:
	case <-d.stopped:
		return errShutdown
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-c.done:
		return err
	case <-d.stopped:
		return errShutdown
	}
}
