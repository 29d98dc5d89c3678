// Package consul is the Source of instances that a Consul catalog lists. Blocking
// queries go out; an Update for each service that belongs to Roost comes in
// within milliseconds of a change. A failing Consul keeps what it last said, and
// one that lost its state, or hides a part of it, takes nothing away.
//
// What belongs to Roost is known by one blocking query on the filtered service
// list; each such service then has a blocking query of its own. Over HTTP/2
// (https) thousands of them share a few connections. Over HTTP/1.1 each takes
// one, and an agent allows 200 to a client: services beyond the budget share a
// sweep. Two further blocking queries set it off (the service list and the checks
// change with every registration and every check); it finds what has changed by
// the indexes that each node's registrations and the checks carry, and asks for
// that alone. The services that changed last have the queries of their own.
//
// From a registration's PUT to its Update, on two cores (BenchmarkPutToEmit): p50
// 3-6 ms with a query of its own (100 to 1,000 services, HTTP/1.1 or 2); in the
// sweep 21 ms of 300 services on one node, 37 ms of 1,000. A sweep that asks every
// service anew took 350 ms and 1.7 s.
//
// Run owns every goroutine: one for each query, one that sweeps.
package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/discovery"
)

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 5 * time.Second
	// reserved are the connections that services' own queries leave free: the
	// list, the checks, the sweep, a look at the nodes.
	reserved     = 24
	sweepWorkers = 16

	defaultTenantMeta     = "roost-tenant"
	defaultMaxConnections = 150 // of the 200 that an agent allows
)

// Config is what a Source needs. Empty fields take Consul's own environment
// variables and defaults (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, ...).
type Config struct {
	Name          string // of the source
	Address       string // http://HOST:PORT, https://... or unix:///PATH
	TokenFile     string // read again when it changes
	DefaultTenant string // set: every service is this tenant's unless its meta says otherwise
	TenantMeta    string // meta key that names the tenant; default roost-tenant
	// MaxConnections bounds the connections to the agent; default 150.
	MaxConnections int

	CAFile, CertFile, KeyFile, ServerName string

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Source watches one Consul catalog.
type Source struct {
	config    Config
	client    *api.Client
	transport *http.Transport
	// multiplexed says that queries share connections, so that each service has
	// its own.
	multiplexed bool
	asking      atomic.Pointer[asking]
	// suspicions counts what may mean that another Consul answers: a query that
	// failed, a connection that was lost, an index that fell.
	suspicions atomic.Uint64
	metrics    *metrics
}

type metrics struct {
	watches     prometheus.Gauge
	shared      prometheus.Gauge
	connections prometheus.Gauge
	errors      prometheus.Counter
	wakes       prometheus.Counter
}

// New returns a Source; it does not dial.
func New(c Config) (*Source, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.TenantMeta = cmp.Or(c.TenantMeta, defaultTenantMeta)
	c.MaxConnections = cmp.Or(c.MaxConnections, defaultMaxConnections)
	if c.MaxConnections <= reserved {
		return nil, fmt.Errorf("max_connections %d: at least %d are needed", c.MaxConnections, reserved+1)
	}
	s := &Source{config: c, metrics: newMetrics(c.Registerer)}
	s.asking.Store(newAsking())
	s.suspicions.Store(1) // at the start nothing is known
	var err error
	if s.client, s.transport, s.multiplexed, err = newClient(c, s.metrics.connections); err != nil {
		return nil, err
	}
	return s, nil
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		watches:     prometheus.NewGauge(prometheus.GaugeOpts{Name: "roost_consul_watches", Help: "Services that are watched in Consul."}),
		shared:      prometheus.NewGauge(prometheus.GaugeOpts{Name: "roost_consul_watches_shared", Help: "Of these, services beyond the connection budget, which share a sweep."}),
		connections: prometheus.NewGauge(prometheus.GaugeOpts{Name: "roost_consul_connections", Help: "Open connections to Consul."}),
		errors:      prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_consul_errors_total", Help: "Queries that Consul did not answer well."}),
		wakes:       prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_consul_answers_total", Help: "Answers of queries on services."}),
	}
	if r != nil {
		r.MustRegister(m.watches, m.shared, m.connections, m.errors, m.wakes)
	}
	return m
}

// Name is the source's name.
func (s *Source) Name() string { return s.config.Name }

// backoff is the pause before the n-th try in a row.
func backoff(n int) time.Duration {
	d := backoffMin << min(n-1, 10)
	d = min(d, backoffMax)
	return d/2 + time.Duration(rand.Int64N(int64(d/2)))
}

func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// Run watches until ctx ends.
func (s *Source) Run(ctx context.Context, emit func(discovery.Update)) error {
	defer s.transport.CloseIdleConnections()
	return newWatcher(s, emit).run(ctx)
}

// problemBudget says that some services are noticed later than others.
func (s *Source) problemBudget(services, own int) discovery.Problem {
	return discovery.Problem{Code: "consul_watch_budget", Severity: discovery.SeverityWarning, Object: s.config.Name, Place: "discovery.consul.max_connections",
		Message: fmt.Sprintf("%d services are watched over HTTP/1.1 with %d connections; %d of them share a sweep, so that their changes are seen some tens of milliseconds later", services, s.config.MaxConnections, services-own),
		Fix:     "use Consul's https address, which multiplexes, or raise max_connections together with the agent's limits.http_max_conns_per_client"}
}

// problemHidden says that Consul does not show everything to this token: of so
// many services not all instances, or else not all names.
func (s *Source) problemHidden(services int) discovery.Problem {
	p := discovery.Problem{Code: "consul_token_limited", Severity: discovery.SeverityInfo, Object: s.config.Name, Place: "discovery.consul.token_file",
		Message: "Consul hides a part of its catalog from this token",
		Fix:     "if services are missing, give the token's policy service_prefix \"\" and node_prefix \"\" with read"}
	if services > 0 {
		p.Severity = discovery.SeverityWarning
		p.Message = fmt.Sprintf("Consul hides instances of %d services from this token; those that it showed before are held while they answer", services)
	}
	return p
}

// isGone tells that ctx, and not Consul, ended a query.
func isGone(ctx context.Context, err error) bool {
	return ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "context canceled"))
}
