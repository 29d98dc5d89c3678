// Package consul is the Source of instances that a Consul catalog lists. Blocking
// queries go out; an Update for each service that belongs to Roost comes in
// within milliseconds of a change. A failing Consul keeps what it last said.
//
// What belongs to Roost is known by one blocking query on the filtered service
// list; each such service then has a blocking query of its own. Over HTTP/2
// (https) thousands of them share a few connections. Over HTTP/1.1 each takes
// one, and an agent allows 200 to a client: services beyond the budget share a
// sweep, which two further blocking queries set off (the service list and the
// checks change with every registration and every check), and the services that
// changed last have the queries of their own.
//
// Run owns every goroutine: one for each query, one that sweeps.
package consul

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/discovery"
)

const (
	// blockFor is how long Consul holds a query without a change.
	blockFor = 5 * time.Minute
	// answerWithin bounds a query that does not block.
	answerWithin = 10 * time.Second
	backoffMin   = 100 * time.Millisecond
	backoffMax   = 5 * time.Second
	// reserved are the connections that services' own queries leave free: the
	// list, the checks, the sweep.
	reserved     = 24
	sweepWorkers = 16
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
	config Config
	client *api.Client
	// multiplexed says that queries share connections, so that each service has
	// its own.
	multiplexed bool
	metrics     *metrics
}

type metrics struct {
	watches prometheus.Gauge
	shared  prometheus.Gauge
	errors  prometheus.Counter
	wakes   prometheus.Counter
}

// New returns a Source; it does not dial.
func New(c Config) (*Source, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.TenantMeta == "" {
		c.TenantMeta = "roost-tenant"
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 150
	}
	if c.MaxConnections <= reserved {
		return nil, fmt.Errorf("max_connections %d: at least %d are needed", c.MaxConnections, reserved+1)
	}
	s := &Source{config: c, metrics: newMetrics(c.Registerer)}
	cfg := api.DefaultConfig()
	if c.Address != "" {
		cfg.Address = c.Address
	}
	if c.CAFile != "" {
		cfg.TLSConfig.CAFile = c.CAFile
	}
	if c.CertFile != "" {
		cfg.TLSConfig.CertFile, cfg.TLSConfig.KeyFile = c.CertFile, c.KeyFile
	}
	if c.ServerName != "" {
		cfg.TLSConfig.Address = c.ServerName
	}
	s.multiplexed = cfg.Scheme == "https" || strings.HasPrefix(cfg.Address, "https://")
	cfg.Transport = &http.Transport{
		DialContext:     (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		MaxConnsPerHost: c.MaxConnections, MaxIdleConnsPerHost: c.MaxConnections, IdleConnTimeout: time.Minute,
		TLSHandshakeTimeout: 5 * time.Second, ForceAttemptHTTP2: true,
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
	}
	if s.multiplexed {
		var err error
		if cfg.Transport.TLSClientConfig, err = api.SetupTLSConfig(&cfg.TLSConfig); err != nil {
			return nil, err
		}
		cfg.Transport.TLSClientConfig.MinVersion = tls.VersionTLS12
	}
	var err error
	if s.client, err = api.NewClient(cfg); err != nil {
		return nil, err
	}
	return s, nil
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		watches: prometheus.NewGauge(prometheus.GaugeOpts{Name: "roost_consul_watches", Help: "Services that are watched in Consul."}),
		shared:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "roost_consul_watches_shared", Help: "Of these, services beyond the connection budget, which share a sweep."}),
		errors:  prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_consul_errors_total", Help: "Queries that Consul did not answer well."}),
		wakes:   prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_consul_answers_total", Help: "Answers of queries on services."}),
	}
	if r != nil {
		r.MustRegister(m.watches, m.shared, m.errors, m.wakes)
	}
	return m
}

// Name is the source's name.
func (s *Source) Name() string { return s.config.Name }

// options are those of a query that blocks from index on; 0 answers at once.
// Any server may answer: a catalog that is a little old is better than none.
func (s *Source) options(ctx context.Context, index uint64) (*api.QueryOptions, context.CancelFunc) {
	o := &api.QueryOptions{AllowStale: true, WaitIndex: index, Token: s.token()}
	limit := answerWithin
	if index > 0 {
		o.WaitTime = blockFor - time.Duration(rand.Int64N(int64(blockFor/10)))
		// The server adds up to a sixteenth of its own.
		limit += o.WaitTime + o.WaitTime/8
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	return o.WithContext(ctx), cancel
}

// token is the content of the token file; "" leaves the client's own.
func (s *Source) token() string {
	if s.config.TokenFile == "" {
		return ""
	}
	data, err := os.ReadFile(s.config.TokenFile)
	if err != nil {
		s.config.Log.Warn("consul token file cannot be read", "path", s.config.TokenFile, "error", err)
		return ""
	}
	return strings.TrimSpace(string(data))
}

// list asks for the names of services that have a member. Membership cannot be
// seen in the list itself, which has names and tags only.
func (s *Source) list(ctx context.Context, index uint64) (map[string]bool, uint64, error) {
	o, cancel := s.options(ctx, index)
	defer cancel()
	if s.config.DefaultTenant == "" {
		o.Filter = fmt.Sprintf("%q in ServiceMeta", s.config.TenantMeta)
	} else {
		o.Filter = `ServiceKind == ""`
	}
	services, meta, err := s.client.Catalog().Services(o)
	if err != nil {
		return nil, 0, fmt.Errorf("service list: %w", err)
	}
	names := make(map[string]bool, len(services))
	for name := range services {
		if s.config.DefaultTenant == "" || name != "consul" && name != "nomad" && name != "nomad-client" {
			names[name] = true
		}
	}
	return names, atLeastOne(meta.LastIndex), nil
}

// health asks for the instances of one service.
func (s *Source) health(ctx context.Context, name string, index uint64) ([]*api.ServiceEntry, uint64, error) {
	o, cancel := s.options(ctx, index)
	defer cancel()
	entries, meta, err := s.client.Health().Service(name, "", false, o)
	if err != nil {
		return nil, 0, fmt.Errorf("service %s: %w", name, err)
	}
	s.metrics.wakes.Inc()
	return entries, atLeastOne(meta.LastIndex), nil
}

// checks blocks until any check of the catalog changes; no check matches, so
// that the answer is small.
func (s *Source) checks(ctx context.Context, index uint64) (uint64, error) {
	o, cancel := s.options(ctx, index)
	defer cancel()
	o.Filter = `CheckID == "roost: none"`
	_, meta, err := s.client.Health().State(api.HealthAny, o)
	if err != nil {
		return 0, fmt.Errorf("checks: %w", err)
	}
	return atLeastOne(meta.LastIndex), nil
}

// atLeastOne: an index of 0 would make the next query return at once, for ever.
func atLeastOne(index uint64) uint64 { return max(index, 1) }

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

// NodeName asks the agent for its node's name.
func (s *Source) NodeName(ctx context.Context) (string, error) {
	o, cancel := s.options(ctx, 0)
	defer cancel()
	var self struct{ Config struct{ NodeName string } }
	if _, err := s.client.Raw().Query("/v1/agent/self", &self, o); err != nil {
		return "", fmt.Errorf("agent: %w", err)
	}
	return self.Config.NodeName, nil
}

// Run watches until ctx ends.
func (s *Source) Run(ctx context.Context, emit func(discovery.Update)) error {
	return newWatcher(s, emit).run(ctx)
}

// problemBudget says that some services are noticed later than others.
func (s *Source) problemBudget(services, own int) discovery.Problem {
	return discovery.Problem{Code: "consul_watch_budget", Severity: discovery.SeverityWarning, Object: s.config.Name, Place: "discovery.consul.max_connections",
		Message: fmt.Sprintf("%d services are watched over HTTP/1.1 with %d connections; %d of them share a sweep, so that their changes are seen some tens of milliseconds later", services, s.config.MaxConnections, services-own),
		Fix:     "use Consul's https address, which multiplexes, or raise max_connections together with the agent's limits.http_max_conns_per_client"}
}

// isGone tells that ctx, and not Consul, ended a query.
func isGone(ctx context.Context, err error) bool {
	return ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "context canceled"))
}
