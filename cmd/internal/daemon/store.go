package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/lb/ledger/consulstore"
)

const (
	ledgerFile   = "ledger.db"
	journalFile  = "ledger.journal"
	rememberFile = "ledger.json" // what a shared store had last
	identityFile = "replica"

	// firstLoad bounds how long a start waits for a shared store; then it goes on
	// with what it remembers.
	firstLoad   = 5 * time.Second
	storeRetry  = time.Second
	rememberNew = time.Second // how often what a shared store has is written down here
)

// openStore opens the ledger: a file of this host's, or the one that replicas
// share in Consul.
func (d *Daemon) openStore(ctx context.Context, c *config.Config) error {
	if c.Store != nil {
		return d.openShared(ctx, c)
	}
	path := filepath.Join(c.DataDir, ledgerFile)
	file, err := ledger.OpenBolt(path)
	if err != nil {
		return err
	}
	d.store = file
	// A file that is older than it was is brought forwards by its journal.
	journal, err := ledger.NewJournal(file, filepath.Join(c.DataDir, journalFile))
	if err != nil {
		return err
	}
	d.store = journal
	if d.ledger, err = ledger.Open(ctx, journal, nil); err != nil {
		return fmt.Errorf("ledger %s: %w", path, err)
	}
	if text := journal.Healed(); text != "" {
		d.log.Warn("the ledger's file was older than it had been", "file", path, "mended", text)
	}
	return nil
}

func (d *Daemon) openShared(ctx context.Context, c *config.Config) error {
	identity, err := replicaIdentity(c.DataDir)
	if err != nil {
		return err
	}
	k := c.Consul
	store, err := consulstore.New(consulstore.Config{
		Address: k.Address, TokenFile: k.TokenFile, CAFile: k.CAFile, CertFile: k.CertFile, KeyFile: k.KeyFile, ServerName: k.ServerName,
		Prefix: c.Store.Prefix, Name: c.Model.Node, Identity: identity, Log: d.log,
	})
	if err != nil {
		return fmt.Errorf("store.consul: %w", err)
	}
	d.shared = &sharedStore{Store: store, path: filepath.Join(c.DataDir, rememberFile)}
	d.store = d.shared
	if d.ledger, err = ledger.Open(ctx, d.shared, nil); err != nil {
		return fmt.Errorf("store.consul: %w", err)
	}
	if text := d.shared.remembered; text != "" {
		d.log.Warn("the shared ledger is not what this replica remembers, which is served for now", "why", text)
	}
	return nil
}

// replicaIdentity is a random word that tells this replica from another of its
// name over restarts.
func replicaIdentity(dir string) (string, error) {
	path := filepath.Join(dir, identityFile)
	data, err := os.ReadFile(path)
	if word := strings.TrimSpace(string(data)); err == nil && word != "" {
		return word, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	word := make([]byte, 16)
	_, _ = rand.Read(word) // it never fails
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return hex.EncodeToString(word), os.WriteFile(path, []byte(hex.EncodeToString(word)+"\n"), 0o600)
}

// sharedStore is the ledger that replicas share, of which this one remembers
// what it saw last: a start without Consul goes on with that.
type sharedStore struct {
	*consulstore.Store
	path       string
	opened     bool   // by the first Load, before any other goroutine has it
	remembered string // why the first Load has given what was remembered; "" it has not
	failure    atomic.Pointer[string]
}

// Load implements ledger.Store.
func (s *sharedStore) Load(ctx context.Context) (ledger.State, error) {
	if s.opened {
		return s.Store.Load(ctx)
	}
	s.opened = true
	ctx, cancel := context.WithTimeout(ctx, firstLoad)
	defer cancel()
	state, err := s.Store.Load(ctx)
	data, rerr := os.ReadFile(s.path)
	if rerr != nil {
		return state, err
	}
	known, rerr := ledger.Import(data)
	switch {
	case rerr != nil:
		return state, errors.Join(err, fmt.Errorf("%s: %w", s.path, rerr))
	case err != nil:
		s.remembered = err.Error()
		return known, nil
	case known.Generation > state.Generation:
		s.remembered = fmt.Sprintf("it is at generation %d, and was at %d", state.Generation, known.Generation)
		return known, nil
	}
	return state, nil
}

// remember writes down what the store has.
func (s *sharedStore) remember(state ledger.State) error {
	data, err := ledger.Export(state)
	if err != nil {
		return err
	}
	next := s.path + ".next"
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, s.path)
}

// followStore takes over what other replicas write, until ctx ends.
func (d *Daemon) followStore(ctx context.Context) error {
	for ctx.Err() == nil {
		err := d.takeNext(ctx)
		if err == nil {
			d.shared.failure.Store(nil)
			continue
		}
		text := err.Error()
		if ctx.Err() == nil && d.shared.failure.Swap(&text) == nil {
			d.log.Warn("the shared ledger cannot be followed; what is known goes on", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(storeRetry):
		}
	}
	return nil
}

// takeNext waits for the next state of the shared store and takes it over.
func (d *Daemon) takeNext(ctx context.Context) error {
	state, err := d.shared.Watch(ctx, d.ledger.Generation())
	if errors.Is(err, ledger.ErrLost) {
		return d.do(ctx, func(r *reconciler) error { return r.repair(ctx) })
	}
	if err != nil {
		return err
	}
	return d.do(ctx, func(r *reconciler) error { return r.adopt(ctx, state) })
}

// adopt takes over a state of the shared store.
func (r *reconciler) adopt(ctx context.Context, state ledger.State) error {
	changed, err := r.d.ledger.Adopt(state)
	switch {
	case errors.Is(err, ledger.ErrOlder):
		// It may have been read before this replica's own last write.
		if state, err = r.d.shared.Load(ctx); err == nil {
			changed, err = r.d.ledger.Adopt(state)
		}
		if errors.Is(err, ledger.ErrLost) || errors.Is(err, ledger.ErrOlder) {
			return r.repair(ctx)
		}
	case err == nil && !changed:
		return errLooked
	}
	if err != nil {
		return err
	}
	r.dirty, r.patience = r.dirty || changed, patience{}
	return nil
}

// repair writes the ledger into a shared store that has lost it.
func (r *reconciler) repair(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	r.d.log.Warn("the shared ledger was lost or put back: it is written again from memory")
	if err := r.d.ledger.Restore(ctx); err != nil {
		return fmt.Errorf("the shared ledger was lost and cannot be written again: %w", err)
	}
	r.dirty, r.patience = true, patience{}
	return nil
}

// rememberStore writes down here what the shared store has, until ctx ends.
func (d *Daemon) rememberStore(ctx context.Context) error {
	tick := time.NewTicker(rememberNew)
	defer tick.Stop()
	saved := uint64(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if d.ledger.Generation() == saved {
			continue
		}
		state, err := d.state(ctx)
		if err != nil {
			continue
		}
		if err := d.shared.remember(state); err != nil {
			d.log.Warn("what the shared ledger has cannot be written down here", "error", err)
			continue
		}
		saved = state.Generation
	}
}

// Export is the whole ledger as one document.
func (d *Daemon) Export(ctx context.Context) (data []byte, err error) {
	state, err := d.state(ctx)
	if err != nil {
		return nil, err
	}
	return ledger.Export(state)
}

// state is all that the ledger knows.
func (d *Daemon) state(ctx context.Context) (s ledger.State, err error) {
	err = d.look(ctx, func(*reconciler) { s = d.ledger.State() })
	return s, err
}

// Import takes over what an export has and this ledger has not. Nothing is taken
// where the two contradict each other.
func (d *Daemon) Import(ctx context.Context, data []byte) (added int, err error) {
	state, err := ledger.Import(data)
	if err != nil {
		return 0, err
	}
	err = d.do(ctx, func(r *reconciler) error {
		added, err = d.ledger.Import(ctx, state)
		r.dirty = true
		return err
	})
	return added, err
}
