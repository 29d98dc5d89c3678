package xds

import (
	"cmp"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Admission bounds what streams may cost. Whoever is refused for what others do
// gets RESOURCE_EXHAUSTED and comes back with jitter: Envoy and gRPC do.
type Admission struct {
	PerSecond    int           // streams admitted a second; 0: 500 for each core
	Burst        int           // and at once; 0: 1,000 for each core
	Streams      int           // connected at a time; 0: 20,000
	AnswerWithin time.Duration // how long a response may go unanswered; 0: a minute
}

const (
	admitPerCore  = 500
	burstPerCore  = 1000
	streamsAtMost = 20_000
	// answerWithin leaves an Envoy time for the 15 s that it waits for a secret
	// before it confirms a cluster, more than once.
	answerWithin = time.Minute
)

func (a Admission) answerWithin() time.Duration { return cmp.Or(a.AnswerWithin, answerWithin) }

// admission decides who may open a stream, before anything of it is read.
type admission struct {
	limiter *rate.Limiter
	most    int64
	streams atomic.Int64 // admitted and not ended
	closed  atomic.Bool  // the Server is about to stop
}

func newAdmission(a Admission) *admission {
	cores := runtime.GOMAXPROCS(0)
	return &admission{
		limiter: rate.NewLimiter(rate.Limit(cmp.Or(a.PerSecond, cores*admitPerCore)), cmp.Or(a.Burst, cores*burstPerCore)),
		most:    int64(cmp.Or(a.Streams, streamsAtMost)),
	}
}

// Drain has the Server take no more streams, and its health service say so, before
// Run's context ends: those that are there are served until then.
func (s *Server) Drain() { s.admission.closed.Store(true) }

// enter admits a stream, which leave ends, or says why not.
func (v *service) enter() (leave func(), err error) {
	a := v.admission
	if a.closed.Load() {
		return nil, errStopping
	}
	if a.streams.Add(1) > a.most {
		a.streams.Add(-1)
		v.metrics.refused.WithLabelValues(refusedFull).Inc()
		return nil, status.Errorf(codes.ResourceExhausted, "%d proxies are connected, as many as may be: come back later, or to another replica", a.most)
	}
	if !a.limiter.Allow() {
		a.streams.Add(-1)
		v.metrics.refused.WithLabelValues(refusedRate).Inc()
		return nil, status.Error(codes.ResourceExhausted, "too many proxies come at once: come back later")
	}
	return func() { a.streams.Add(-1) }, nil
}
