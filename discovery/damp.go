package discovery

import "time"

// An instance that changes more often than it may flaps, until it has been quiet
// for a while: its changes are then taken together with others of its service.
// What flaps costs everybody who holds it; what is steady does not wait for it.
const (
	flapBurst = 5                      // changes that an instance may make at once
	flapEvery = 2 * time.Second        // and how often it may in the long run
	dampEvery = 500 * time.Millisecond // how often a service changes for what flaps
)

// damper knows which instances flap: those that have changed lately.
type damper map[instanceID]flaps

type flaps struct {
	left     float64 // changes, as of at
	at       time.Time
	flapping bool
}

// steady notes a change of an instance and says whether it may be told at once.
func (d damper) steady(id instanceID, now time.Time) bool {
	f, ok := d[id]
	if !ok {
		f = flaps{left: flapBurst}
	} else {
		f = f.now(now)
	}
	f.at = now
	if f.left < 1 {
		f.flapping = true
	} else {
		f.left--
	}
	d[id] = f
	return !f.flapping
}

func (f flaps) now(now time.Time) flaps {
	f.left = min(f.left+now.Sub(f.at).Seconds()/flapEvery.Seconds(), flapBurst)
	f.flapping = f.flapping && f.left < flapBurst
	return f
}

// forget drops what says nothing any more.
func (d damper) forget(now time.Time) {
	for id, f := range d {
		if f = f.now(now); f.left >= flapBurst {
			delete(d, id)
		}
	}
}

// note notes that an instance has changed, and with it its service. One that comes
// for the first time has not changed before.
func (m *merge) note(i *Instance, t touched, came bool) {
	id := idOf(i)
	if _, known := m.damp[id]; m.damp != nil && (known || !came) && !m.damp.steady(id, m.now()) {
		if _, dirty := m.dirty[i.Key]; !dirty {
			m.late[i.Key] = true
		}
		m.dirty[i.Key] = t
		return
	}
	m.touch(i.Key, t)
}

// waits says whether a dirty service has changed for what flaps alone, and that not
// long ago.
func (m *merge) waits(k Key, now time.Time) bool {
	return m.late[k] && now.Sub(m.told[k]) < dampEvery
}

// overdue says that a service which had to wait is to be told now. It also forgets
// what nobody needs.
func (m *merge) overdue(now time.Time) bool {
	m.damp.forget(now)
	for k, at := range m.told {
		if now.Sub(at) >= dampEvery && !m.late[k] {
			delete(m.told, k)
		}
	}
	for k := range m.late {
		if !m.waits(k, now) {
			return true
		}
	}
	return false
}
