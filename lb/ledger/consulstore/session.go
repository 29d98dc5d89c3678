package consulstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

// lockDelay is how long a key stays closed after its session was destroyed. 0
// would mean Consul's own 15 s; a replica is to come back at once.
const lockDelay = time.Millisecond

// renewals is how often in a TTL the session is renewed.
const renewals = 3

// replica is the value of a replica's key.
type replica struct {
	ledger.Replica
	Identity string `json:"identity,omitempty"`
}

// Announce tells the others of this replica; see ledger.Shared. Its name is that
// of the Config.
func (s *Store) Announce(ctx context.Context, r ledger.Replica) error {
	r.Name = s.config.Name
	s.mu.Lock()
	if r.Since.IsZero() {
		r.Since = s.self.Since
	}
	s.self.Replica = r
	session := s.session
	s.mu.Unlock()
	if session != "" {
		err := s.lock(ctx, session)
		if !errors.Is(err, ledger.ErrSessionLost) && !errors.Is(err, ledger.ErrLocked) {
			return err
		}
		s.forget(session)
	}
	_, err := s.ensure(ctx)
	return err
}

// ensure returns the session that holds the replica's key, a new one if need be.
func (s *Store) ensure(ctx context.Context) (string, error) {
	s.joining.Lock()
	defer s.joining.Unlock()
	s.mu.Lock()
	session := s.session
	if s.self.Since.IsZero() {
		s.self.Since = s.config.Now().UTC()
	}
	s.mu.Unlock()
	if session != "" {
		return session, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	session, _, err := s.client.Session().CreateNoChecks(&api.SessionEntry{
		Name: "roost " + s.config.Name, LockDelay: lockDelay, Behavior: api.SessionBehaviorDelete, TTL: s.config.TTL.String(),
	}, s.write(ctx))
	if err != nil {
		return "", s.fail(replicaKey(s.config.Name), fmt.Errorf("session: %w", err))
	}
	if err := s.take(ctx, session); err != nil {
		_, _ = s.client.Session().Destroy(session, s.write(ctx)) // it ends by itself, too
		return "", err
	}
	s.mu.Lock()
	s.session = session
	s.mu.Unlock()
	return session, nil
}

// take acquires the replica's key, if need be from this replica's own former
// life.
func (s *Store) take(ctx context.Context, session string) error {
	err := s.lock(ctx, session)
	if !errors.Is(err, ledger.ErrLocked) {
		return err
	}
	key := replicaKey(s.config.Name)
	o, cancel := s.query(ctx, 0)
	defer cancel()
	pair, _, look := s.client.KV().Get(s.config.Prefix+key, o)
	if look != nil {
		return s.fail(key, look)
	}
	if pair != nil && pair.Session != "" {
		var other replica
		if json.Unmarshal(pair.Value, &other) != nil || other.Identity == "" || other.Identity != s.config.Identity {
			return s.fail(key, fmt.Errorf("%w: a replica of this name is alive since %s; give this one another name, or wait %s if that one has crashed", ledger.ErrLocked, other.Since.Format(time.RFC3339), 2*s.config.TTL))
		}
		if _, err := s.client.Session().Destroy(pair.Session, s.write(ctx)); err != nil {
			return s.fail(key, err)
		}
	}
	return s.afterDelay(ctx, session)
}

// afterDelay acquires a key whose last session has just ended.
func (s *Store) afterDelay(ctx context.Context, session string) error {
	tick := time.NewTicker(10 * lockDelay)
	defer tick.Stop()
	for {
		err := s.lock(ctx, session)
		if !errors.Is(err, errLockDelay) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

var errLockDelay = fmt.Errorf("%w: its last session has just ended", ledger.ErrLocked)

// lock writes the replica's key and holds it with the session. The error wraps
// ErrLocked or ErrSessionLost.
func (s *Store) lock(ctx context.Context, session string) error {
	key := replicaKey(s.config.Name)
	s.mu.Lock()
	data, err := json.Marshal(s.self)
	s.mu.Unlock()
	if err != nil {
		return s.fail(key, err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	op := &api.KVTxnOp{Verb: api.KVLock, Key: s.config.Prefix + key, Value: data, Session: session}
	o := (&api.QueryOptions{Token: s.token()}).WithContext(ctx)
	ok, answer, _, err := s.client.Txn().Txn(api.TxnOps{{KV: op}}, o)
	switch {
	case err != nil:
		return s.fail(key, err)
	case ok:
		return nil
	case len(answer.Errors) == 0:
		return s.fail(key, ledger.ErrLocked)
	}
	what := answer.Errors[0].What
	switch {
	case strings.Contains(what, "invalid session"):
		return s.fail(key, fmt.Errorf("%w: %s", ledger.ErrSessionLost, what))
	case strings.Contains(what, "lock delay"):
		return s.fail(key, errLockDelay)
	case strings.Contains(what, "already held"):
		return s.fail(key, fmt.Errorf("%w: %s", ledger.ErrLocked, what))
	}
	return s.fail(key, errors.New(what))
}

// forget gives a session up that no longer holds the key; the next one to need
// it makes a new one.
func (s *Store) forget(session string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == session {
		s.session = ""
	}
}

// Run keeps the session alive until ctx ends; a lost one is replaced and the
// replica announced again.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(s.config.TTL / renewals)
	defer tick.Stop()
	well := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := s.renew(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && well {
			s.config.Log.Warn("the ledger's session cannot be renewed; changes may be refused until it can", "error", err)
		}
		if err == nil && !well {
			s.config.Log.Info("the ledger's session is well again", "replica", s.config.Name)
		}
		well = err == nil
	}
}

func (s *Store) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.config.TTL/renewals)
	defer cancel()
	s.mu.Lock()
	session := s.session
	s.mu.Unlock()
	if session != "" {
		alive, _, err := s.client.Session().Renew(session, s.write(ctx))
		if err != nil {
			return s.fail(replicaKey(s.config.Name), err)
		}
		if alive != nil {
			// A session that is alive may have lost its key, when the prefix was deleted.
			return s.holdKey(ctx, session)
		}
		s.forget(session)
	}
	_, err := s.ensure(ctx)
	return err
}

func (s *Store) holdKey(ctx context.Context, session string) error {
	key := replicaKey(s.config.Name)
	o, cancel := s.query(ctx, 0)
	defer cancel()
	pair, _, err := s.client.KV().Get(s.config.Prefix+key, o)
	if err != nil {
		return s.fail(key, err)
	}
	if pair != nil && pair.Session == session {
		return nil
	}
	return s.lock(ctx, session)
}

// Replicas lists those that live, by name; see ledger.Shared.
func (s *Store) Replicas(ctx context.Context, index uint64) ([]ledger.Replica, uint64, error) {
	for {
		list, at, err := s.replicas(ctx, index)
		if err != nil || at != index {
			return list, at, err
		}
	}
}

func (s *Store) replicas(ctx context.Context, index uint64) ([]ledger.Replica, uint64, error) {
	o, cancel := s.query(ctx, index)
	defer cancel()
	pairs, meta, err := s.client.KV().List(s.config.Prefix+replicas, o)
	if err != nil {
		return nil, 0, s.fail(replicas, err)
	}
	var out []ledger.Replica
	for _, p := range pairs {
		if p.Session == "" {
			continue // written by hand: nobody lives there
		}
		var r replica
		if err := json.Unmarshal(p.Value, &r); err != nil {
			s.config.Log.Warn("a replica cannot be read", "key", p.Key, "error", err)
			continue
		}
		r.Session, r.ModifyIndex = p.Session, p.ModifyIndex
		out = append(out, r.Replica)
	}
	slices.SortFunc(out, func(a, b ledger.Replica) int { return strings.Compare(a.Name, b.Name) })
	return out, max(meta.LastIndex, 1), nil
}
