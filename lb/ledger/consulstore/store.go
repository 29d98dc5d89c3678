// Package consulstore keeps a ledger in Consul's KV store, where several
// replicas share it. Batches go in as Consul transactions; States and the list
// of living replicas come out.
//
// Below its prefix are the keys
//
//	format                              what the rest is written in
//	generation                          of the last batch, and how many keys of each kind there are
//	addresses/ADDRESS                   a record
//	owners/TENANT/SERVICE/KIND[/6]      its address: an owner has one of a kind and family
//	services/TENANT/SERVICE             an object
//	marks/KIND/NAME                     a mark
//	replicas/NAME                       a living replica; it vanishes with its session
//	restoring                           who is writing a lost ledger again; without format and generation
//
// in which names are escaped as in a URL's path. Each transaction checks the
// session that holds the replica's own key, so that a replica that was thought
// dead writes nothing, and sets generation only where it is what this replica
// has read, so that of two writers one succeeds.
//
// A transaction has at most 128 operations, 64 with older servers. The Ledger
// splits what is larger: a record with both its keys, an object and a mark is
// always written whole, a large change is a sequence of generations.
//
// Run, which renews the session, starts no goroutine. All methods may be called
// from any goroutine.
package consulstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

const (
	// DefaultTTL is how long a replica may be silent. Consul lets a session live
	// for up to twice its TTL.
	DefaultTTL    = 15 * time.Second
	defaultPrefix = "roost/"
	answerWithin  = 10 * time.Second // bounds a request that does not block
	blockFor      = 5 * time.Minute  // how long Consul holds a query without a change
	closeWithin   = 2 * time.Second
)

// Config is what a Store needs. Empty connection fields take Consul's own
// environment variables and defaults (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, ...).
type Config struct {
	Address   string // http://HOST:PORT, https://... or unix:///PATH
	TokenFile string // read again for each request

	CAFile, CertFile, KeyFile, ServerName string

	Prefix string // of all keys; default roost/
	Name   string // of this replica; no other living one has it
	// Identity tells this replica from others of the same name across restarts,
	// for example a random string kept in its data directory: after a crash it
	// takes its name back at once. Without one it waits for the old session's end.
	Identity string
	TTL      time.Duration // of the session; default DefaultTTL; Consul's least is 10 s

	Log *slog.Logger
	Now func() time.Time // default time.Now
}

// Store is a ledger.Shared and a ledger.Limited.
type Store struct {
	// Fixed at construction.
	config    Config
	client    *api.Client
	transport *http.Transport
	address   string

	mu         sync.Mutex // guards what follows; never held during a request
	loaded     bool
	entries    map[string]entry // of all keys but replicas/, as last read or written
	generation uint64           // that entries are of
	seen       uint64           // the highest generation ever read or written
	limit      ledger.Limit

	joining sync.Mutex // held while a session is made
	session string     // "" is none; guarded by mu
	self    replica    // what others are told; guarded by mu
}

var (
	_ ledger.Shared  = (*Store)(nil)
	_ ledger.Limited = (*Store)(nil)
)

// New returns a Store; it does not dial.
func New(c Config) (*Store, error) {
	if c.Name == "" {
		return nil, errors.New("a replica needs a name")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.TTL == 0 {
		c.TTL = DefaultTTL
	}
	c.Prefix = strings.Trim(c.Prefix, "/") + "/"
	if c.Prefix == "/" {
		c.Prefix = defaultPrefix
	}
	s := &Store{config: c, limit: ledger.Limit{Operations: newerOperations - ownOperations, Bytes: maxBytes}}
	s.self = replica{Replica: ledger.Replica{Name: c.Name}, Identity: c.Identity}
	cfg := api.DefaultConfig()
	if c.Address != "" {
		cfg.Address = c.Address
	}
	s.address = cfg.Address
	if c.CAFile != "" {
		cfg.TLSConfig.CAFile = c.CAFile
	}
	if c.CertFile != "" {
		cfg.TLSConfig.CertFile, cfg.TLSConfig.KeyFile = c.CertFile, c.KeyFile
	}
	if c.ServerName != "" {
		cfg.TLSConfig.Address = c.ServerName
	}
	s.transport = &http.Transport{
		DialContext:     (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		IdleConnTimeout: time.Minute, TLSHandshakeTimeout: 5 * time.Second,
	}
	if cfg.Scheme == "https" || strings.HasPrefix(cfg.Address, "https://") {
		var err error
		if s.transport.TLSClientConfig, err = api.SetupTLSConfig(&cfg.TLSConfig); err != nil {
			return nil, err
		}
		s.transport.TLSClientConfig.MinVersion = tls.VersionTLS12
	}
	cfg.Transport = s.transport
	var err error
	if s.client, err = api.NewClient(cfg); err != nil {
		return nil, fmt.Errorf("ledger in Consul %s: %w", s.address, err)
	}
	return s, nil
}

// Close ends the session, so that the others see at once that this replica is gone.
func (s *Store) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeWithin)
	defer cancel()
	s.mu.Lock()
	session := s.session
	s.session = ""
	s.mu.Unlock()
	defer s.transport.CloseIdleConnections()
	if session == "" {
		return nil
	}
	if _, err := s.client.Session().Destroy(session, s.write(ctx)); err != nil {
		return s.fail("replicas/"+s.config.Name, err)
	}
	return nil
}

// token is the content of the token file; "" leaves the client's own.
func (s *Store) token() string {
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

func (s *Store) write(ctx context.Context) *api.WriteOptions {
	return (&api.WriteOptions{Token: s.token()}).WithContext(ctx)
}

// query are the options of a read that the leader confirms: nobody decides by
// what is old. From an index other than 0 on it blocks.
func (s *Store) query(ctx context.Context, index uint64) (*api.QueryOptions, context.CancelFunc) {
	o := &api.QueryOptions{RequireConsistent: true, WaitIndex: index, Token: s.token()}
	limit := answerWithin
	if index > 0 {
		o.WaitTime = blockFor
		limit += blockFor + blockFor/8 // the server adds up to a sixteenth
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	return o.WithContext(ctx), cancel
}

// next is the index to block from: one that went backwards begins anew.
func next(last, got uint64) uint64 {
	if got < last {
		return 0
	}
	return max(got, 1)
}

// fail names the Consul and the key.
func (s *Store) fail(key string, err error) error {
	var status api.StatusError
	if errors.As(err, &status) && status.Code == http.StatusForbidden || strings.Contains(err.Error(), denied) {
		return fmt.Errorf("ledger in Consul %s, key %s%s: %w; its token needs key_prefix %q write and session \"\" write", s.address, s.config.Prefix, key, err, strings.TrimSuffix(s.config.Prefix, "/"))
	}
	return fmt.Errorf("ledger in Consul %s, key %s%s: %w", s.address, s.config.Prefix, key, err)
}

const denied = "Permission denied"
