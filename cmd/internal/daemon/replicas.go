package daemon

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/cmd/internal/replicas"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
)

// What one replica tells the others is bounded: Consul takes 512 KB a key.
const (
	toldProxies = 200
	toldEvents  = 100

	toldWithin = 2 * time.Second
)

// Told is what a replica says of itself, for people.
type Told struct {
	Replica  string            `json:"replica"`
	Proxies  []xds.ProxyStatus `json:"proxies"`
	More     int               `json:"more"` // proxies that are left out
	Problems []lb.Problem      `json:"problems"`
	Events   []events.Event    `json:"events"`
}

// built says which Snapshot was the first to have a generation of the ledger.
type built struct{ version, generation uint64 }

// note remembers that a Snapshot has the ledger's generation. It is called by
// the reconciler.
func (d *Daemon) note(version uint64) {
	generation := d.ledger.Generation()
	var list []built
	if p := d.builds.Load(); p != nil {
		list = *p
	}
	if n := len(list); n > 0 && list[n-1].generation == generation {
		return
	}
	acked := d.acked()
	keep := []built{}
	for n, b := range list {
		if b.generation >= acked || n == len(list)-1 {
			keep = append(keep, b)
		}
	}
	keep = append(keep, built{version, generation})
	d.builds.Store(&keep)
}

// acked is the newest generation of the ledger that every proxy of this replica
// has confirmed.
func (d *Daemon) acked() uint64 {
	list, progress := d.builds.Load(), d.progress.Load()
	if list == nil || progress == nil {
		return 0
	}
	generation := uint64(0)
	for _, b := range *list {
		if b.version <= progress.Acked {
			generation = b.generation
		}
	}
	return generation
}

// self is what the other replicas are told.
func (d *Daemon) self() replicas.Self {
	s := replicas.Self{Config: d.config.Load().Hash(), Acked: d.acked(), Cleared: d.cleared.Load()}
	var err error
	if s.Urgent, err = d.outcomes.JSON(); err != nil {
		d.log.Error("the outcomes of drains cannot be told", "error", err)
	}
	return s
}

// status is what the other replicas may ask of this one.
func (d *Daemon) status() []byte {
	t := Told{Replica: d.start.Model.Node, Proxies: d.XDS.Proxies(), Problems: d.Problems(), Events: d.Events.List(0, toldEvents, nil)}
	if more := len(t.Proxies) - toldProxies; more > 0 {
		t.Proxies, t.More = t.Proxies[:toldProxies], more
	}
	data, err := json.Marshal(t)
	if err != nil {
		d.log.Error("the status cannot be told", "error", err)
	}
	return data
}

// Others is what the other living replicas say of themselves, by name. Nothing,
// when the store does not answer: a Problem says so.
func (d *Daemon) Others(ctx context.Context) []Told {
	if d.group == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, toldWithin)
	defer cancel()
	told, err := d.group.Told(ctx)
	if err != nil {
		d.log.Debug("the other replicas' status cannot be read", "error", err)
	}
	out := make([]Told, 0, len(told))
	for _, name := range slices.Sorted(maps.Keys(told)) {
		var t Told
		if json.Unmarshal(told[name], &t) != nil {
			t = Told{} // a newer Roost's
		}
		t.Replica = name
		out = append(out, t)
	}
	return out
}

// alone says that no other replica is configured otherwise, or that there is
// none: what no file declares any more is then really gone.
func (d *Daemon) alone() bool {
	if d.group == nil {
		return true
	}
	list, ok := d.group.Others()
	return ok && !slices.ContainsFunc(list, func(o replicas.Other) bool { return o.Config != d.config.Load().Hash() })
}

// othersCleared says that no other replica, living or just gone, has a proxy or
// a DNS answer that knows an address of a generation.
func (d *Daemon) othersCleared(generation uint64, forget time.Duration) bool {
	if d.group == nil {
		return true
	}
	list, ok := d.group.Others()
	if gone := d.group.Gone(); !ok || !gone.IsZero() && time.Since(gone) < forget {
		return false
	}
	return !slices.ContainsFunc(list, func(o replicas.Other) bool { return o.Cleared < generation })
}

// clear notes up to which generation nobody of this replica has a quarantined
// address.
func (r *reconciler) clear(due []ledger.Record) {
	cleared := r.d.ledger.Generation()
	for _, h := range r.quarantine.held {
		if !slices.ContainsFunc(due, func(d ledger.Record) bool { return d.Address == h.record.Address }) {
			cleared = min(cleared, h.record.Generation-1)
		}
	}
	if r.d.cleared.Swap(cleared) != cleared && r.d.group != nil {
		r.d.group.Poke()
	}
}

// replicaProblems are what is wrong with the shared store and those that share
// it.
func (d *Daemon) replicaProblems() (out []lb.Problem) {
	if d.group == nil {
		return nil
	}
	failure := d.group.Failure()
	if p := d.shared.failure.Load(); p != nil {
		failure = *p
	}
	if failure != "" {
		out = append(out, lb.Problem{Code: "store_unreachable", Severity: discovery.SeverityError, Object: "ledger", Place: "store.consul",
			Message: "the shared ledger does not answer; what is bound goes on, nothing new gets an address, drains and deletes wait: " + failure,
			Fix:     "look at Consul; nothing has to be done here when it answers again"})
	}
	var differ []string
	list, _ := d.group.Others()
	for _, o := range list {
		if o.Config != "" && o.Config != d.config.Load().Hash() {
			differ = append(differ, o.Name)
		}
	}
	if len(differ) > 0 {
		out = append(out, lb.Problem{Code: "replicas_differ", Severity: discovery.SeverityWarning, Object: "config", Place: d.start.Path,
			Message: "replicas are configured otherwise than this one: " + strings.Join(differ, ", ") + "; until they agree no service is deleted for being absent from a file",
			Fix:     "give every replica the same file"})
	}
	return out
}
