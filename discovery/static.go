package discovery

import (
	"context"
	"sync"
	"time"
)

// Static is the Source of the instances that the configuration itself lists.
type Static struct {
	name string
	mu   sync.Mutex // guards list and poke order
	list []Instance
	poke chan struct{}
}

// NewStatic returns a Source of the given name with these instances.
func NewStatic(name string, instances []Instance) *Static {
	return &Static{name: name, list: instances, poke: make(chan struct{}, 1)}
}

// Name is the source's name.
func (s *Static) Name() string { return s.name }

// Set replaces the instances; the running source emits them.
func (s *Static) Set(instances []Instance) {
	s.mu.Lock()
	s.list = instances
	s.mu.Unlock()
	select {
	case s.poke <- struct{}{}:
	default:
	}
}

// Run emits the instances now and after each Set.
func (s *Static) Run(ctx context.Context, emit func(Update)) error {
	for {
		s.mu.Lock()
		list := s.list
		s.mu.Unlock()
		emit(Update{Source: s.name, Scope: s.name, Scopes: []string{s.name}, Instances: list, Seen: time.Now(), Complete: true})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.poke:
		}
	}
}
