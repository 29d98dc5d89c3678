package consul

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
)

// incarnation is what was last seen of the Consul that answers: one that was
// wiped, restored or replaced is another one.
type incarnation struct {
	nodes map[string]bool // NODE/ID/CREATEINDEX
	index uint64          // of the list of nodes
}

// verify looks, at the start, after a failure and when an index has fallen,
// which Consul this is. What is missing from another one than before is held,
// not removed.
func (w *watcher) verify(ctx context.Context) error {
	if !w.s.suspect.Load() && w.which() != "" {
		return nil
	}
	w.verifying.Lock()
	defer w.verifying.Unlock()
	if !w.s.suspect.Load() && w.which() != "" {
		return nil
	}
	// Before the question: what fails while it is asked asks for another look.
	w.s.suspect.Store(false)
	nodes, index, err := w.s.nodes(ctx)
	if err != nil {
		w.s.suspect.Store(true)
		return err
	}
	now := incarnation{nodes: map[string]bool{}, index: index}
	for _, n := range nodes {
		now.nodes[n.key()] = true
	}
	was := w.which()
	same := now.continues(w.last)
	w.last = now
	if was != "" && same {
		return nil
	}
	is := identityOf(nodes)
	if is == was { // the same nodes, and yet an older state
		is = fmt.Sprintf("%s@%d", is, index)
	}
	w.mu.Lock()
	w.identity = is
	w.mu.Unlock()
	if was != "" {
		w.s.config.Log.Warn("consul has lost its state, or is another one: what it no longer lists is held while it answers", "source", w.s.config.Name, "was", was, "is", is)
	}
	return nil
}

// continues tells whether i is a later state of what was before: one node at
// least is still there, if any is seen, and the index has not fallen.
func (i incarnation) continues(before incarnation) bool {
	if i.index < before.index {
		return false
	}
	if len(i.nodes)+len(before.nodes) == 0 {
		return true // none that this token may see
	}
	for key := range i.nodes {
		if before.nodes[key] {
			return true
		}
	}
	return false
}

// which is the identity of the Consul that answers; "" before it is known.
func (w *watcher) which() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.identity
}

func (n node) key() string { return fmt.Sprintf("%s/%s/%d", n.Node, n.ID, n.CreateIndex) }

// identityOf is the oldest node of a catalog with the index at which it was
// made: a Consul that was wiped makes its nodes anew.
func identityOf(nodes []node) string {
	if len(nodes) == 0 {
		return "no nodes"
	}
	return slices.MinFunc(nodes, func(a, b node) int {
		return cmp.Or(cmp.Compare(a.CreateIndex, b.CreateIndex), strings.Compare(a.Node, b.Node))
	}).key()
}
