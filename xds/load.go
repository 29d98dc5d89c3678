package xds

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// reportEvery is how often a proxy reports while somebody watches. With many
	// proxies it is longer, so that all of them together send no more than
	// reportsPerSecond.
	reportEvery      = 50 * time.Millisecond
	reportsPerSecond = 5000
	// reportIdle is how often a proxy sends an empty report when nobody watches.
	reportIdle = time.Hour
)

// loads is what the proxies report of the requests and TCP connections that are
// in flight to single endpoints (envoy.service.load_stats.v3), for clusters that
// somebody watches. Without a watcher nothing is asked for.
type loads struct {
	mu      sync.Mutex
	watched map[string]int                 // watchers by cluster; guarded by mu
	streams map[string]*loadStream         // the newest by proxy id; guarded by mu
	reports map[string]map[endpoint]uint64 // the last of each proxy; guarded by mu
}

type endpoint struct {
	cluster string
	at      netip.AddrPort
}

// loadStream is one proxy's reports.
type loadStream struct {
	poke     chan struct{} // one slot: watched has changed
	asked    bool          // it has been asked something; guarded by loads.mu
	reported time.Time     // when its last report came; guarded by loads.mu
}

func newLoads() *loads {
	return &loads{watched: map[string]int{}, streams: map[string]*loadStream{}, reports: map[string]map[endpoint]uint64{}}
}

// WatchLoad has every proxy that can report its load tell what is in flight to
// the endpoints of some clusters, until stop is called.
func (s *Server) WatchLoad(clusters ...string) (stop func()) {
	s.loads.watch(1, clusters)
	return sync.OnceFunc(func() { s.loads.watch(-1, clusters) })
}

func (l *loads) watch(n int, clusters []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range clusters {
		if l.watched[c] += n; l.watched[c] == 0 {
			delete(l.watched, c)
		}
	}
	for _, st := range l.streams {
		select {
		case st.poke <- struct{}{}:
		default:
		}
	}
}

// Target is an endpoint of a cluster.
type Target struct {
	Cluster string
	At      netip.AddrPort
}

// InFlight says what watched endpoints have in flight at the proxies that
// report load: busy counts requests and TCP connections by proxy, none where
// there are none; silent are the connected proxies whose bootstrap says that
// they report, and that have not after since: one whose stream broke takes some
// seconds to open it again.
func (s *Server) InFlight(since time.Time, targets ...Target) (busy map[string]uint64, silent []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.loads
	l.mu.Lock()
	defer l.mu.Unlock()
	busy = map[string]uint64{}
	for id, st := range s.live {
		if l.streams[id] == nil && st.metadata[envoy.MetadataLoad] == "true" {
			silent = append(silent, id)
		}
	}
	for id, st := range l.streams {
		if !st.reported.After(since) {
			silent = append(silent, id)
		}
		for _, t := range targets {
			if n := l.reports[id][endpoint{t.Cluster, t.At}]; n > 0 {
				busy[id] += n
			}
		}
	}
	slices.Sort(silent)
	return busy, silent
}

// StreamLoadStats implements the load reporting service: one proxy's reports.
func (v *service) StreamLoadStats(gs loadv3.LoadReportingService_StreamLoadStatsServer) error {
	first, err := gs.Recv()
	if err != nil {
		return err
	}
	identity, err := v.identify(gs.Context(), first.GetNode())
	if err != nil {
		return err
	}
	id, st := identity.String(), &loadStream{poke: make(chan struct{}, 1)}
	v.loads.join(id, st)
	defer v.loads.leave(id, st)
	failed := make(chan error, 1)
	v.wg.Go(func() { failed <- v.loads.receive(id, st, gs) })
	for {
		if q, due := v.loads.question(st); due {
			if err := gs.Send(q); err != nil {
				return err
			}
		}
		select {
		case <-st.poke:
		case err := <-failed:
			return err
		case <-gs.Context().Done():
			return gs.Context().Err()
		case <-v.ctx.Done():
			return errStopping
		}
	}
}

func (l *loads) join(id string, st *loadStream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams[id] = st
	delete(l.reports, id)
}

func (l *loads) leave(id string, st *loadStream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams[id] == st {
		delete(l.streams, id)
		delete(l.reports, id)
	}
}

// question is what a stream is to report from now on; due is false for one that
// was asked nothing yet and has nothing to tell.
func (l *loads) question(st *loadStream) (q *loadv3.LoadStatsResponse, due bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.watched) == 0 && !st.asked {
		return nil, false
	}
	every := reportIdle
	if len(l.watched) > 0 {
		every = max(reportEvery, time.Duration(len(l.streams))*time.Second/reportsPerSecond)
	}
	st.asked = true
	return &loadv3.LoadStatsResponse{Clusters: slices.Sorted(maps.Keys(l.watched)), LoadReportingInterval: durationpb.New(every), ReportEndpointGranularity: true}, true
}

// receive takes a proxy's reports until its stream ends.
func (l *loads) receive(id string, st *loadStream, gs loadv3.LoadReportingService_StreamLoadStatsServer) error {
	for {
		report, err := gs.Recv()
		if err != nil {
			return err
		}
		l.take(id, st, report)
	}
}

func (l *loads) take(id string, st *loadStream, report *loadv3.LoadStatsRequest) {
	active := map[endpoint]uint64{}
	for _, c := range report.GetClusterStats() {
		for _, locality := range c.GetUpstreamLocalityStats() {
			for _, e := range locality.GetUpstreamEndpointStats() {
				socket := e.GetAddress().GetSocketAddress()
				at, err := netip.ParseAddr(socket.GetAddress())
				if n := e.GetTotalRequestsInProgress(); err == nil && n > 0 {
					active[endpoint{c.GetClusterName(), netip.AddrPortFrom(at, uint16(socket.GetPortValue()))}] += n
				}
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams[id] == st {
		l.reports[id], st.reported = active, time.Now()
	}
}
