package admin

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/cmd/internal/events"
)

// Everywhere says whether a list is to have what the other replicas say, too.
type Everywhere struct {
	Local bool `query:"local" doc:"only of this replica"`
}

// others are the replicas that a list is to have besides this one.
func (a *api) others(ctx context.Context, e Everywhere) []daemon.Told {
	if e.Local {
		return nil
	}
	return a.d.Others(ctx)
}

// allProxies lists the proxies of every replica, by id and replica. A proxy that
// has moved from one to another is listed where it is connected.
func (a *api) allProxies(ctx context.Context, e Everywhere) []Proxy {
	var items []Proxy
	for _, p := range a.d.XDS.Proxies() {
		items = append(items, proxyOf(p))
	}
	for _, o := range a.others(ctx, e) {
		for _, p := range o.Proxies {
			out := proxyOf(p)
			out.Replica = optional(o.Replica)
			items = append(items, out)
		}
	}
	slices.SortStableFunc(items, func(x, y Proxy) int {
		return cmp.Or(strings.Compare(x.ID, y.ID), boolean(y.Connected)-boolean(x.Connected))
	})
	return slices.CompactFunc(items, func(x, y Proxy) bool { return x.ID == y.ID && !y.Connected })
}

func boolean(b bool) int {
	if b {
		return 1
	}
	return 0
}

// allProblems lists the problems of this replica, and those that only others
// have.
func (a *api) allProblems(ctx context.Context, e Everywhere) []Problem {
	type id struct{ code, object, place string }
	var items []Problem
	known := map[id]bool{}
	for _, p := range a.d.Problems() {
		known[id{p.Code, p.Object, p.Place}] = true
		items = append(items, problemOf(p))
	}
	for _, o := range a.others(ctx, e) {
		for _, p := range o.Problems {
			if known[id{p.Code, p.Object, p.Place}] {
				continue
			}
			out := problemOf(p)
			out.Replica = optional(o.Replica)
			items = append(items, out)
		}
	}
	return items
}

// ReplicaEvent is an event as a list shows it: of which replica, or, where
// several tell the same change, with the proxies of all.
type ReplicaEvent struct {
	events.Event
	Replica *string `json:"replica"`
}

// mergeEvents joins the newest events of other replicas to this one's, in the
// order of time. A change that several have seen is there once: with everybody's
// ACKs, and done when the last one was.
func mergeEvents(own []events.Event, others []daemon.Told, takes func(events.Event) bool) []ReplicaEvent {
	out := make([]ReplicaEvent, 0, len(own))
	at := map[string]int{}
	for _, e := range own {
		at[sameChange(e)] = len(out)
		out = append(out, ReplicaEvent{Event: e})
	}
	for _, o := range others {
		for _, e := range o.Events {
			if !takes(e) {
				continue
			}
			if n, ok := at[sameChange(e)]; ok && e.Source != nil {
				join(&out[n].Event, e)
				continue
			}
			out = append(out, ReplicaEvent{e, optional(o.Replica)})
		}
	}
	slices.SortStableFunc(out, func(x, y ReplicaEvent) int { return x.Time.Compare(y.Time) })
	return out
}

// sameChange is equal for events that tell of one change of one source.
func sameChange(e events.Event) string {
	index := uint64(0)
	if e.Index != nil {
		index = *e.Index
	}
	return fmt.Sprint(e.Kind, value(e.Tenant), "/", value(e.Service), "/", value(e.Instance), " ", value(e.Source), index, e.Message)
}

func join(e *events.Event, other events.Event) {
	e.Acks += other.Acks
	e.AckedBy = append(slices.Clip(e.AckedBy), other.AckedBy...)
	if e.Steps == nil || other.Steps == nil {
		return
	}
	steps := *e.Steps
	steps.Pushed, steps.Acked = later(steps.Pushed, other.Steps.Pushed), later(steps.Acked, other.Steps.Acked)
	e.Steps = &steps
}

// later is the longer of two, and none while one is missing.
func later(a, b *float64) *float64 {
	switch {
	case a == nil || b == nil:
		return nil
	case *b > *a:
		return b
	}
	return a
}
