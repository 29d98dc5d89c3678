// Package events remembers what has changed: which service, instance, address
// or proxy, and how long it took from the source's answer to the last proxy.
// Facts go in from any goroutine; a list, and a stream for each subscriber,
// come out. It starts no goroutine; a subscriber that does not keep up is told
// of the gap and never waited for.
package events

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Kinds of events, as the contract names them.
const (
	ServiceCreated     = "service_created"
	ServiceDeleted     = "service_deleted"
	ServiceChanged     = "service_changed"
	InstanceAdded      = "instance_added"
	InstanceRemoved    = "instance_removed"
	InstanceMigrated   = "instance_migrated"
	InstanceDraining   = "instance_draining"
	AddressBound       = "address_bound"
	AddressQuarantined = "address_quarantined"
	AddressFreed       = "address_freed"
	ProxyConnected     = "proxy_connected"
	ProxyDisconnected  = "proxy_disconnected"
	ProxyRejected      = "proxy_rejected"
	SourceStale        = "source_stale"
	SourceRecovered    = "source_recovered"
	ConfigReloaded     = "config_reloaded"
	ConfigRefused      = "config_refused"
	ResourcePinned     = "resource_pinned"
	ResourceUnpinned   = "resource_unpinned"
)

// Steps says when a change was seen, and how many seconds later it was built
// into a Snapshot, pushed to the last proxy and ACKed by the last proxy.
type Steps struct {
	Seen   time.Time `json:"seen"`
	Built  *float64  `json:"built"`
	Pushed *float64  `json:"pushed"`
	Acked  *float64  `json:"acked"`
}

// Event is one change. It is immutable once listed; a receipt is a new copy.
type Event struct {
	Seq      uint64    `json:"seq"`
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"`
	Tenant   *string   `json:"tenant"`
	Service  *string   `json:"service"`
	Instance *string   `json:"instance"`
	Proxy    *string   `json:"proxy"`
	Message  string    `json:"message"`
	Steps    *Steps    `json:"steps"`
	// Source and Index say which answer of which source the change was in.
	Source *string `json:"source"`
	Index  *uint64 `json:"index"`
	// AckedBy are the proxies that have confirmed it, in the order in which they
	// did, at most ackers of them; Acks counts them all.
	AckedBy []string `json:"acked_by"`
	Acks    int      `json:"acks"`

	version uint64 // of the Snapshot that the change is in; 0 needs no receipt
	cluster string // SERVICE.TENANT, as the names of its clusters begin
	late    bool   // its receipt was sent without the missing steps
}

// From names the answer of a source that the change was in; index 0 is none.
func (e Event) From(source string, index uint64) Event {
	e.Source = optional(source)
	if index > 0 {
		e.Index = &index
	}
	return e
}

// Message is what a subscriber gets: an event, once more its receipt, or a gap.
type Message struct {
	Event   Event
	Receipt bool
	Gap     bool
}

const (
	keep = 10_000
	// ackers bounds the proxies that one event names.
	ackers = 50
	// subscriberQueue bounds what one subscriber may lag behind.
	subscriberQueue = 4096
	// seqPerMillisecond lets sequence numbers grow over restarts: they start
	// from the clock.
	seqPerMillisecond = 1000
)

// Log is the memory of events.
type Log struct {
	now func() time.Time

	mu      sync.Mutex
	events  []Event                    // oldest first; guarded by mu
	next    uint64                     // guarded by mu
	pending []uint64                   // owed a receipt, oldest first; guarded by mu
	subs    map[*Subscription]struct{} // guarded by mu
	owed    atomic.Bool                // something is pending
	latency func(time.Duration)        // fixed
}

// New returns an empty Log. latency is told how long each change took from
// seen to the last ACK; it may be nil.
func New(now func() time.Time, latency func(time.Duration)) *Log {
	if now == nil {
		now = time.Now
	}
	if latency == nil {
		latency = func(time.Duration) {}
	}
	return &Log{now: now, next: uint64(now().UnixMilli()) * seqPerMillisecond, subs: map[*Subscription]struct{}{}, latency: latency}
}

// Change makes an Event whose receipt is due when every proxy has the Snapshot
// version.
func Change(kind, tenant, service, instance, message string, seen time.Time, version uint64) Event {
	e := Event{Kind: kind, Tenant: optional(tenant), Service: optional(service), Instance: optional(instance), Message: message, AckedBy: []string{}, version: version, cluster: service + "." + tenant}
	if !seen.IsZero() {
		e.Steps = &Steps{Seen: seen.UTC().Truncate(time.Microsecond)}
	}
	return e
}

// Fact makes an Event without steps.
func Fact(kind, proxy, message string) Event {
	return Event{Kind: kind, Proxy: optional(proxy), Message: message, AckedBy: []string{}}
}

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// Add appends events, built now.
func (l *Log) Add(list ...Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	for _, e := range list {
		l.next++
		e.Seq, e.Time = l.next, now.UTC().Truncate(time.Microsecond)
		if e.Steps != nil {
			e.Steps.Built = elapsed(e.Steps.Seen, now)
			if e.version > 0 {
				l.pending = append(l.pending, e.Seq)
				l.owed.Store(true)
			}
		}
		l.events = append(l.events, e)
		l.send(Message{Event: e})
	}
	if len(l.events) > keep+keep/10 {
		l.events = slices.Clone(l.events[len(l.events)-keep:])
	}
}

func elapsed(from, to time.Time) *float64 {
	s := max(to.Sub(from).Seconds(), 0)
	return &s
}

func (l *Log) send(m Message) {
	for s := range l.subs {
		select {
		case s.c <- m:
		default:
			s.lost = true
		}
	}
}

// Progress fills the receipts of changes that every proxy has been sent
// (pushed) or has settled (acked), by Snapshot version.
func (l *Log) Progress(pushed, acked uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	rest := l.pending[:0]
	for _, seq := range l.pending {
		i, ok := l.find(seq)
		if !ok {
			continue
		}
		e := l.events[i]
		steps := *e.Steps
		if steps.Pushed == nil && e.version <= pushed {
			steps.Pushed = elapsed(steps.Seen, now)
		}
		done := e.version <= acked
		if done {
			steps.Acked = elapsed(steps.Seen, now)
			l.latency(now.Sub(steps.Seen))
		}
		e.Steps = &steps
		l.events[i] = e
		if !done {
			rest = append(rest, seq)
		} else if !e.late {
			l.send(Message{Event: e, Receipt: true})
		}
	}
	l.pending = rest
	l.owed.Store(len(rest) > 0)
}

// Acked notes that a proxy has confirmed the endpoints of clusters as the
// Snapshot of a version has them. It may be called from any goroutine.
func (l *Log) Acked(proxy string, version uint64, clusters []string) {
	if !l.owed.Load() {
		return
	}
	services := make(map[string]bool, len(clusters))
	for _, c := range clusters {
		name, _, _ := strings.Cut(c, ":")
		services[name] = true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, seq := range l.pending {
		i, ok := l.find(seq)
		if !ok || l.events[i].version > version || !services[l.events[i].cluster] || slices.Contains(l.events[i].AckedBy, proxy) {
			continue
		}
		e := &l.events[i]
		e.Acks++
		if len(e.AckedBy) < ackers {
			e.AckedBy = append(slices.Clip(e.AckedBy), proxy) // lists that were handed out stay as they are
		}
	}
}

// Expire sends the receipts of changes older than age that some proxy still
// owes, without the missing steps; the list has those once they come.
func (l *Log) Expire(age time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	limit := l.now().Add(-age)
	for _, seq := range l.pending {
		i, ok := l.find(seq)
		if ok && !l.events[i].late && l.events[i].Time.Before(limit) {
			l.events[i].late = true
			l.send(Message{Event: l.events[i], Receipt: true})
		}
	}
}

func (l *Log) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(l.events, seq, func(e Event, seq uint64) int {
		switch {
		case e.Seq < seq:
			return -1
		case e.Seq > seq:
			return 1
		}
		return 0
	})
}

// List returns up to limit events after a sequence number, oldest first. With
// after 0 they are the newest ones.
func (l *Log) List(after uint64, limit int, match func(Event) bool) []Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := []Event{}
	for _, e := range l.kept() {
		if e.Seq > after && (match == nil || match(e)) {
			out = append(out, e)
		}
	}
	if len(out) > limit {
		if after == 0 {
			return out[len(out)-limit:]
		}
		return out[:limit]
	}
	return out
}

func (l *Log) kept() []Event {
	if len(l.events) > keep {
		return l.events[len(l.events)-keep:]
	}
	return l.events
}

// Subscription is one reader of the stream.
type Subscription struct {
	c    chan Message
	lost bool // guarded by Log.mu
	log  *Log
}

// Subscribe starts a stream. With after > 0 it begins with the events after
// that one, or with a gap when they are no longer kept.
func (l *Log) Subscribe(after uint64) (past []Message, s *Subscription) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s = &Subscription{c: make(chan Message, subscriberQueue), log: l}
	l.subs[s] = struct{}{}
	if after == 0 {
		return nil, s
	}
	kept := l.kept()
	if (len(kept) == 0 || kept[0].Seq > after+1) && after < l.next {
		past = append(past, Message{Gap: true})
	}
	for _, e := range kept {
		if e.Seq > after {
			past = append(past, Message{Event: e})
		}
	}
	return past, s
}

// C delivers the stream.
func (s *Subscription) C() <-chan Message { return s.c }

// Lost tells, once, that messages were dropped because the reader lagged.
func (s *Subscription) Lost() bool {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	lost := s.lost
	s.lost = false
	return lost
}

// Close ends the stream.
func (s *Subscription) Close() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	delete(s.log.subs, s)
}
