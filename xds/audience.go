package xds

import (
	"math/bits"
	"strings"
	"sync"

	"github.com/roostmesh/roost/xds/envoy"
)

// audience is the index from resources to the streams that a change of them
// concerns: a change then costs its subscribers, not the fleet. It may name a
// stream too many, never one too few.
type audience struct {
	mu       sync.Mutex
	slots    []*stream                       // nil: free; guarded by mu
	free     []int                           // guarded by mu
	wildcard [envoy.Types]members            // guarded by mu
	named    [envoy.Types]map[string]members // guarded by mu
	next     int                             // slot that some looks at first; guarded by mu
}

// members is a set of slots.
type members []uint64

const wordBits = bits.UintSize

func (m members) with(slot int) members {
	for len(m) <= slot/wordBits {
		m = append(m, 0)
	}
	m[slot/wordBits] |= 1 << (slot % wordBits)
	return m
}

// without takes a slot out and cuts what is empty at the end.
func (m members) without(slot int) members {
	if slot/wordBits < len(m) {
		m[slot/wordBits] &^= 1 << (slot % wordBits)
	}
	for len(m) > 0 && m[len(m)-1] == 0 {
		m = m[:len(m)-1]
	}
	return m
}

// join gives a stream its slot.
func (a *audience) join(st *stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := len(a.free); n > 0 {
		st.slot, a.free = a.free[n-1], a.free[:n-1]
	} else {
		st.slot = len(a.slots)
		a.slots = append(a.slots, nil)
	}
	a.slots[st.slot] = st
}

// leave takes a stream out; names are what it has subscribed to.
func (a *audience) leave(st *stream, names func(envoy.Type) []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for t := range envoy.Types {
		a.wildcard[t] = a.wildcard[t].without(st.slot)
		for _, name := range names(t) {
			a.drop(t, name, st.slot)
		}
	}
	a.slots[st.slot] = nil
	a.free = append(a.free, st.slot)
}

// subscribe notes what a stream has asked for, before it is answered.
func (a *audience) subscribe(st *stream, t envoy.Type, names []string, all bool) {
	if len(names) == 0 && !all {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if all {
		a.wildcard[t] = a.wildcard[t].with(st.slot)
	}
	if t == envoy.VirtualHost { // from then on it looks at every change of routes
		a.wildcard[t] = a.wildcard[t].with(st.slot)
		return
	}
	if a.named[t] == nil {
		a.named[t] = map[string]members{}
	}
	for _, name := range names {
		if name == wildcardName {
			continue
		}
		m, ok := a.named[t][name]
		if !ok {
			name = strings.Clone(name) // it may be a part of something large
		}
		a.named[t][name] = m.with(st.slot)
	}
}

// unsubscribe notes what a stream does not ask for any more.
func (a *audience) unsubscribe(st *stream, t envoy.Type, names []string) {
	if len(names) == 0 || t == envoy.VirtualHost {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range names {
		if name == wildcardName {
			a.wildcard[t] = a.wildcard[t].without(st.slot)
		} else {
			a.drop(t, name, st.slot)
		}
	}
}

// drop takes a slot out of a name's members. a.mu is held.
func (a *audience) drop(t envoy.Type, name string, slot int) {
	m, ok := a.named[t][name]
	if !ok {
		return
	}
	if m = m.without(slot); len(m) > 0 {
		a.named[t][name] = m
	} else {
		delete(a.named[t], name)
	}
}

// of lists the streams that a change of some resources concerns, each once.
func (a *audience) of(names []envoy.Name) (out []*stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make(members, (len(a.slots)+wordBits-1)/wordBits)
	var whole [envoy.Types]bool
	for _, n := range names {
		if !whole[n.Type] {
			whole[n.Type] = true
			all.add(a.wildcard[n.Type])
			if n.Type == envoy.Route {
				all.add(a.wildcard[envoy.VirtualHost])
			}
		}
		all.add(a.named[n.Type][n.Name])
	}
	for i, word := range all {
		for ; word != 0; word &= word - 1 {
			out = append(out, a.slots[i*wordBits+bits.TrailingZeros64(word)])
		}
	}
	return out
}

func (m members) add(o members) {
	for i, word := range o {
		m[i] |= word
	}
}

// some lists one in n streams, all of them in n calls.
func (a *audience) some(n int) (out []*stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for range (len(a.slots) + n - 1) / n {
		if a.next++; a.next >= len(a.slots) {
			a.next = 0
		}
		if st := a.slots[a.next]; st != nil {
			out = append(out, st)
		}
	}
	return out
}
