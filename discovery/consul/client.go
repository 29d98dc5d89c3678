package consul

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// blockFor is how long Consul holds a query without a change.
	blockFor = 5 * time.Minute
	// briefly is the same where the token may not see all: a policy that lets it see
	// more wakes no query.
	briefly = 2 * time.Second
	// answerWithin bounds a query that does not block.
	answerWithin = 10 * time.Second
	dialTimeout  = 5 * time.Second
	keepAlive    = 15 * time.Second
	// tokenEvery is how often the token file is looked at beside the queries.
	tokenEvery = time.Second
	unixScheme = "unix://"
)

// newClient returns the client of c, its transport, and whether queries share
// connections.
func newClient(c Config, connections prometheus.Gauge) (*api.Client, *http.Transport, bool, error) {
	cfg := api.DefaultConfig()
	cfg.Address = cmp.Or(c.Address, cfg.Address)
	cfg.TLSConfig.CAFile = cmp.Or(c.CAFile, cfg.TLSConfig.CAFile)
	cfg.TLSConfig.Address = cmp.Or(c.ServerName, cfg.TLSConfig.Address)
	if c.CertFile != "" {
		cfg.TLSConfig.CertFile, cfg.TLSConfig.KeyFile = c.CertFile, c.KeyFile
	}
	multiplexed := cfg.Scheme == "https" || strings.HasPrefix(cfg.Address, "https://")
	dial := (&net.Dialer{Timeout: dialTimeout, KeepAlive: keepAlive}).DialContext
	if path, ok := strings.CutPrefix(cfg.Address, unixScheme); ok {
		// The library's own way to a socket would pass by the bound below.
		cfg.Address = "http://localhost"
		tcp := dial
		dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return tcp(ctx, "unix", path) }
	}
	transport := &http.Transport{
		DialContext:     counted(dial, connections),
		MaxConnsPerHost: c.MaxConnections, MaxIdleConnsPerHost: c.MaxConnections, IdleConnTimeout: time.Minute,
		TLSHandshakeTimeout: dialTimeout, ForceAttemptHTTP2: true,
		HTTP2: &http.HTTP2Config{SendPingTimeout: keepAlive, PingTimeout: dialTimeout},
	}
	cfg.Transport = transport
	if multiplexed {
		var err error
		if transport.TLSClientConfig, err = api.SetupTLSConfig(&cfg.TLSConfig); err != nil {
			return nil, nil, false, err
		}
		transport.TLSClientConfig.MinVersion = tls.VersionTLS12
	}
	client, err := api.NewClient(cfg)
	return client, transport, multiplexed, err
}

type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// counted is dial with the open connections in a gauge.
func counted(dial dialer, open prometheus.Gauge) dialer {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		open.Inc()
		return &countedConn{Conn: conn, closed: sync.OnceFunc(open.Dec)}, nil
	}
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

// options are those of a query; with an index of 0 it is answered at once. Any
// server may answer, unless from says otherwise: a catalog that is a little old is
// better than none.
func (s *Source) options(ctx context.Context, from cursor) (*api.QueryOptions, context.CancelFunc, error) {
	token, err := s.token()
	if err != nil {
		return nil, nil, err
	}
	o := &api.QueryOptions{AllowStale: !from.consistent, RequireConsistent: from.consistent, WaitIndex: from.index, Token: token}
	limit := answerWithin
	if from.index > 0 {
		wait := blockFor
		if from.brief {
			wait = briefly
		}
		o.WaitTime = wait - time.Duration(rand.Int64N(int64(wait/10)))
		// The server adds up to a sixteenth of its own.
		limit += o.WaitTime + o.WaitTime/8
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	return o.WithContext(ctx), cancel, nil
}

// token is the content of the token file; "" leaves the client's own. A file that
// cannot be read is an error: Consul answers a client without a token with a
// catalog that looks empty.
func (s *Source) token() (string, error) {
	path := cmp.Or(s.config.TokenFile, os.Getenv(api.HTTPTokenFileEnvName))
	if path == "" {
		return "", nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("token file: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("token file %s is empty", path)
	}
	return token, nil
}

// errAskAgain ends a query that has to be asked anew, from the start: another
// token is there, or another connection.
var errAskAgain = errors.New("to be asked again")

// asking lasts as long as a token, and as one Consul answers: what is hidden from
// an old token would not wake a query that was asked with it, and another Consul
// might hold for ever one with an index of the first.
type asking struct {
	ctx    context.Context
	cancel context.CancelFunc
}

func newAsking() *asking {
	ctx, cancel := context.WithCancel(context.Background())
	return &asking{ctx, cancel}
}

// cursor is where a query goes on: the index of the last answer, and the asking
// that it belongs to.
type cursor struct {
	index uint64
	*asking
	consistent bool // only the newest state will do
	brief      bool // blocks briefly
}

// begin is the cursor of a query that does not block.
func (s *Source) begin() cursor { return cursor{asking: s.asking.Load()} }

// askAnew ends all queries; each is asked again from the start, and an answer
// that has arrived meanwhile is not used.
func (s *Source) askAnew() { s.asking.Swap(newAsking()).cancel() }

// ended tells that answers of this asking are not to be used any more.
func (a *asking) ended() bool { return a.ctx.Err() != nil }

// watchToken ends the queries of an older token until ctx ends.
func (s *Source) watchToken(ctx context.Context) error {
	old, _ := s.token() // one that cannot be read is the queries' own error
	tick := time.NewTicker(tokenEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if token, err := s.token(); err == nil && token != old {
			s.config.Log.Info("consul token has changed", "source", s.config.Name)
			old = token
			s.askAnew()
		}
	}
}

// query asks for the JSON at path.
func (s *Source) query(ctx context.Context, path, filter string, from cursor, out any) (*api.QueryMeta, error) {
	o, cancel, err := s.options(ctx, from)
	if err != nil {
		return nil, err
	}
	defer cancel()
	defer context.AfterFunc(from.ctx, cancel)()
	again := &replay{s: s, blocks: from.index > 0, cancel: cancel}
	o = o.WithContext(httptrace.WithClientTrace(o.Context(), &httptrace.ClientTrace{GotConn: again.connected}))
	o.Filter = filter
	meta, err := s.client.Raw().Query(path, out, o)
	if err != nil {
		if ctx.Err() == nil && (from.ended() || again.ended.Load()) {
			return nil, errAskAgain
		}
		return nil, err
	}
	// An index of 0 would make the next query return at once, for ever.
	meta.LastIndex = max(meta.LastIndex, 1)
	return meta, nil
}

// replay notices that the HTTP client has silently sent a query again, after its
// connection was lost. Another Consul may answer then, for which an index of the
// first one means nothing: it might block for ever.
type replay struct {
	s      *Source
	blocks bool
	cancel func()
	count  atomic.Int32
	ended  atomic.Bool
}

func (r *replay) connected(httptrace.GotConnInfo) {
	if r.count.Add(1) == 1 {
		return
	}
	r.s.suspicions.Add(1)
	if r.blocks {
		r.ended.Store(true)
		r.cancel()
	}
}

// members is the filter of what may belong to Roost, on a list whose meta has
// this name.
func (s *Source) members(meta, kind string) string {
	if s.config.DefaultTenant == "" {
		return fmt.Sprintf("%q in %s", s.config.TenantMeta, meta)
	}
	return kind + ` == ""`
}

// list asks for the names of services that have a member. Membership cannot be
// seen in the list itself, which has names and tags only.
func (s *Source) list(ctx context.Context, from cursor) (map[string]bool, *api.QueryMeta, error) {
	var services map[string][]string
	meta, err := s.query(ctx, "/v1/catalog/services", s.members("ServiceMeta", "ServiceKind"), from, &services)
	if err != nil {
		return nil, nil, fmt.Errorf("service list: %w", err)
	}
	if services == nil {
		return nil, nil, errors.New("service list: the answer is none")
	}
	names := make(map[string]bool, len(services))
	for name := range services {
		if s.config.DefaultTenant == "" || name != "consul" && name != "nomad" && name != "nomad-client" {
			names[name] = true
		}
	}
	return names, meta, nil
}

// health asks for the instances of one service.
func (s *Source) health(ctx context.Context, name string, from cursor) ([]*api.ServiceEntry, *api.QueryMeta, error) {
	var entries []*api.ServiceEntry
	meta, err := s.query(ctx, "/v1/health/service/"+name, "", from, &entries)
	if err != nil {
		return nil, nil, fmt.Errorf("service %s: %w", name, err)
	}
	if entries == nil {
		return nil, nil, fmt.Errorf("service %s: the answer is no list", name)
	}
	s.metrics.wakes.Inc()
	return entries, meta, nil
}

// checks blocks until any check of the catalog changes; no check matches, so
// that the answer is small.
func (s *Source) checks(ctx context.Context, from cursor) (uint64, error) {
	var none []struct{}
	meta, err := s.query(ctx, "/v1/health/state/any", `CheckID == "roost: none"`, from, &none)
	if err != nil {
		return 0, fmt.Errorf("checks: %w", err)
	}
	return meta.LastIndex, nil
}

// node is what a sweep and an identity need of a node.
type node struct {
	ID, Node                 string
	CreateIndex, ModifyIndex uint64
}

func (s *Source) nodes(ctx context.Context, from cursor) ([]node, *api.QueryMeta, error) {
	var nodes []node
	meta, err := s.query(ctx, "/v1/catalog/nodes", "", from, &nodes)
	if err != nil {
		return nil, nil, fmt.Errorf("nodes: %w", err)
	}
	return nodes, meta, nil
}

// registration is what a sweep needs of a registered instance.
type registration struct {
	ID, Service string
	ModifyIndex uint64
}

func (s *Source) registrations(ctx context.Context, node string) ([]registration, error) {
	var out struct{ Services []registration }
	if _, err := s.query(ctx, "/v1/catalog/node-services/"+node, s.members("Meta", "Kind"), s.begin(), &out); err != nil {
		return nil, fmt.Errorf("services of node %s: %w", node, err)
	}
	return out.Services, nil
}

// check is what a sweep needs of a check; one of a whole node has no service.
type check struct {
	Node, CheckID, ServiceName string
	ModifyIndex                uint64
}

func (s *Source) allChecks(ctx context.Context) ([]check, error) {
	var out []check
	if _, err := s.query(ctx, "/v1/health/state/any", "", s.begin(), &out); err != nil {
		return nil, fmt.Errorf("checks: %w", err)
	}
	return out, nil
}

// NodeName asks the agent for its node's name.
func (s *Source) NodeName(ctx context.Context) (string, error) {
	var self struct{ Config struct{ NodeName string } }
	if _, err := s.query(ctx, "/v1/agent/self", "", s.begin(), &self); err != nil {
		return "", fmt.Errorf("agent: %w", err)
	}
	return self.Config.NodeName, nil
}
