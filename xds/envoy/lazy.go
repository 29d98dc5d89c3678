package envoy

import (
	"sync"
	"sync/atomic"
)

// lazy is a list of resources that is made when the first proxy asks for it.
type lazy struct {
	once sync.Once
	fill func() []*Resource
	made atomic.Pointer[[]*Resource]
}

func onDemand(fill func() []*Resource) *lazy { return &lazy{fill: fill} }

func (l *lazy) get() []*Resource {
	l.once.Do(func() {
		list := l.fill()
		l.made.Store(&list)
	})
	return *l.made.Load()
}

// peek is the list if it was made.
func (l *lazy) peek() []*Resource {
	if list := l.made.Load(); list != nil {
		return *list
	}
	return nil
}

// Size counts encoded resources of a type, and their bytes.
type Size struct{ Resources, Bytes int }

// Sizes counts what the World has encoded so far. It walks through all of it.
func (t *Translation) Sizes() (sizes [Types]Size) {
	count := func(list []*Resource) {
		for _, r := range list {
			sizes[r.Type].Resources++
			sizes[r.Type].Bytes += len(r.Body)
		}
	}
	for _, s := range t.order {
		count(s.clusters)
		count(s.endpoints)
		for _, l := range []*lazy{s.shapes.sidecar, s.shapes.node, s.shapes.dedicated, s.routes.encoded, s.proxyless.clusters, s.proxyless.endpoints, s.proxyless.listeners, s.proxyless.routes} {
			count(l.peek())
		}
	}
	for _, p := range t.public {
		count(p.encoded.peek())
	}
	t.callers.mu.Lock()
	defer t.callers.mu.Unlock()
	for _, r := range t.callers.rules {
		if r != nil {
			count([]*Resource{r})
		}
	}
	return sizes
}
