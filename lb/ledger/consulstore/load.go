package consulstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

// Load reads the whole ledger at one moment. The error wraps ledger.ErrLost when
// this Store has seen more than there is.
func (s *Store) Load(ctx context.Context) (ledger.State, error) {
	for {
		// What was seen before the read began must be in it.
		s.mu.Lock()
		floor := s.seen
		s.mu.Unlock()
		pairs, err := s.list(ctx)
		if err != nil {
			return ledger.State{}, err
		}
		state, raced, err := s.adopt(pairs, floor)
		if err != nil || !raced {
			return state, err
		}
	}
}

// list reads all keys at one moment.
func (s *Store) list(ctx context.Context) (api.KVPairs, error) {
	o, cancel := s.query(ctx, 0)
	defer cancel()
	pairs, _, err := s.client.KV().List(s.config.Prefix, o)
	if err == nil && len(pairs) == 0 {
		// A token that may read nothing sees an empty list, but is told at a key.
		_, _, err = s.client.KV().Get(s.config.Prefix+formatKey, o)
	}
	if err != nil {
		return nil, s.fail("", err)
	}
	return pairs, nil
}

// adopt takes what was read as what is known. raced says that a batch of our own
// was written after the read.
func (s *Store) adopt(pairs api.KVPairs, floor uint64) (state ledger.State, raced bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, err := s.parse(pairs)
	if err != nil {
		return ledger.State{}, false, err
	}
	if err := s.whole(c, floor); err != nil {
		return ledger.State{}, false, err
	}
	if c.head.Generation < s.seen {
		return ledger.State{}, true, nil
	}
	state = c.state()
	s.loaded, s.entries, s.generation, s.seen = true, c.entries, c.head.Generation, c.head.Generation
	return state, false, nil
}

// contents are the keys of a prefix at one moment.
type contents struct {
	entries map[string]entry
	keys    []string               // of entries, in order
	alive   map[string]*api.KVPair // by key below replicas/
	head    head
}

// parse decodes what has changed since the last read. An unchanged index alone
// does not say so: a Consul that lost its state counts from the start.
func (s *Store) parse(pairs api.KVPairs) (*contents, error) {
	c := &contents{entries: make(map[string]entry, len(pairs)), alive: map[string]*api.KVPair{}}
	// Without a format it is not ours to read.
	ours := slices.ContainsFunc(pairs, func(p *api.KVPair) bool { return p.Key == s.config.Prefix+formatKey && string(p.Value) == format })
	for _, p := range pairs {
		key := strings.TrimPrefix(p.Key, s.config.Prefix)
		if strings.HasPrefix(key, replicas) {
			c.alive[key] = p
			continue
		}
		e, known := s.entries[key]
		if !known || e.index != p.ModifyIndex || !bytes.Equal(e.value, p.Value) {
			e = entry{index: p.ModifyIndex, value: p.Value}
		}
		if ours && e.item == nil {
			var err error
			if e.item, err = decode(key, p.Value); err != nil {
				return nil, s.fail(key, fmt.Errorf("%w; put its old value back, or restore Consul's state from a snapshot", err))
			}
		}
		c.entries[key] = e
		c.keys = append(c.keys, key)
	}
	if e, ok := c.entries[generationKey]; ok && ours {
		if err := json.Unmarshal(e.value, &c.head); err != nil {
			return nil, s.fail(generationKey, fmt.Errorf("it is damaged: %w; put its old value back, or restore Consul's state from a snapshot", err))
		}
	}
	return c, nil
}

// errForeign says that the prefix has keys of somebody else.
var errForeign = errors.New("the prefix has keys but no format: it belongs to another program, or the ledger was deleted in part; set another prefix, or delete all keys below this one")

// whole finds out whether there is a ledger, all of it, or nothing yet.
func (s *Store) whole(c *contents, floor uint64) error {
	lost := func(key string, err error) error {
		// Whoever has seen at least as much can write it again.
		if floor > 0 && c.head.Generation <= floor {
			return s.fail(key, fmt.Errorf("%w: %w", ledger.ErrLost, err))
		}
		return s.fail(key, err)
	}
	if e, ok := c.entries[restoringKey]; ok {
		return s.fail(restoringKey, fmt.Errorf("%w: it is being written again by %s", ledger.ErrLost, e.value))
	}
	f, ok := c.entries[formatKey]
	switch {
	case !ok && len(c.entries) > 0:
		return lost(formatKey, errForeign)
	case !ok && floor > 0:
		return lost(formatKey, fmt.Errorf("all keys are gone, generation %d was seen", floor))
	case !ok:
		return nil
	case string(f.value) != format:
		return s.fail(formatKey, fmt.Errorf("it is %.40q, this roost reads %q: it was written by another version of roost, use that one, or set another prefix", f.value, format))
	case c.head.Generation == 0:
		return lost(generationKey, errors.New("the key is gone; restore Consul's state from a snapshot, or delete all keys below the prefix"))
	case c.head.Generation < floor:
		return lost(generationKey, fmt.Errorf("generation %d was seen, now it is %d", floor, c.head.Generation))
	}
	return c.consistent(lost)
}

// consistent finds keys that somebody deleted or changed by hand.
func (c *contents) consistent(lost func(string, error) error) error {
	var have head
	owned := 0
	for _, key := range c.keys {
		switch item := c.entries[key].item.(type) {
		case ledger.Record:
			have.Records++
			if o, ok := c.entries[ownerKey(item)]; !ok || string(o.value) != item.Address.String() {
				return lost(ownerKey(item), fmt.Errorf("it is %q, while %s says that it is %s", o.value, key, item.Address))
			}
		case ledger.Object:
			have.Objects++
		case ledger.Mark:
			have.Marks++
		default:
			if strings.HasPrefix(key, owners) {
				owned++
			}
		}
	}
	have.Generation = c.head.Generation
	if have != c.head || owned != have.Records {
		return lost("", fmt.Errorf("there are %d records with %d owners, %d services and %d marks, but the last change left %d, %d and %d: somebody deleted keys, or the token may not read all; restore Consul's state from a snapshot", have.Records, owned, have.Objects, have.Marks, c.head.Records, c.head.Objects, c.head.Marks))
	}
	return nil
}

func (c *contents) state() ledger.State {
	s := ledger.State{Generation: c.head.Generation}
	for _, key := range c.keys {
		switch item := c.entries[key].item.(type) {
		case ledger.Record:
			s.Records = append(s.Records, item)
		case ledger.Object:
			s.Objects = append(s.Objects, item)
		case ledger.Mark:
			s.Marks = append(s.Marks, item)
		}
	}
	return s
}

// Watch returns the state as soon as its generation is other than after.
func (s *Store) Watch(ctx context.Context, after uint64) (ledger.State, error) {
	for index := uint64(0); ; {
		generation, at, err := s.readHead(ctx, index)
		if err != nil {
			return ledger.State{}, err
		}
		index = next(index, at)
		if generation == after {
			continue
		}
		if state, err := s.Load(ctx); err != nil || state.Generation != after {
			return state, err
		}
	}
}

// readHead waits for the generation; 0 is none.
func (s *Store) readHead(ctx context.Context, index uint64) (generation, at uint64, err error) {
	o, cancel := s.query(ctx, index)
	defer cancel()
	pair, meta, err := s.client.KV().Get(s.config.Prefix+generationKey, o)
	if err != nil {
		return 0, 0, s.fail(generationKey, err)
	}
	var h head
	if pair != nil {
		if err := json.Unmarshal(pair.Value, &h); err != nil {
			return 0, 0, s.fail(generationKey, fmt.Errorf("it is damaged: %w", err))
		}
	}
	return h.Generation, meta.LastIndex, nil
}
