package daemon

import (
	"encoding/json"
	"maps"
	"sync"

	"github.com/roostmesh/roost/cmd/internal/replicas"
)

// outcome is how far one replica is with a drain.
type outcome struct {
	Generation uint64   `json:"generation"` // of the mark
	Done       bool     `json:"done"`
	InFlight   uint64   `json:"in_flight,omitempty"`
	Waiting    []string `json:"waiting,omitempty"`
	Unknown    []string `json:"unknown,omitempty"`
	Gone       []string `json:"gone,omitempty"`
}

// outcomes are those of this replica, by the instances' qualified names.
type outcomes struct {
	mu sync.Mutex
	by map[string]outcome // guarded by mu
}

func newOutcomes() *outcomes { return &outcomes{by: map[string]outcome{}} }

func (o *outcomes) set(instance string, out outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.by[instance] = out
}

// keep forgets all but some instances.
func (o *outcomes) keep(instances map[string]bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	maps.DeleteFunc(o.by, func(name string, _ outcome) bool { return !instances[name] })
}

func (o *outcomes) list() map[string]outcome {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.by)
}

// outcomeOf is how far another replica is with a drain of a generation.
func outcomeOf(o replicas.Other, instance string, generation uint64) (out outcome, done bool) {
	var by map[string]outcome
	if json.Unmarshal(o.Urgent, &by) != nil {
		return outcome{}, false
	}
	out, ok := by[instance]
	return out, ok && out.Done && out.Generation >= generation
}
