package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

// Store keeps a ledger. Apply returns after the batch is durable. A Store whose
// generation is not the batch's After refuses the batch with an error that wraps
// ErrConflict, so that two writers cannot both succeed; after any error of a
// Store of one process nothing has changed. A Store of several replicas may have
// written a batch whose answer was lost: the next Apply then meets ErrConflict
// and Load shows what happened.
type Store interface {
	Load(ctx context.Context) (State, error)
	Apply(ctx context.Context, b Batch) error
	Close() error
}

// Limit bounds a batch. A record costs two operations, because its address and
// its owner have a key each, an object or a mark one. Bytes counts the JSON.
type Limit struct{ Operations, Bytes int }

// Limited is a Store that takes batches only up to a limit, which may shrink
// after an error that wraps ErrTooLarge. The Ledger splits what is larger into
// consecutive generations: each record, object and mark is written whole or not
// at all, but the change as a whole is a sequence, of which a failure leaves the
// first part.
type Limited interface {
	Store
	Limit() Limit
}

// Shared is a Store of several replicas. Its methods may be called from any
// goroutine.
type Shared interface {
	Store
	// Watch returns the state as soon as its generation is other than after. The
	// error wraps ErrLost when the store has less than it once had.
	Watch(ctx context.Context, after uint64) (State, error)
	// Restore writes a whole State into a store that has lost its own. The error
	// wraps ErrConflict when another replica was first: Watch then shows its state.
	Restore(ctx context.Context, s State) error
	// Announce tells the others of this replica until it dies. The error wraps
	// ErrLocked when another living replica has the name.
	Announce(ctx context.Context, r Replica) error
	// Replicas lists those that live, by name, as soon as the list's index is
	// other than index. 0 is for the list of now, also after an error: a store
	// that came back may count from the start.
	Replicas(ctx context.Context, index uint64) ([]Replica, uint64, error)
}

// Replica is one Roost that lives and shares a Store.
type Replica struct {
	Name    string          `json:"name"`
	Since   time.Time       `json:"since"`
	Config  string          `json:"config,omitempty"`  // hash of its config
	Acked   uint64          `json:"acked,omitempty"`   // the generation that all its proxies have ACKed
	Cleared uint64          `json:"cleared,omitempty"` // the generation that no DNS answer is older than
	Status  json.RawMessage `json:"status,omitempty"`

	// Session and ModifyIndex are the store's own; Announce does not read them.
	Session     string `json:"-"`
	ModifyIndex uint64 `json:"-"`
}

// The errors of a Store that a caller tells apart.
var (
	// ErrConflict: another writer was first. Ledger.Update loads and tries again.
	ErrConflict = errors.New("another writer was here")
	// ErrTooLarge: the batch is larger than the store's Limit of now.
	ErrTooLarge = errors.New("batch is too large")
	// ErrLocked: another process has the store, or another replica the name.
	ErrLocked = errors.New("held by another process")
	// ErrSessionLost: the replica was thought dead, so that its write is refused.
	// The Store makes a new session; what is to be written must be thought over.
	ErrSessionLost = errors.New("the replica's session is lost")
	// ErrLost: the store has less than it once had: it was wiped, or put back to
	// an old backup. What is in memory goes on; Ledger.Restore repairs the store.
	ErrLost = errors.New("the store has lost the ledger")
	// ErrOlder: Adopt was given a state that is older than what the ledger has.
	ErrOlder = errors.New("state is older than the ledger")
)
