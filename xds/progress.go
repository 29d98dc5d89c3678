package xds

import (
	"slices"
	"sync"
)

// tracker knows how far the slowest stream is, without looking at all of them:
// it counts the streams at each published version.
type tracker struct {
	mu       sync.Mutex
	versions []uint64 // published, from the oldest that a stream is still at; guarded by mu
	pushed   []int    // streams that have been sent everything up to that version, and no more; guarded by mu
	acked    []int    // streams that have settled everything up to it, and no more; guarded by mu
	streams  int      // guarded by mu
}

// position is how far a stream is, in World versions.
type position struct{ pushed, acked uint64 }

func (t *tracker) publish(version uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.versions = append(t.versions, version)
	t.pushed = append(t.pushed, 0)
	t.acked = append(t.acked, 0)
	t.trim()
}

// join adds a stream that starts at the newest version. The tracker guards the
// position that it returns.
func (t *tracker) join() *position {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.streams++
	last := len(t.versions) - 1
	t.pushed[last]++
	t.acked[last]++
	return &position{t.versions[last], t.versions[last]}
}

func (t *tracker) leave(p *position) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.streams--
	t.pushed[t.slot(p.pushed)]--
	t.acked[t.slot(p.acked)]--
	t.trim()
}

// move notes a stream's progress; it never goes back.
func (t *tracker) move(p *position, to position) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.pushed = t.step(t.pushed, p.pushed, to.pushed)
	p.acked = t.step(t.acked, p.acked, to.acked)
	t.trim()
}

func (t *tracker) step(counts []int, from, to uint64) uint64 {
	if to <= from {
		return from
	}
	i, j := t.slot(from), t.slot(to)
	counts[i]--
	counts[j]++
	return t.versions[j]
}

// slot is the place of the newest version that is not newer than v.
func (t *tracker) slot(v uint64) int {
	i, found := slices.BinarySearch(t.versions, v)
	if found || i == 0 {
		return i
	}
	return i - 1
}

// trim drops the versions that every stream has left behind.
func (t *tracker) trim() {
	n := 0
	for n < len(t.versions)-1 && t.pushed[n] == 0 && t.acked[n] == 0 {
		n++
	}
	t.versions, t.pushed, t.acked = t.versions[n:], t.pushed[n:], t.acked[n:]
}

// settledUpTo is the version that p has settled everything up to.
func (t *tracker) settledUpTo(p *position) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return p.acked
}

func (t *tracker) progress() Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.versions) == 0 {
		return Progress{}
	}
	return Progress{Pushed: t.first(t.pushed), Acked: t.first(t.acked), Proxies: t.streams}
}

func (t *tracker) first(counts []int) uint64 {
	for i, n := range counts {
		if n > 0 {
			return t.versions[i]
		}
	}
	return t.versions[len(t.versions)-1]
}
