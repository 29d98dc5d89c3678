package xds

import (
	"slices"
	"sync"
)

// tracker knows how far the slowest stream is, without looking at all of them:
// it counts those that owe something at each published version. A stream that
// has settled the last World that concerned it has settled all newer ones, too.
type tracker struct {
	mu       sync.Mutex
	versions []uint64 // published, from the oldest that a stream is still at; guarded by mu
	pushed   []int    // streams that have been sent everything up to that version, and no more; guarded by mu
	acked    []int    // streams that have settled everything up to it, and no more; guarded by mu
	streams  int      // guarded by mu
}

// position is how far a stream is, in World versions.
type position struct{ pushed, acked uint64 }

// mark is a stream's place in the tracker, which guards it.
type mark struct {
	position
	owes uint64 // the newest version that concerns the stream
	busy bool   // it has not settled that one: its position is counted
}

// publish adds a version that concerns some streams.
func (t *tracker) publish(version uint64, concerned ...*mark) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := uint64(0)
	if n := len(t.versions); n > 0 {
		before = t.versions[n-1]
	}
	t.versions = append(t.versions, version)
	t.pushed = append(t.pushed, 0)
	t.acked = append(t.acked, 0)
	for _, m := range concerned {
		m.owes = version
		if !m.busy {
			m.busy, m.position = true, position{before, before}
			t.count(m, 1)
		}
	}
	t.trim()
}

// join adds a stream that starts at the newest version.
func (t *tracker) join() *mark {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.streams++
	return &mark{}
}

func (t *tracker) leave(m *mark) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.streams--
	if m.busy {
		m.busy = false
		t.count(m, -1)
		t.trim()
	}
}

// move notes a stream's progress, which never goes back, and says whether it had
// anything to settle.
func (t *tracker) move(m *mark, to position) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !m.busy {
		return false
	}
	t.count(m, -1)
	m.position = position{max(m.pushed, to.pushed), max(m.acked, to.acked)}
	if m.busy = m.acked < m.owes; m.busy {
		t.count(m, 1)
	}
	t.trim()
	return true
}

func (t *tracker) count(m *mark, by int) {
	t.pushed[t.slot(m.pushed)] += by
	t.acked[t.slot(m.acked)] += by
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

// behind says that a stream has not settled everything up to a version.
func (t *tracker) behind(m *mark, version uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.busy {
		return m.acked < version
	}
	return len(t.versions) == 0 || t.versions[len(t.versions)-1] < version
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
