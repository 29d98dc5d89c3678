// Package dns answers the names of Roost's own zones from the current
// lb.Snapshot, to each caller what that caller may see, and forwards every
// other name.
//
// Queries over UDP and TCP, the Snapshot and resolv.conf files go in; replies,
// Problems and metrics come out. Resolve is the same answering core as a pure
// function, for the admin API and the command line.
//
// Serve owns every goroutine: some readers for each UDP socket, one acceptor
// for each TCP socket, one for each TCP connection, one for each forwarded
// question, and one that watches addresses and files. It returns after all of
// them have ended. A name of ours is answered in the reader itself, without a
// lock.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/lb"
)

// Config is what a Server needs.
type Config struct {
	// Snapshot gives the current world. It returns nil while nothing is known
	// yet: then names of ours are answered with SERVFAIL.
	Snapshot func() *lb.Snapshot
	// Domain is the zone that is ours before there is a Snapshot; afterwards
	// the Snapshot's is. When it is empty, every name gets SERVFAIL until then.
	Domain string
	// Node is this host's name: who a source address is depends on it.
	Node string
	// Listen are the addresses that are served over UDP and TCP. An IPv6
	// wildcard takes IPv6 only: list 0.0.0.0 beside it.
	Listen []Listen
	// Forward says where names that are not ours go; the longest zone that
	// matches wins. A name that no zone matches is REFUSED.
	Forward []Forwarder
	Log     *slog.Logger
	// Registerer takes the metrics; nil keeps them unseen.
	Registerer prometheus.Registerer
}

// Listen is one address to serve.
type Listen struct {
	// Addr may have port 0: then one is chosen that UDP and TCP both have free.
	Addr netip.AddrPort
	// Tenant binds a view: every caller at this address is that tenant. When
	// it is empty the caller's source address decides.
	Tenant string
	// Optional makes any failure to open it a Problem, and it is tried again:
	// for an address that the operator has not asked for.
	Optional bool
}

// Forwarder is where the names of one zone go. Several with the same zone are
// asked in their order.
type Forwarder struct {
	// Zone is a domain name in any case, with or without the dot at its end;
	// "" is every name.
	Zone string
	// To are the upstream servers, the preferred one first.
	To []netip.AddrPort
	// Files are resolv.conf files whose nameservers are asked after To. They
	// are read again when they change.
	Files []string
}

// watchEvery is how often missing addresses are tried again and resolv.conf
// files are looked at.
const watchEvery = 3 * time.Second

// Server serves DNS. Listen, then Serve.
type Server struct {
	// Fixed at construction.
	cfg       Config
	log       *slog.Logger
	endpoints []*endpoint
	forward   *forwarding
	metrics   *metrics

	unknown *unknownCallers // guarded by a lock of its own
	conns   *connections    // guarded by a lock of its own
}

// New makes a Server. It opens and starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Snapshot == nil {
		return nil, errors.New("dns: Config.Snapshot is missing")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("dns: register metrics: %w", err)
	}
	s := &Server{cfg: cfg, log: cfg.Log, metrics: m, unknown: newUnknownCallers(cfg.Node), conns: newConnections()}
	for _, l := range cfg.Listen {
		s.endpoints = append(s.endpoints, &endpoint{want: l})
	}
	s.forward = newForwarding(cfg.Forward, cfg.Log, m)
	s.forward.load(s.Addrs())
	return s, nil
}

// Listen opens the UDP and the TCP socket of every address, or none. An
// address that this host does not have yet is a Problem, not an error. A
// caller that does not go on to Serve calls Close.
func (s *Server) Listen(ctx context.Context) error {
	for _, e := range s.endpoints {
		if err := e.listen(ctx); err != nil && e.want.Optional {
			e.fault(err)
		} else if err != nil {
			s.Close()
			return fmt.Errorf("dns.addresses: %s: %w", e.want.Addr, cause(err))
		}
		if e.missing.Load() != nil {
			s.log.Warn("DNS address is not served as it should be yet", "address", e.want.Addr, "bound", e.open.Load() != nil, "reason", e.missing.Load().err)
		}
	}
	s.forward.load(s.Addrs())
	return nil
}

// Addrs are the addresses in the order of Config.Listen, with their real ports
// once they are open.
func (s *Server) Addrs() []netip.AddrPort {
	out := make([]netip.AddrPort, len(s.endpoints))
	for i, e := range s.endpoints {
		out[i] = e.want.Addr
		if open := e.open.Load(); open != nil {
			out[i] = open.addr
		}
	}
	return out
}

// Close closes the sockets that Listen has opened.
func (s *Server) Close() {
	for _, e := range s.endpoints {
		if open := e.open.Load(); open != nil {
			open.close()
		}
	}
}

// Serve answers until ctx ends, then closes the sockets and waits for
// everything it has started. It may be called once, after Listen.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var children sync.WaitGroup
	for _, e := range s.endpoints {
		if open := e.open.Load(); open != nil {
			s.serveEndpoint(ctx, &children, e, open)
		}
	}
	s.watch(ctx, &children)
	s.Close()
	children.Wait()
	return nil
}

// watch tries missing addresses again and reads changed files until ctx ends.
func (s *Server) watch(ctx context.Context, children *sync.WaitGroup) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, e := range s.endpoints {
			s.retry(ctx, children, e)
		}
		s.forward.load(s.Addrs())
	}
}

// retry looks again for an address that this host did not have.
func (s *Server) retry(ctx context.Context, children *sync.WaitGroup, e *endpoint) {
	if e.missing.Load() == nil {
		return
	}
	if e.open.Load() != nil {
		if onThisHost(ctx, e.want.Addr.Addr()) {
			e.missing.Store(nil)
			s.log.Info("DNS address is on this host now", "address", e.want.Addr)
		}
		return
	}
	if err := e.listen(ctx); err != nil {
		e.fault(err)
		return
	}
	if open := e.open.Load(); open != nil {
		s.log.Info("DNS address is served now", "address", open.addr)
		s.serveEndpoint(ctx, children, e, open)
	}
}

// Problems are what a person has to mend now. It may be called at any time.
func (s *Server) Problems() []lb.Problem {
	var out []lb.Problem
	for _, e := range s.endpoints {
		if p, bad := e.problem(); bad {
			out = append(out, p)
		}
	}
	out = append(out, s.forward.problems()...)
	out = append(out, s.unknown.problems(time.Now())...)
	lb.SortProblems(out)
	return out
}
