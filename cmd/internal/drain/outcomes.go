package drain

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

// Outcomes are those of this replica, by the instances' qualified names.
type Outcomes struct {
	mu sync.Mutex
	by map[string]outcome // guarded by mu
}

// NewOutcomes returns none.
func NewOutcomes() *Outcomes { return &Outcomes{by: map[string]outcome{}} }

func (o *Outcomes) set(instance string, out outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.by[instance] = out
}

// Keep forgets all but some instances.
func (o *Outcomes) Keep(instances map[string]bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	maps.DeleteFunc(o.by, func(name string, _ outcome) bool { return !instances[name] })
}

// JSON is what the other replicas are told, and read by outcomeOf.
func (o *Outcomes) JSON() ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return json.Marshal(o.by)
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
