package consulstore

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

// maxStatus bounds what a status may be when it is unpacked.
const maxStatus = 64 << 20

// statusPrefix is beside the ledger's own keys, so that reading those does not
// cost what replicas tell of themselves. The prefix roost/ has roost.status/.
func (s *Store) statusPrefix() string { return strings.TrimSuffix(s.config.Prefix, "/") + ".status/" }

// Tell writes what this replica has to say of itself for people. It vanishes
// with the replica. Consul takes about 500 KB of it, compressed.
func (s *Store) Tell(ctx context.Context, status []byte) error {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	s.mu.Lock()
	session := s.session
	s.mu.Unlock()
	key := s.statusPrefix() + url.PathEscape(s.config.Name)
	if session == "" {
		return fmt.Errorf("ledger in Consul %s, key %s: %w", s.address, key, ledger.ErrSessionLost)
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(status)
	if err = errors.Join(err, w.Close()); err != nil {
		return err
	}
	held, _, err := s.client.KV().Acquire(&api.KVPair{Key: key, Value: packed.Bytes(), Session: session}, s.write(ctx))
	if err == nil && !held {
		err = ledger.ErrLocked
	}
	if err != nil {
		return fmt.Errorf("ledger in Consul %s, key %s: %w", s.address, key, err)
	}
	return nil
}

// Told reads what the living replicas have told of themselves, by name.
func (s *Store) Told(ctx context.Context) (map[string][]byte, error) {
	o, cancel := s.query(ctx, 0)
	defer cancel()
	pairs, _, err := s.client.KV().List(s.statusPrefix(), o)
	if err != nil {
		return nil, fmt.Errorf("ledger in Consul %s, keys %s: %w", s.address, s.statusPrefix(), err)
	}
	out := map[string][]byte{}
	for _, p := range pairs {
		name, err := url.PathUnescape(strings.TrimPrefix(p.Key, s.statusPrefix()))
		if err != nil || p.Session == "" {
			continue // written by hand
		}
		if data := unpack(p.Value); data != nil {
			out[name] = data
		}
	}
	return out, nil
}

// unpack returns nil for what was not written by Tell.
func unpack(packed []byte) []byte {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(r, maxStatus))
	if err != nil {
		return nil
	}
	return data
}
