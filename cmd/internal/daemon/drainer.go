package daemon

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// drainPoll is how often a drain looks at proxies; a look is cheap.
	drainPoll = 2 * time.Millisecond
	// returnsWithin is how long a drain waits for a proxy that has just lost its
	// stream; one that is gone for longer is only named.
	returnsWithin = 2 * time.Second
	// replicaGrace is how much longer than a drain's time the other replicas are
	// waited for.
	replicaGrace = 2 * time.Second
	// closeWithin is how long closing is waited for: proxies ask once a second.
	closeWithin = 3 * time.Second
)

// DrainResult is what a drain came to.
type DrainResult struct {
	Instance string   `json:"instance"`
	Drained  bool     `json:"drained" doc:"every proxy has let go of it; nothing that is known of is in flight"`
	TimedOut bool     `json:"timed_out"`
	Took     float64  `json:"took" doc:"seconds"`
	InFlight uint64   `json:"in_flight" doc:"requests and TCP connections that outlived the timeout"`
	Waiting  []string `json:"waiting" doc:"what did not answer: proxies, replicas"`
	Unknown  []string `json:"unknown" doc:"proxies that have confirmed but did not say in time what they have in flight"`
	Gone     []string `json:"gone" doc:"proxies that are not connected and may still have it"`
}

// drainer waits until this replica's proxies have let go of one instance.
type drainer struct {
	d        *Daemon
	instance string
	version  uint64 // of the first Snapshot in which it drains
	clusters []string
	targets  []xds.Target
	timeout  time.Duration
	closes   bool   // connections that outlive the timeout are closed
	mark     uint64 // its generation in the store; 0: no other replica drains it
	begun    time.Time
	cancel   context.CancelFunc
	done     chan struct{} // closed at the end; outcome is set where err is nil
	err      error
	outcome  DrainResult
}

func newDrainer(d *Daemon, version uint64, s *lb.Service, e *lb.Endpoint, timeout time.Duration) *drainer {
	r := &drainer{d: d, instance: e.Instance.QualifiedName(), version: version, timeout: timeout, closes: s.DrainCheck.IsValid(), begun: time.Now(), done: make(chan struct{})}
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

// run returns when nothing holds the instance any more, on any replica, or its
// time is over; with an error only when ctx ends before.
func (r *drainer) run(ctx context.Context) (err error) {
	defer func() {
		r.err = err
		close(r.done)
	}()
	stop := r.d.XDS.WatchLoad(r.clusters...)
	defer stop()
	out := DrainResult{Instance: r.instance, Waiting: []string{}, Unknown: []string{}, Gone: []string{}}
	limit := r.begun.Add(r.timeout)
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
	if late && r.closes && r.mark > 0 {
		if late, err = r.close(ctx, confirmed); err != nil {
			return err
		}
		out.TimedOut = true
	}
	out.Drained, out.TimedOut = !late, out.TimedOut || late
	r.findings(&out, confirmed)
	r.d.outcomes.set(r.instance, outcome{r.mark, true, out.InFlight, out.Waiting, out.Unknown, out.Gone})
	if r.d.group != nil && r.mark > 0 {
		r.d.group.Poke()
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
func (r *drainer) grace(limit time.Time) time.Time {
	if r.closes {
		limit = limit.Add(closeWithin)
	}
	return limit.Add(replicaGrace)
}

// close has every replica's proxies close what is left, and waits for that.
func (r *drainer) close(ctx context.Context, confirmed time.Time) (late bool, err error) {
	err = r.d.do(ctx, func(rec *reconciler) error {
		rec.phase(r.instance, phaseClosing)
		return nil
	})
	if err != nil {
		return true, ctx.Err() // it is not written down: nothing is closed
	}
	return r.poll(ctx, time.Now().Add(closeWithin), func() bool { return !confirmed.IsZero() && r.quiet(confirmed) })
}

// poll waits until ok, or reports that it was not before the limit.
func (r *drainer) poll(ctx context.Context, limit time.Time, ok func() bool) (late bool, err error) {
	timer := time.NewTimer(time.Until(limit))
	defer timer.Stop()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-timer.C:
			return true, nil
		case <-tick.C:
		}
	}
	return false, nil
}

// quiet says that every proxy has reported since, and has nothing in flight.
func (r *drainer) quiet(since time.Time) bool {
	busy, silent := r.d.XDS.InFlight(since, r.targets...)
	return len(busy) == 0 && len(silent) == 0
}

// silentReplicas are those that have not said yet that they are through.
func (r *drainer) silentReplicas() (names []string) {
	list, _ := r.d.group.Others()
	for _, o := range list {
		if _, done := outcomeOf(o, r.instance, r.mark); !done {
			names = append(names, o.Name)
		}
	}
	return names
}

// others adds what the other replicas say.
func (r *drainer) others(out *DrainResult, late bool) {
	list, _ := r.d.group.Others()
	for _, o := range list {
		said, done := outcomeOf(o, r.instance, r.mark)
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
func (r *drainer) settled() bool {
	if p := r.d.progress.Load(); p == nil || p.Acked < r.version {
		return false
	}
	for _, h := range r.holders() {
		if !h.Connected && time.Since(h.Since) < returnsWithin {
			return false
		}
	}
	return true
}

func (r *drainer) holders() []xds.Holder {
	return r.d.XDS.Holders(envoy.Endpoint, func(name string) bool { return slices.Contains(r.clusters, name) })
}

// findings names who of this replica's proxies has not let go.
func (r *drainer) findings(out *DrainResult, confirmed time.Time) {
	busy, silent := r.d.XDS.InFlight(confirmed, r.targets...)
	for _, n := range busy {
		out.InFlight += n
	}
	if out.TimedOut {
		for _, id := range r.d.XDS.Behind(r.version) {
			out.Waiting = append(out.Waiting, "proxy "+id+" has not confirmed")
		}
		for _, id := range silent {
			if !confirmed.IsZero() {
				out.Unknown = append(out.Unknown, id)
			}
		}
	}
	for _, p := range r.d.XDS.Proxies() {
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

// result waits for the outcome.
func (r *drainer) result(ctx context.Context) (DrainResult, error) {
	select {
	case <-r.done:
		if r.err != nil {
			return DrainResult{}, fmt.Errorf("%w any more: it was put back into service, or it has left", ErrNotDraining)
		}
		return r.outcome, nil
	case <-ctx.Done():
		return DrainResult{}, ctx.Err()
	case <-r.d.stopped:
		return DrainResult{}, errShutdown
	}
}
