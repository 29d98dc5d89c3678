package discovery

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// The guard tells a mass loss from deregistrations. A loss is an instance that
// took traffic and that its source no longer lists, or that is critical now
// because its node is. What counts:
//
//   - A deregistration is a write of its own to the source's state. As long as the
//     source's index has moved at least as often, within the window, as instances
//     were lost, each of them can have been deregistered by itself, and none counts.
//     Once it has moved less often, those count that share their index with others.
//   - An instance on a dead node counts when two nodes died within the window: one
//     dead node is an ordinary failure.
//   - A loss for which the service, or the same id elsewhere, was gained within the
//     window is a move.
//
// Where what counts exceeds the limits of a tenant or of the source, the whole of
// it is held, also what had gone already within the window; everything before that
// goes out at once. A source whose state was lost, or that hides a part of it,
// says so itself (Regressed, Identity, an index that fell or did not move): what
// such an answer lacks is held without counting.
//
// A held instance is let go of when its source lists it again, when probes find
// it dead, when an operator releases it, or when the source has recovered: it
// answers and hides nothing, some of what was lost is back, what is still missing
// is within the limits, and nothing more has come back for recoveredAfter.
const (
	lossWindow = 10 * time.Second
	// recoveredAfter leaves time to agents that register again on their own: in a
	// large Consul they look every few minutes.
	recoveredAfter = 5 * time.Minute

	massLeast     = 3
	tenantPercent = 15
	allPercent    = 5
)

// isMass tells whether so many of so many are a mass loss.
func isMass(lost, of, percent int) bool { return lost >= massLeast && lost*100 > of*percent }

// loss is an instance that has left lately.
type loss struct {
	instance *Instance // as it was last good
	scope    string
	index    uint64
	at       time.Time
	nodeDown bool
	listed   *Instance // as the source lists it now; nil: not at all
	settled  bool      // it is back, or held, or released
}

type gain struct {
	id instanceID
	at time.Time
}

// guard is what a source has lost within the window. Its state is a part of the
// merge.
type guard struct {
	on       bool
	disarmed time.Time // until then everything goes
	losses   []*loss   // the oldest first
	byID     map[instanceID]*loss
	// Of the losses that are no dead node's: how many, how many at each index, the
	// highest index, and the source's index before the first.
	count   int
	atIndex map[uint64]int
	highest uint64
	base    uint64
	down    int  // losses that are a dead node's
	looked  bool // the whole window was weighed since it was last overdrawn
	// tripped is until when losses of a tenant ("": of all) are held as they come.
	tripped map[string]time.Time
	gains   []gain
}

func newGuard(on bool) guard {
	return guard{on: on, byID: map[instanceID]*loss{}, atIndex: map[uint64]int{}, tripped: map[string]time.Time{}}
}

func (g *guard) armed(now time.Time) bool { return !now.Before(g.disarmed) }

// forget empties the window: what has gone stays so.
func (g *guard) forget() {
	on, disarmed := g.on, g.disarmed
	*g = newGuard(on)
	g.disarmed = disarmed
}

// lost adds a loss; top is the source's highest index before it.
func (g *guard) lost(l *loss, top uint64) {
	g.expire(l.at)
	g.losses = append(g.losses, l)
	g.byID[idOf(l.instance)] = l
	if l.nodeDown {
		g.down++
		return
	}
	if g.count == 0 {
		g.base, g.highest = top, top
	}
	g.count++
	g.atIndex[l.index]++
	g.highest = max(g.highest, l.index)
}

// gained adds an instance that is new to its source.
func (g *guard) gained(id instanceID, now time.Time) { g.gains = append(g.gains, gain{id, now}) }

// back notes that a lost instance is listed, and good, again.
func (g *guard) back(id instanceID) bool {
	l := g.byID[id]
	if l != nil {
		l.settled = true
		delete(g.byID, id)
	}
	return l != nil
}

func (g *guard) expire(now time.Time) {
	n := 0
	for ; n < len(g.losses) && now.Sub(g.losses[n].at) > lossWindow; n++ {
		l := g.losses[n]
		if id := idOf(l.instance); g.byID[id] == l {
			delete(g.byID, id)
		}
		if l.nodeDown {
			g.down--
			continue
		}
		g.count--
		if g.atIndex[l.index]--; g.atIndex[l.index] == 0 {
			delete(g.atIndex, l.index)
		}
		g.base = max(g.base, l.index)
	}
	g.losses = slices.Delete(g.losses, 0, n)
	n = 0
	for ; n < len(g.gains) && now.Sub(g.gains[n].at) > lossWindow; n++ {
	}
	g.gains = slices.Delete(g.gains, 0, n)
}

// explained tells whether l can have been deregistered by itself.
func (g *guard) explained(l *loss) bool {
	if l.index == 0 {
		return false
	}
	return !g.overdrawn() || g.atIndex[l.index] == 1
}

// overdrawn tells whether more was lost than there can have been writes.
func (g *guard) overdrawn() bool {
	return g.base > g.highest || uint64(g.count) > g.highest-g.base || g.atIndex[0] > 0
}

// trips tells whether what l's tenant loses is held as it comes.
func (g *guard) trips(l *loss, now time.Time) bool {
	return now.Before(g.tripped[""]) || now.Before(g.tripped[l.instance.Key.Tenant])
}

// settled weighs the newest losses alone, where that is enough: nothing counts, or
// all that does is held as it comes. Thousands of scopes may tell theirs one by one.
func (g *guard) settled(newest []*loss, now time.Time) (hold []*loss, ok bool) {
	if g.down == 0 && !g.overdrawn() {
		g.looked = false
		return nil, true
	}
	if g.down > 0 || len(g.gains) > 0 || !g.looked {
		return nil, false
	}
	for _, l := range newest {
		if l.index == 0 || g.atIndex[l.index] == 2 || !g.trips(l, now) {
			return nil, false // an earlier one may count from now on, or a limit be passed
		}
		if !g.explained(l) {
			hold = append(hold, l)
		}
	}
	return hold, true
}

// split tells whether two nodes have died.
func (g *guard) split() bool {
	first := ""
	for _, l := range g.losses {
		if l.nodeDown && g.byID[idOf(l.instance)] == l {
			if first != "" && l.instance.Node != first {
				return true
			}
			first = l.instance.Node
		}
	}
	return false
}

// counting are the losses of the window that count.
func (g *guard) counting() []*loss {
	split := g.split()
	var list []*loss
	for _, l := range g.losses {
		if g.byID[idOf(l.instance)] == l && (l.nodeDown && split || !l.nodeDown && !g.explained(l)) {
			list = append(list, l)
		}
	}
	if len(g.gains) == 0 || len(list) == 0 {
		return list
	}
	return g.net(list)
}

// net leaves out the losses for which something was gained: first the same id,
// then any instance of the same service.
func (g *guard) net(list []*loss) []*loss {
	type named struct{ tenant, id string }
	sameID, sameKey := map[named]int{}, map[Key]int{}
	for _, p := range g.gains {
		if g.byID[p.id] != nil {
			continue // it came and went
		}
		sameID[named{p.id.key.Tenant, p.id.id}]++
		sameKey[p.id.key]++
	}
	list = slices.DeleteFunc(list, func(l *loss) bool {
		n := named{l.instance.Key.Tenant, l.instance.ID}
		if sameID[n] == 0 {
			return false
		}
		sameID[n]--
		sameKey[l.instance.Key]--
		return true
	})
	return slices.DeleteFunc(list, func(l *loss) bool {
		sameKey[l.instance.Key]--
		return sameKey[l.instance.Key] >= 0
	})
}

// guardLosses holds what counts where it is over the limits.
func (m *merge) guardLosses(s *sourceState, newest []*loss) {
	g, now := &s.guard, m.now()
	if !g.armed(now) {
		return
	}
	list, ok := g.settled(newest, now)
	if !ok {
		list = g.counting()
		g.looked = g.overdrawn()
		m.weigh(s, list)
	}
	for _, l := range list {
		if !l.settled && g.trips(l, now) {
			l.settled = true
			m.bringBack(s, l)
			g.prolong(l, now)
		}
	}
}

// prolong keeps the guard tripped while losses come.
func (g *guard) prolong(l *loss, now time.Time) {
	for _, whose := range []string{"", l.instance.Key.Tenant} {
		if now.Before(g.tripped[whose]) {
			g.tripped[whose] = now.Add(lossWindow)
		}
	}
}

// weigh trips the guard where what counts exceeds a limit.
func (m *merge) weigh(s *sourceState, list []*loss) {
	g := &s.guard
	gone, perTenant, goneOf := 0, map[string]int{}, map[string]int{}
	for _, l := range list {
		perTenant[l.instance.Key.Tenant]++
		if !l.settled {
			gone++
			goneOf[l.instance.Key.Tenant]++
		}
	}
	until := m.now().Add(lossWindow)
	for _, tenant := range slices.Sorted(maps.Keys(perTenant)) {
		if of := s.serving[tenant] + goneOf[tenant]; isMass(perTenant[tenant], of, tenantPercent) {
			g.tripped[tenant] = until
			s.reason = fmt.Sprintf("more than %d %% of tenant %s's %d instances vanished within %v without a deregistration of each", tenantPercent, tenant, of, lossWindow)
		}
	}
	if of := s.total + gone; isMass(len(list), of, allPercent) {
		g.tripped[""] = until
		s.reason = fmt.Sprintf("more than %d %% of its %d instances vanished within %v without a deregistration of each", allPercent, of, lossWindow)
	}
}

// bringBack puts a loss into its scope again, held.
func (m *merge) bringBack(s *sourceState, l *loss) {
	old := s.scopes[l.scope]
	if old == nil {
		old = &scopeState{Index: l.index}
	}
	next := *old
	id := idOf(l.instance)
	at := touched{s.status.Name, l.index, l.at}
	listed := l.listed
	next.Instances = slices.DeleteFunc(slices.Clone(old.Instances), func(i *Instance) bool { return idOf(i) == id })
	next.Instances = append(next.Instances, m.hold(s, l.scope, l.instance, listed, at))
	m.set(s, l.scope, &next)
}

// recovered lets go of what a source that has recovered still lacks, and tells
// whether anything has changed.
func (m *merge) recovered(s *sourceState) bool {
	if len(s.held) == 0 || s.status.Stale || len(s.limited) > 0 || s.returned.IsZero() || m.now().Sub(s.returned) < recoveredAfter {
		return false
	}
	of := map[string]int{}
	for id := range s.held {
		of[id.key.Tenant]++
	}
	if isMass(len(s.held), s.total, allPercent) {
		return false
	}
	for tenant, n := range of {
		if isMass(n, s.serving[tenant], tenantPercent) {
			return false
		}
	}
	m.config.Log.Info("source has recovered, what it still lacks is let go", "source", s.status.Name, "instances", len(s.held))
	return m.letGo(s, slices.Collect(maps.Keys(s.held)))
}

// tick does what is due by time alone.
func (m *merge) tick() bool {
	changed := false
	for _, s := range m.sources {
		changed = m.recovered(s) || changed
	}
	return changed
}

// heldProblem says what is held of s.
func heldProblem(s *sourceState) Problem {
	tenants := map[string]int{}
	for id := range s.held {
		tenants[id.key.Tenant]++
	}
	names := slices.SortedFunc(maps.Keys(tenants), func(a, b string) int { return cmp.Or(tenants[b]-tenants[a], strings.Compare(a, b)) })
	const most = 5
	var parts []string
	for _, name := range names[:min(len(names), most)] {
		parts = append(parts, fmt.Sprintf("%s %d", name, tenants[name]))
	}
	if len(names) > most {
		parts = append(parts, fmt.Sprintf("%d further tenants", len(names)-most))
	}
	return Problem{Code: "mass_loss_held", Severity: SeverityWarning, Object: s.status.Name, Place: s.status.Name,
		Message: fmt.Sprintf("%s: %d instances that it lost are kept while they answer (%s)", s.status.HeldWhy, len(s.held), strings.Join(parts, ", ")),
		Fix:     "mend the source, or register the instances again; if they are meant to be gone: roost discovery release " + s.status.Name, Since: s.status.HeldSince}
}
