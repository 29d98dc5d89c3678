package consulstore

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

// Restore writes a whole state into a prefix that has lost it; see
// ledger.Shared. It is one writer's work: format and generation go first and come
// back last, and without them nobody takes what is there for a ledger or adds to
// it. One that dies on the way is followed by the next, once its session has ended.
func (s *Store) Restore(ctx context.Context, state ledger.State) error {
	session, err := s.ensure(ctx)
	if err != nil {
		return err
	}
	pairs, err := s.list(ctx)
	if err != nil {
		return err
	}
	r, err := s.restoration(pairs, session)
	if err != nil {
		return err
	}
	if err := r.begin(ctx); err != nil {
		return err
	}
	want, err := s.wanted(state)
	if err != nil {
		return err
	}
	if err := r.fill(ctx, want); err != nil {
		return err
	}
	if err := r.end(ctx, want); err != nil {
		return err
	}
	s.mu.Lock()
	s.seen = max(s.seen, state.Generation)
	s.mu.Unlock()
	_, err = s.Load(ctx)
	return err
}

// wanted are the keys and values of a state.
func (s *Store) wanted(state ledger.State) (map[string][]byte, error) {
	values := map[string]any{generationKey: head{state.Generation, len(state.Records), len(state.Objects), len(state.Marks)}}
	want := map[string][]byte{formatKey: []byte(format)}
	for _, r := range state.Records {
		values[addressKey(r)] = r
		want[ownerKey(r)] = []byte(r.Address.String())
	}
	for _, o := range state.Objects {
		values[serviceKey(o.Owner)] = o
	}
	for _, m := range state.Marks {
		values[markKey(m.Key())] = m
	}
	for key, v := range values {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, s.fail(key, err)
		}
		want[key] = data
	}
	return want, nil
}

// restoration writes a lost ledger again.
type restoration struct {
	plan
	session string
	found   map[string]entry // what the prefix had
	claim   uint64           // index of the restoring key, once it is ours
}

// claimant is the value of the restoring key.
type claimant struct {
	Replica string `json:"replica"`
	Session string `json:"session"`
}

// restoration looks whether there is something to restore. A ledger that is
// whole and not older than what was seen is left alone, and so are another
// replica at work and another program's keys.
func (s *Store) restoration(pairs api.KVPairs, session string) (*restoration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, err := s.parse(pairs)
	if err != nil {
		return nil, err
	}
	if e, ok := c.entries[restoringKey]; ok {
		var other claimant
		if err := json.Unmarshal(e.value, &other); err != nil {
			return nil, s.fail(restoringKey, fmt.Errorf("it is damaged: %w; delete the key", err))
		}
		if alive := c.alive[replicaKey(other.Replica)]; alive != nil && alive.Session == other.Session && other.Session != session {
			return nil, s.fail(restoringKey, fmt.Errorf("%s is writing the ledger again: %w", other.Replica, ledger.ErrConflict))
		}
	} else if len(c.entries) > 0 {
		if err := s.whole(c, s.seen); err == nil {
			return nil, s.fail(generationKey, fmt.Errorf("there is a whole ledger of generation %d: %w", c.head.Generation, ledger.ErrConflict))
		} else if s.seen == 0 || c.head.Generation > s.seen {
			return nil, err
		}
	}
	return &restoration{plan: plan{s: s}, session: session, found: c.entries}, nil
}

// begin claims the work: from here on nobody finds a ledger.
func (r *restoration) begin(ctx context.Context) error {
	value, err := json.Marshal(claimant{r.s.config.Name, r.session})
	if err != nil {
		return err
	}
	r.start(false)
	r.op(api.KVCAS, restoringKey, value, r.found[restoringKey].index)
	for _, key := range []string{formatKey, generationKey} {
		if e, ok := r.found[key]; ok {
			r.op(api.KVCheckIndex, key, nil, e.index)
			r.op(api.KVDelete, key, nil, 0)
		} else {
			r.op(api.KVCheckNotExists, key, nil, 0)
		}
	}
	indexes, err := r.s.transact(ctx, r.session, r.ops)
	r.claim = indexes[restoringKey]
	return err
}

// start begins the next transaction, which only the living claimant can make.
func (r *restoration) start(claimed bool) {
	r.ops = nil
	r.op(api.KVCheckSession, replicaKey(r.s.config.Name), nil, 0).Session = r.session
	if claimed {
		r.op(api.KVCheckIndex, restoringKey, nil, r.claim)
	}
}

// fill deletes what is not wanted and writes the rest, but for the keys that
// make it a ledger.
func (r *restoration) fill(ctx context.Context, want map[string][]byte) error {
	keys := map[string]bool{}
	for key := range r.found {
		keys[key] = true
	}
	for key := range want {
		keys[key] = true
	}
	for _, key := range []string{formatKey, generationKey, restoringKey} {
		delete(keys, key)
	}
	r.start(true)
	size := 0
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		value, wanted := want[key]
		e, there := r.found[key]
		switch {
		case wanted && there && bytes.Equal(e.value, value):
			continue
		case wanted:
			r.op(api.KVSet, key, value, 0)
		default:
			r.op(api.KVDelete, key, nil, 0)
		}
		// Half of an older server's bound: what is written here is not written often.
		if size += len(key) + len(value); len(r.ops) >= olderOperations-ownOperations || size > maxBytes/2 {
			if _, err := r.s.transact(ctx, r.session, r.ops); err != nil {
				return err
			}
			r.start(true)
			size = 0
		}
	}
	_, err := r.s.transact(ctx, r.session, r.ops)
	return err
}

// end makes it a ledger again.
func (r *restoration) end(ctx context.Context, want map[string][]byte) error {
	r.start(true)
	r.op(api.KVDelete, restoringKey, nil, 0)
	r.op(api.KVCAS, formatKey, want[formatKey], 0)
	r.op(api.KVCAS, generationKey, want[generationKey], 0)
	_, err := r.s.transact(ctx, r.session, r.ops)
	return err
}
