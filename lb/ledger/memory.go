package ledger

import "context"

// Memory is a Store that forgets: for looking at what a config would yield.
type Memory struct{}

// Load returns an empty State.
func (Memory) Load(context.Context) (State, error) { return State{}, nil }

// Apply does nothing.
func (Memory) Apply(context.Context, Batch) error { return nil }

// Close does nothing.
func (Memory) Close() error { return nil }
