// Package drain waits until nobody has one instance any more: the proxies of this
// replica have confirmed that it drains and have nothing in flight to it, and the
// other replicas say the same of theirs. What to wait for goes in; a Result comes
// out, which names who did not answer.
//
// A Drain's Run is one goroutine's; everything else may be called from any. It
// decides nothing: who drains is the ledger's marks' to say.
package drain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/roostmesh/roost/cmd/internal/replicas"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// pollEvery is how often a drain looks at proxies; a look is cheap.
	pollEvery = 2 * time.Millisecond
	// returnsWithin is how long a drain waits for a proxy that has just lost its
	// stream; one that is gone for longer is only named.
	returnsWithin = 2 * time.Second
	// replicaGrace is how much longer than a drain's time the other replicas are
	// waited for.
	replicaGrace = 2 * time.Second
	// closeWithin is how long closing is waited for: proxies ask once a second.
	closeWithin = 3 * time.Second
)

// Result is what a drain came to.
type Result struct {
	Instance string   `json:"instance"`
	Drained  bool     `json:"drained" doc:"every proxy has let go of it; nothing that is known of is in flight"`
	TimedOut bool     `json:"timed_out"`
	Took     float64  `json:"took" doc:"seconds"`
	InFlight uint64   `json:"in_flight" doc:"requests and TCP connections that outlived the timeout"`
	Waiting  []string `json:"waiting" doc:"what did not answer: proxies, replicas"`
	Unknown  []string `json:"unknown" doc:"proxies that have confirmed but did not say in time what they have in flight"`
	Gone     []string `json:"gone" doc:"proxies that are not connected and may still have it"`
}

// Proxies are those of this replica: an xds.Server.
type Proxies interface {
	WatchLoad(clusters ...string) (stop func())
	InFlight(since time.Time, targets ...xds.Target) (busy map[string]uint64, silent []string)
	Behind(version uint64) []string
	Proxies() []xds.ProxyStatus
	Holders(t envoy.Type, wanted func(name string) bool) []xds.Holder
}

// Replicas are the others: a replicas.Group.
type Replicas interface {
	Others() ([]replicas.Other, bool)
	Poke()
}

// Config is what Drains need of their surroundings.
type Config struct {
	Proxies  Proxies
	Acked    func() uint64 // the newest Snapshot that every proxy has settled; 0: not known yet
	Replicas Replicas      // nil: there are none
	Outcomes *Outcomes     // what the others are told
	// Close has what an instance still has in flight closed, on every replica.
	Close func(ctx context.Context, instance string) error
}

// Wish is one instance to wait for.
type Wish struct {
	Version  uint64 // of the first Snapshot in which it drains
	Service  *lb.Service
	Endpoint *lb.Endpoint
	Timeout  time.Duration
	Mark     uint64 // its generation in the store; 0: no other replica drains it
}

// Drain waits for one instance.
type Drain struct {
	cfg      Config
	wish     Wish
	instance string
	clusters []string
	targets  []xds.Target
	closes   bool // connections that outlive the timeout are closed
	begun    time.Time
	done     chan struct{} // closed at the end; outcome is set where err is nil
	err      error
	outcome  Result
}

// New makes a Drain; its time begins now.
func New(cfg Config, w Wish) *Drain {
	s, e := w.Service, w.Endpoint
	r := &Drain{cfg: cfg, wish: w, instance: e.Instance.QualifiedName(), closes: s.DrainCheck.IsValid(), begun: time.Now(), done: make(chan struct{})}
	for n, p := range s.Ports {
		if !e.At[n].IsValid() {
			continue
		}
		for _, v := range append([]string{""}, s.Versions...) {
			if v == "" || v == e.Instance.Version {
				name := lb.ClusterName(s.Key, p.Name, v)
				r.clusters = append(r.clusters, name)
				r.targets = append(r.targets, xds.Target{Cluster: name, At: e.At[n]})
			}
		}
	}
	return r
}

// Run returns when nothing holds the instance any more, on any replica, or its
// time is over; with an error only when ctx ends before: its cause.
func (r *Drain) Run(ctx context.Context) (err error) {
	defer func() {
		r.err = err
		close(r.done)
	}()
	stop := r.cfg.Proxies.WatchLoad(r.clusters...)
	defer stop()
	out := Result{Instance: r.instance, Waiting: []string{}, Unknown: []string{}, Gone: []string{}}
	limit := r.begun.Add(r.wish.Timeout)
	var confirmed time.Time // when every proxy had confirmed
	late, err := r.poll(ctx, limit, func() bool {
		if confirmed.IsZero() && r.settled() {
			confirmed = time.Now()
		}
		return !confirmed.IsZero() && r.quiet(confirmed)
	})
	if err != nil {
		return err
	}
	if late && r.closes && r.wish.Mark > 0 {
		if late, err = r.close(ctx, confirmed); err != nil {
			return err
		}
		out.TimedOut = true
	}
	out.Drained, out.TimedOut = !late, out.TimedOut || late
	r.findings(&out, confirmed)
	r.cfg.Outcomes.set(r.instance, outcome{r.wish.Mark, true, out.InFlight, out.Waiting, out.Unknown, out.Gone})
	if r.cfg.Replicas != nil && r.wish.Mark > 0 {
		r.cfg.Replicas.Poke()
		if late, err = r.poll(ctx, r.grace(limit), func() bool { return len(r.silentReplicas()) == 0 }); err != nil {
			return err
		}
		r.others(&out, late)
	}
	out.Took = time.Since(r.begun).Seconds()
	r.outcome = out
	return nil
}

// grace is until when the other replicas are waited for.
func (r *Drain) grace(limit time.Time) time.Time {
	if r.closes {
		limit = limit.Add(closeWithin)
	}
	return limit.Add(replicaGrace)
}

// close has every replica's proxies close what is left, and waits for that.
func (r *Drain) close(ctx context.Context, confirmed time.Time) (late bool, err error) {
	if err := r.cfg.Close(ctx, r.instance); err != nil {
		return true, context.Cause(ctx) // nil: it is not written down: nothing is closed
	}
	return r.poll(ctx, time.Now().Add(closeWithin), func() bool { return !confirmed.IsZero() && r.quiet(confirmed) })
}

// poll waits until ok, or reports that it was not before the limit.
func (r *Drain) poll(ctx context.Context, limit time.Time, ok func() bool) (late bool, err error) {
	timer := time.NewTimer(time.Until(limit))
	defer timer.Stop()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-timer.C:
			return true, nil
		case <-tick.C:
		}
	}
	return false, nil
}

// quiet says that every proxy has reported since, and has nothing in flight.
func (r *Drain) quiet(since time.Time) bool {
	busy, silent := r.cfg.Proxies.InFlight(since, r.targets...)
	return len(busy) == 0 && len(silent) == 0
}

// silentReplicas are those that have not said yet that they are through.
func (r *Drain) silentReplicas() (names []string) {
	list, _ := r.cfg.Replicas.Others()
	for _, o := range list {
		if _, done := outcomeOf(o, r.instance, r.wish.Mark); !done {
			names = append(names, o.Name)
		}
	}
	return names
}

// others adds what the other replicas say.
func (r *Drain) others(out *Result, late bool) {
	list, _ := r.cfg.Replicas.Others()
	for _, o := range list {
		said, done := outcomeOf(o, r.instance, r.wish.Mark)
		if !done {
			out.Drained = false
			out.Waiting = append(out.Waiting, "replica "+o.Name+" has not confirmed")
			continue
		}
		out.InFlight += said.InFlight
		out.Waiting = append(out.Waiting, said.Waiting...)
		out.Unknown = append(out.Unknown, said.Unknown...)
		out.Gone = append(out.Gone, said.Gone...)
		if said.InFlight > 0 || len(said.Waiting)+len(said.Unknown) > 0 {
			out.Drained, out.TimedOut = false, true
		}
	}
	out.TimedOut = out.TimedOut || late
}

// settled says that every connected proxy has confirmed that the instance
// drains, and that none has just left that may come back.
func (r *Drain) settled() bool {
	if r.cfg.Acked() < r.wish.Version {
		return false
	}
	for _, h := range r.holders() {
		if !h.Connected && time.Since(h.Since) < returnsWithin {
			return false
		}
	}
	return true
}

func (r *Drain) holders() []xds.Holder {
	return r.cfg.Proxies.Holders(envoy.Endpoint, func(name string) bool { return slices.Contains(r.clusters, name) })
}

// findings names who of this replica's proxies has not let go.
func (r *Drain) findings(out *Result, confirmed time.Time) {
	busy, silent := r.cfg.Proxies.InFlight(confirmed, r.targets...)
	for _, n := range busy {
		out.InFlight += n
	}
	if out.TimedOut {
		for _, id := range r.cfg.Proxies.Behind(r.wish.Version) {
			out.Waiting = append(out.Waiting, "proxy "+id+" has not confirmed")
		}
		for _, id := range silent {
			if !confirmed.IsZero() {
				out.Unknown = append(out.Unknown, id)
			}
		}
	}
	for _, p := range r.cfg.Proxies.Proxies() {
		for _, n := range p.Rejected {
			if n.Type == envoy.Endpoint && slices.Contains(r.clusters, n.Name.Name) {
				out.Drained = false
				out.Waiting = append(out.Waiting, fmt.Sprintf("proxy %s refuses the change: %s", p.ID, n.Message))
			}
		}
	}
	for _, h := range r.holders() {
		if !h.Connected && !slices.Contains(out.Gone, h.ID) {
			out.Gone = append(out.Gone, h.ID)
		}
	}
}

// Result waits for the end. The error is that of ctx, or wraps the cause for which
// Run's ctx ended: ErrGivenUp, or the end of the program.
func (r *Drain) Result(ctx context.Context) (Result, error) {
	select {
	case <-r.done:
		if r.err != nil {
			return Result{}, fmt.Errorf("%s: %w", r.instance, r.err)
		}
		return r.outcome, nil
	case <-ctx.Done():
		return Result{}, ctx.Err()
	}
}

// ErrGivenUp says that an instance was put back into service, or has left, while
// somebody waited for its drain.
var ErrGivenUp = errors.New("it does not drain any more: it was put back into service, or it has left")

// Done is the Result of an instance that nobody has.
func Done(instance string, begun time.Time) Result {
	return Result{Instance: instance, Drained: true, Took: time.Since(begun).Seconds(), Waiting: []string{}, Unknown: []string{}, Gone: []string{}}
}
