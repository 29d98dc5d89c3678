package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"
)

// incarnation is what was last seen of the Consul that answers: one that was
// wiped, restored or replaced is another one.
type incarnation struct {
	nodes map[string]bool // NODE/ID/CREATEINDEX
	index uint64          // of the list of nodes
	// limited says that the token may not see all nodes: that one of them is not
	// there proves nothing.
	limited bool
}

// verify looks, at the start, after a failure and when an index has fallen,
// which Consul this is. What is missing from another one than before is held,
// not removed. errAskAgain: the answer that the caller has may be the former one's.
func (w *watcher) verify(ctx context.Context, from cursor) error {
	if w.s.suspicions.Load() != w.verified.Load() {
		if err := w.identify(ctx); err != nil {
			return err
		}
	}
	if from.ended() {
		return errAskAgain
	}
	return nil
}

// verifyAnswer is verify for the answer of one service. One that is older than
// what is known is not used: a server that lags, or that reads its log after a
// restart, has lost nothing. The newest state is asked for, and stands.
func (w *watcher) verifyAnswer(ctx context.Context, sv *service, from cursor, meta *api.QueryMeta) error {
	sv.busy.Lock()
	older := meta.LastIndex < sv.index
	sv.busy.Unlock()
	if older {
		w.s.suspicions.Add(1)
	}
	if err := w.verify(ctx, from); err != nil {
		return err
	}
	if older && !from.consistent {
		return errAskAgain
	}
	return nil
}

func (w *watcher) identify(ctx context.Context) error {
	w.verifying.Lock()
	defer w.verifying.Unlock()
	// Before the question: what fails while it is asked asks for another look. It is
	// settled only after the answer: whoever has one meanwhile waits.
	suspicions := w.s.suspicions.Load()
	if suspicions == w.verified.Load() {
		return nil
	}
	was := w.which()
	from := w.s.begin()
	// A server that reads its log after a restart answers with an older state
	// meanwhile. Nothing is compared at the start, which must not need a leader.
	from.consistent = was != ""
	nodes, meta, err := w.s.nodes(ctx, from)
	if err != nil {
		return err
	}
	if len(nodes) == 0 && !meta.ResultsFilteredByACLs {
		return errNoNode
	}
	defer w.verified.Store(suspicions)
	now := incarnation{nodes: map[string]bool{}, index: meta.LastIndex, limited: meta.ResultsFilteredByACLs}
	for _, n := range nodes {
		now.nodes[n.key()] = true
	}
	same := now.continues(w.last)
	w.last = now
	named := was == hiddenNodes && len(nodes) > 0
	if was != "" && same && !named {
		return nil
	}
	is := identityOf(nodes)
	if is == was && is != hiddenNodes { // the same nodes, and yet an older state
		is = fmt.Sprintf("%s@%d", is, meta.LastIndex)
	}
	w.mu.Lock()
	w.identity = is
	w.mu.Unlock()
	if was != "" && !same {
		w.s.askAnew()
		w.s.config.Log.Warn("consul has lost its state, or is another one: what it no longer lists is held while it answers", "source", w.s.config.Name, "was", was, "is", is)
	}
	return nil
}

// errNoNode is a Consul that has not come up yet: its leader enters its own node
// first. It has no instances to tell of, and no name: one that it got now would
// make another Consul of it once it has nodes.
var errNoNode = errors.New("consul lists no node yet, nor does it say that it hides any")

// hiddenNodes is the identity of a Consul of which the token may see no node.
const hiddenNodes = "hidden nodes"

// said is the identity as Updates carry it.
func said(identity string) string {
	if identity == hiddenNodes {
		return "" // it tells nothing from anything
	}
	return identity
}

// continues tells whether i is a later state of what was before: the index has
// not fallen, and one node at least is still there, unless a token hides nodes.
func (i incarnation) continues(before incarnation) bool {
	if i.index < before.index {
		return false
	}
	if i.limited || before.limited {
		return true
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
		return hiddenNodes
	}
	return slices.MinFunc(nodes, func(a, b node) int {
		return cmp.Or(cmp.Compare(a.CreateIndex, b.CreateIndex), strings.Compare(a.Node, b.Node))
	}).key()
}
