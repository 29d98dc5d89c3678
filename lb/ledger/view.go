package ledger

import (
	"net/netip"
	"slices"
	"sync/atomic"
)

// maxSteps bounds how many changes wait for a reader.
const maxSteps = 256

// view is an immutable list of records that is made when somebody looks: a
// change costs what changed, not what there is.
type view struct {
	list  atomic.Pointer[[]Record]
	step  atomic.Pointer[step] // nil once the list is made
	depth int                  // how many steps it can be from a made list
}

// step says how a view differs from the one before; nil is a record that is gone.
type step struct {
	base    *view
	changed map[netip.Addr]*Record
}

func newView(records []Record) *view {
	slices.SortFunc(records, byAddress)
	v := &view{}
	v.list.Store(&records)
	return v
}

// with returns the next view.
func (v *view) with(changed map[netip.Addr]*Record) *view {
	if v.depth >= maxSteps {
		v.records()
	}
	next := &view{depth: 1}
	if v.step.Load() != nil {
		next.depth = v.depth + 1
	}
	next.step.Store(&step{v, changed})
	return next
}

// records may be called by several goroutines at once: they make the same list.
func (v *view) records() []Record {
	changed, at := map[netip.Addr]*Record{}, v
	for {
		s := at.step.Load()
		if s == nil {
			break // its list was stored before its step was taken away
		}
		for a, r := range s.changed {
			if _, newer := changed[a]; !newer {
				changed[a] = r
			}
		}
		at = s.base
	}
	base := *at.list.Load()
	if at == v {
		return base
	}
	list := merge(base, changed)
	v.list.Store(&list)
	v.step.Store(nil)
	return list
}

// merge returns a sorted list with changes, each of which is nil for a record
// that is gone.
func merge(base []Record, changed map[netip.Addr]*Record) []Record {
	list, fresh := make([]Record, 0, len(base)+len(changed)), make([]Record, 0, len(changed))
	for _, r := range changed {
		if r != nil {
			fresh = append(fresh, *r)
		}
	}
	slices.SortFunc(fresh, byAddress)
	for _, r := range base {
		for len(fresh) > 0 && fresh[0].Address.Less(r.Address) {
			list, fresh = append(list, fresh[0]), fresh[1:]
		}
		if _, replaced := changed[r.Address]; !replaced {
			list = append(list, r)
		}
	}
	return append(list, fresh...)
}

func byAddress(a, b Record) int { return a.Address.Compare(b.Address) }
