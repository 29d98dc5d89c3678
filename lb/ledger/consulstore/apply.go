package consulstore

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

const (
	// newerOperations and olderOperations bound a transaction.
	newerOperations = 128
	olderOperations = 64
	// ownOperations are those that every transaction begins with, at most: the
	// session, the generation, the format and that nobody restores.
	ownOperations = 4
	// maxBytes of JSON become less than the 512 KB that Consul takes, with keys
	// and in base64; minBytes is where a smaller batch no longer helps.
	maxBytes = 256 << 10
	minBytes = 16 << 10
)

// Limit is what one batch may hold.
func (s *Store) Limit() ledger.Limit {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.limit
}

// Apply writes a batch in one transaction. The error wraps ledger.ErrConflict,
// ledger.ErrSessionLost, ledger.ErrLost or ledger.ErrTooLarge. After another
// error the batch may have been written all the same, when only the answer was
// lost: the next Apply then meets ErrConflict.
func (s *Store) Apply(ctx context.Context, b ledger.Batch) error {
	session, err := s.ensure(ctx)
	if err != nil {
		return err
	}
	p, err := s.plan(b, session)
	if err != nil {
		return err
	}
	results, err := s.transact(ctx, session, p.ops)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.generation == b.After { // else a Load has been faster
		for _, key := range p.gone {
			delete(s.entries, key)
		}
		for key, e := range p.fresh {
			e.index = results[key]
			s.entries[key] = e
		}
		s.generation = b.Generation
	}
	s.seen = max(s.seen, b.Generation)
	return nil
}

// plan is a transaction and what it changes.
type plan struct {
	s     *Store
	ops   api.TxnOps
	fresh map[string]entry
	gone  []string
}

// plan makes a batch into operations. Each key is written only where it still is
// as it was read.
func (s *Store) plan(b ledger.Batch, session string) (*plan, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.loaded || s.generation != b.After || b.Generation <= b.After {
		return nil, s.fail(generationKey, fmt.Errorf("generation %d after %d does not follow %d: %w", b.Generation, b.After, s.generation, ledger.ErrConflict))
	}
	p := &plan{s: s, fresh: map[string]entry{}}
	p.op(api.KVCheckSession, replicaKey(s.config.Name), nil, 0).Session = session
	head := p.count(b)
	if err := p.put(generationKey, head, nil); err != nil {
		return nil, err
	}
	_, old := s.entries[formatKey]
	p.set(formatKey, []byte(format), nil)
	if !old {
		p.op(api.KVCheckNotExists, restoringKey, nil, 0)
	}
	for _, a := range b.Delete {
		if r, ok := s.entries[addresses+a.String()].item.(ledger.Record); ok {
			p.del(addressKey(r))
			p.del(ownerKey(r))
		}
	}
	for _, r := range b.Put {
		if old, ok := s.entries[ownerKey(r)]; ok && string(old.value) != r.Address.String() {
			return nil, s.fail(ownerKey(r), fmt.Errorf("%s has %s and cannot have %s, too", r.Owner, old.value, r.Address))
		}
		if old, ok := s.entries[addressKey(r)].item.(ledger.Record); ok && old.Owner != r.Owner {
			return nil, s.fail(addressKey(r), fmt.Errorf("it belongs to %s, not to %s", old.Owner, r.Owner))
		}
		if err := p.put(addressKey(r), r, r); err != nil {
			return nil, err
		}
		p.set(ownerKey(r), []byte(r.Address.String()), nil)
	}
	return p, p.rest(b)
}

func (p *plan) rest(b ledger.Batch) error {
	var errs []error
	for _, o := range b.DelObjects {
		p.del(serviceKey(o))
	}
	for _, o := range b.PutObjects {
		errs = append(errs, p.put(serviceKey(o.Owner), o, o))
	}
	for _, k := range b.DelMarks {
		p.del(markKey(k))
	}
	for _, m := range b.PutMarks {
		errs = append(errs, p.put(markKey(m.Key()), m, m))
	}
	return errors.Join(errs...)
}

// count is the head that the batch leaves.
func (p *plan) count(b ledger.Batch) head {
	h := head{Generation: b.Generation}
	if e, ok := p.s.entries[generationKey]; ok {
		var old head
		if json.Unmarshal(e.value, &old) == nil { // it was read or written as JSON
			h.Records, h.Objects, h.Marks = old.Records, old.Objects, old.Marks
		}
	}
	change := func(n *int, key string, by int) {
		if _, there := p.s.entries[key]; there == (by < 0) {
			*n += by
		}
	}
	for _, a := range b.Delete {
		change(&h.Records, addresses+a.String(), -1)
	}
	for _, r := range b.Put {
		change(&h.Records, addressKey(r), +1)
	}
	for _, o := range b.DelObjects {
		change(&h.Objects, serviceKey(o), -1)
	}
	for _, o := range b.PutObjects {
		change(&h.Objects, serviceKey(o.Owner), +1)
	}
	for _, k := range b.DelMarks {
		change(&h.Marks, markKey(k), -1)
	}
	for _, m := range b.PutMarks {
		change(&h.Marks, markKey(m.Key()), +1)
	}
	return h
}

func (p *plan) op(verb api.KVOp, key string, value []byte, index uint64) *api.KVTxnOp {
	op := &api.KVTxnOp{Verb: verb, Key: p.s.config.Prefix + key, Value: value, Index: index}
	p.ops = append(p.ops, &api.TxnOp{KV: op})
	return op
}

// set writes a key that is as it was read, or not there. A value that stays is
// only checked, because writing it would not change its index.
func (p *plan) set(key string, value []byte, item any) {
	old, ok := p.s.entries[key]
	if ok && string(old.value) == string(value) {
		p.op(api.KVCheckIndex, key, nil, old.index)
	} else {
		p.op(api.KVCAS, key, value, old.index)
	}
	p.fresh[key] = entry{value: value, item: item}
}

func (p *plan) put(key string, v, item any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return p.s.fail(key, err)
	}
	p.set(key, data, item)
	return nil
}

func (p *plan) del(key string) {
	if old, ok := p.s.entries[key]; ok {
		p.op(api.KVDeleteCAS, key, nil, old.index)
		p.gone = append(p.gone, key)
	}
}

// transact runs operations of which the first checks the session, and returns
// the keys' new indexes.
func (s *Store) transact(ctx context.Context, session string, ops api.TxnOps) (map[string]uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	o := (&api.QueryOptions{Token: s.token()}).WithContext(ctx)
	ok, answer, _, err := s.client.Txn().Txn(ops, o)
	if err != nil {
		return nil, s.tooLarge(ops, err)
	}
	if !ok {
		return nil, s.refused(ctx, session, ops, answer.Errors)
	}
	indexes := make(map[string]uint64, len(ops))
	for _, r := range answer.Results {
		if r.KV != nil {
			indexes[strings.TrimPrefix(r.KV.Key, s.config.Prefix)] = r.KV.ModifyIndex
		}
	}
	return indexes, nil
}

// tooLarge lowers the limit when that is what the server complains about.
func (s *Store) tooLarge(ops api.TxnOps, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	many := strings.Contains(err.Error(), "too many operations")
	switch {
	case many && len(ops) > olderOperations:
		s.limit.Operations = olderOperations - ownOperations
		return s.fail("", fmt.Errorf("%w: %w", ledger.ErrTooLarge, err))
	case many, !strings.Contains(err.Error(), "too large"):
		return s.fail(generationKey, err)
	}
	largest := slices.MaxFunc(ops, func(a, b *api.TxnOp) int { return cmp.Compare(len(a.KV.Value), len(b.KV.Value)) })
	if s.limit.Bytes > max(minBytes, len(largest.KV.Value)) {
		s.limit.Bytes /= 2
	}
	return s.fail(strings.TrimPrefix(largest.KV.Key, s.config.Prefix), fmt.Errorf("%w: %w", ledger.ErrTooLarge, err))
}

// refused says why a transaction was rolled back: first what no retry mends.
func (s *Store) refused(ctx context.Context, session string, ops api.TxnOps, errs api.TxnErrors) error {
	if len(errs) == 0 {
		return s.fail("", errors.New("the transaction was refused without a reason"))
	}
	key := func(e *api.TxnError) string {
		return strings.TrimPrefix(ops[e.OpIndex].KV.Key, s.config.Prefix)
	}
	for _, e := range errs {
		if strings.Contains(e.What, denied) {
			return s.fail(key(e), errors.New(e.What))
		}
	}
	cause := ledger.ErrConflict
	if errs[0].OpIndex == 0 {
		cause = ledger.ErrSessionLost
		s.forget(session)
	}
	err := fmt.Errorf("%w: %s", cause, errs[0].What)
	s.mu.Lock()
	seen := s.seen
	s.mu.Unlock()
	if now, _, look := s.readHead(ctx, 0); look == nil && now < seen {
		err = fmt.Errorf("%w: generation %d was seen, now it is %d: %w", ledger.ErrLost, seen, now, err)
	}
	return s.fail(key(errs[0]), err)
}
