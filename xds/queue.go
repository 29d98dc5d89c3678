package xds

import (
	"context"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
)

// queue holds the streams that have to look at a newer World. A stream is in it at
// most once, however many Worlds come meanwhile.
type queue struct {
	mu      sync.Mutex
	waiting []*stream     // guarded by mu
	poke    chan struct{} // a slot for each pusher
}

// pushBatch is how many streams a pusher takes at once.
const pushBatch = 16

func newQueue() *queue { return &queue{poke: make(chan struct{}, runtime.GOMAXPROCS(0))} }

// add has streams looked after.
func (q *queue) add(streams ...*stream) {
	n := 0
	q.mu.Lock()
	for _, st := range streams {
		if st.queued.CompareAndSwap(false, true) {
			q.waiting = append(q.waiting, st)
			n++
		}
	}
	q.mu.Unlock()
	for range min(n, cap(q.poke)) {
		select {
		case q.poke <- struct{}{}:
		default:
			return
		}
	}
}

// take returns the streams that have waited longest.
func (q *queue) take() []*stream {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.waiting), pushBatch)
	out := q.waiting[:n:n]
	if q.waiting = q.waiting[n:]; len(q.waiting) == 0 {
		q.waiting = nil
	}
	return out
}

// depth is how many streams wait.
func (q *queue) depth() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting)
}

// Queued is how many streams wait to be brought to a newer World.
func (s *Server) Queued() int { return s.queue.depth() }

// push runs a pusher for each core until ctx ends.
func (s *Server) push(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for range cap(s.queue.poke) {
		g.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case <-s.queue.poke:
				}
				for list := s.queue.take(); len(list) > 0; list = s.queue.take() {
					for _, st := range list {
						s.catchUp(st)
					}
				}
			}
		})
	}
	return g.Wait()
}

// catchUp brings a stream to the newest World.
func (s *Server) catchUp(st *stream) {
	st.queued.Store(false) // what is published from now on is another reason
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.closed {
		s.advance(st)
		s.flush(st)
	}
}
