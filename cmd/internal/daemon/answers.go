package daemon

import (
	"encoding/json"
	"time"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
)

// How long DNS answers may be kept outlives the process that gave them, and the
// config that said so: a TTL that is longer than the quarantine is written down
// as a mark before the first answer has it. It goes when all answers with it have
// expired. A TTL within the quarantine, which is what nearly everybody has, needs
// no mark: the quarantine alone waits long enough.

// answersKey is the mark of the longest TTL of answers that may still be kept.
var answersKey = ledger.MarkKey{Kind: ledger.MarkTTL, Name: "answers"}

// keptAnswers is the TTL that the ledger names; 0 is none.
func (r *reconciler) keptAnswers() time.Duration {
	var seconds float64
	if m, ok := r.d.ledger.Mark(answersKey); ok && json.Unmarshal(m.Data, &seconds) == nil {
		return time.Duration(seconds * float64(time.Second))
	}
	return 0
}

// longAnswers is the TTL of now where it is to be written down, else 0.
func (r *reconciler) longAnswers() time.Duration {
	if ttl := r.config.Model.TTL; ttl+ttlMargin > r.config.Quarantine {
		return ttl
	}
	return 0
}

// recordAnswers stages a TTL that is longer than what the ledger names, and has
// the quarantine wait for what it names.
func (r *reconciler) recordAnswers() {
	kept, now := r.keptAnswers(), r.longAnswers()
	r.quarantine.ttl = max(r.quarantine.ttl, kept)
	if now > kept {
		r.stage(func(tx *ledger.Tx) { putAnswers(tx, now) })
	}
}

func putAnswers(tx *ledger.Tx, ttl time.Duration) {
	if ttl == 0 {
		tx.DeleteMark(answersKey)
		return
	}
	if data, err := json.Marshal(ttl.Seconds()); err == nil { // a number always can be
		tx.PutMark(ledger.Mark{Kind: answersKey.Kind, Name: answersKey.Name, Data: data})
	}
}

// model is what a Snapshot is built by: while a long TTL cannot be written down,
// answers have the longest one that needs no more.
// It keeps its pointer while it is the same.
func (r *reconciler) model() *lb.Config {
	kept := r.keptAnswers()
	if r.longAnswers() <= kept {
		return r.config.Model
	}
	ttl := max(kept, r.config.Quarantine-ttlMargin, 0)
	if r.shortened.of != r.config.Model || r.shortened.model.TTL != ttl {
		model := *r.config.Model
		model.TTL = ttl
		r.shortened = shortened{of: r.config.Model, model: &model}
	}
	return r.shortened.model
}

// shortened is a config whose answers live for less long than its file says.
type shortened struct{ of, model *lb.Config }

// forgetAnswers stages the end of a TTL that has been out of use for so long that
// no answer with it is left, and says whether it has.
func (r *reconciler) forgetAnswers() bool {
	kept, now := r.keptAnswers(), r.longAnswers()
	if kept <= now || r.quarantine.from.IsZero() {
		return false
	}
	since := r.shorter
	if r.quarantine.from.After(since) {
		since = r.quarantine.from
	}
	if r.now().Sub(since) < kept+ttlMargin {
		return false
	}
	r.stage(func(tx *ledger.Tx) { putAnswers(tx, now) })
	return true
}
