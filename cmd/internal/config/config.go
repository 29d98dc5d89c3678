// Package config turns roost.yaml into what Roost runs on. Files and the
// environment go in; a Config, or every mistake with its file, line and column,
// comes out. Mistakes that only the world can show (a service that nobody has
// registered, a pool that is full) are not looked for here: lb says them as
// Problems.
//
// The package starts no goroutine.
package config

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
)

// Config is everything that an operator can say.
type Config struct {
	Path  string   // the main file; "" is the embedded default
	Files []string // every file that was read
	Watch []string // Files and the patterns of include, whose matches may change

	DataDir string
	Admin   Admin
	XDS     XDS
	Log     Log
	DNS     DNS
	Consul  *Consul
	Store   *Store // nil: a file in DataDir
	// InstancePath is discovery.file.path; "" is none.
	InstancePath string
	Quarantine   time.Duration
	Model        *lb.Config
	Static       []discovery.Instance // services[].instances

	hash string
}

// Store is the ledger that replicas share in Consul.
type Store struct{ Prefix string }

// DefaultNode is where an instance runs that says nothing: on this host; with
// replicas that share a store, which read the same file, on no host.
func (c *Config) DefaultNode() string {
	if c.Store != nil {
		return ""
	}
	return c.Model.Node
}

// Hash is a short hash of what a Roost is configured to serve. It is the same on
// hosts that have the same file, whatever their own name, paths and ports.
func (c *Config) Hash() string { return c.hash }

// sum fills in the hash.
func (c *Config) sum() error {
	model := *c.Model
	model.Node = ""
	data, err := json.Marshal(struct {
		Model      *lb.Config
		Static     []discovery.Instance
		Quarantine time.Duration
	}{&model, c.Static, c.Quarantine})
	if err != nil {
		return fmt.Errorf("config cannot be compared with that of others: %w", err)
	}
	sum := sha256.Sum256(origins.ReplaceAll(data, nil))
	c.hash = hex.EncodeToString(sum[:8])
	return nil
}

// origins are the places in files, which differ from host to host.
var origins = regexp.MustCompile(`"(Origin|origin)":"[^"]*",?`)

// Admin is where the admin API listens.
type Admin struct {
	Address netip.AddrPort
	Socket  string // a unix socket
}

// XDS is where Envoys connect.
type XDS struct {
	Address netip.AddrPort
	Sockets []Socket
}

// Socket is a unix socket that serves one tenant.
type Socket struct {
	Path, Tenant, Group string
	Mode                os.FileMode
}

// Log says how Roost logs.
type Log struct{ Level, Format string }

// DNS is the DNS server.
type DNS struct {
	Listen  []DNSListen
	Forward []Forward
}

// DNSListen is one address of the DNS server; a Tenant binds its view.
type DNSListen struct {
	Address netip.AddrPort
	Tenant  string
	Default bool // not written by the operator
}

// Forward says where foreign names go.
type Forward struct {
	Zone  string // "" is every name
	To    []netip.AddrPort
	Files []string // resolv.conf files
}

// Consul is the Consul source.
type Consul struct {
	Address, TokenFile, DefaultTenant, TenantMeta string
	MaxConnections                                int
	CAFile, CertFile, KeyFile, ServerName         string
}

// ErrNotFound is wrapped when the file that was asked for is not there.
var ErrNotFound = errors.New("no such file")

// Find returns the config file to use: path, else $ROOST_CONFIG, else
// ./roost.yaml, else /etc/roost/roost.yaml, else "" for the embedded default.
func Find(path string) string {
	if path != "" {
		return path
	}
	if p := os.Getenv("ROOST_CONFIG"); p != "" {
		return p
	}
	for _, p := range []string{"roost.yaml", "/etc/roost/roost.yaml"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// Load reads the file at path and what it includes; "" is the embedded default.
// The error is a strict.Errors with every mistake, or wraps ErrNotFound. A file
// that names no node is of the host by its host name.
func Load(path string) (*Config, error) {
	return LoadOn(path, func(*Config) string { return "" })
}

// LoadOn is Load on a host whose name node knows where the file does not say
// it; "" leaves the host name. It is asked with Consul and DataDir filled in.
func LoadOn(path string, node func(*Config) string) (*Config, error) {
	doc, files, errs, err := read(path)
	if err != nil {
		return nil, err
	}
	b := builder{doc: doc, errs: errs, node: node, config: &Config{Path: path, Files: files, Watch: files, Model: &lb.Config{}}}
	for _, pattern := range doc.Include {
		b.config.Watch = append(b.config.Watch, resolve(path, pattern))
	}
	b.build()
	if len(b.errs) > 0 {
		return nil, inOrder(apart(b.errs, len(errs)), files)
	}
	return b.config, b.config.sum()
}

// apart leaves out what follows from the first mistakes, those of reading: a
// value that could not be read also looks as if it were missing.
func apart(errs strict.Errors, reading int) strict.Errors {
	type at struct{ place, path string }
	unread := map[at]bool{}
	for _, e := range errs[:reading] {
		unread[at{e.Place, e.Path}] = true
	}
	out := slices.Clone(errs[:reading])
	for _, e := range errs[reading:] {
		if !unread[at{e.Place, e.Path}] && !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return out
}

// inOrder sorts mistakes as they stand in the files.
func inOrder(errs strict.Errors, files []string) strict.Errors {
	place := func(e strict.Error) (file, line, column int) {
		for i, f := range files {
			if rest, ok := strings.CutPrefix(e.Place, f+":"); ok {
				_, _ = fmt.Sscanf(rest, "%d:%d", &line, &column)
				return i, line, column
			}
		}
		return len(files), 0, 0
	}
	slices.SortStableFunc(errs, func(a, b strict.Error) int {
		f1, l1, c1 := place(a)
		f2, l2, c2 := place(b)
		return cmp.Or(cmp.Compare(f1, f2), cmp.Compare(l1, l2), cmp.Compare(c1, c2))
	})
	return errs
}

func read(path string) (*document, []string, strict.Errors, error) {
	doc := &document{}
	if path == "" {
		return doc, nil, nil, nil
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil, fmt.Errorf("config %s: %w: name a file with --config or $ROOST_CONFIG", path, ErrNotFound)
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("config: %w", err)
	}
	d := decoding(path)
	d.Decode(data, doc)
	files := []string{path}
	for _, pattern := range doc.Include {
		matches, err := filepath.Glob(resolve(path, pattern))
		if err != nil {
			d.Errors = append(d.Errors, doc.Errorf("include", "%q is not a file pattern: %v", pattern, err))
		}
		if len(matches) == 0 && !strings.ContainsAny(pattern, "*?[") {
			d.Errors = append(d.Errors, doc.Errorf("include", "%s does not exist", pattern))
		}
		for _, m := range matches {
			files = append(files, m)
			d.Errors = append(d.Errors, include(doc, m)...)
		}
	}
	return doc, files, d.Errors, nil
}

func decoding(path string) *strict.Decoding {
	return &strict.Decoding{File: path, Expand: func(s string) (string, error) { return expand(path, s) }}
}

// include merges one further file: it may hold tenants, services, listeners
// and routes.
func include(doc *document, path string) strict.Errors {
	data, err := os.ReadFile(path)
	if err != nil {
		return strict.Errors{{Place: path, Message: err.Error()}}
	}
	var more document
	d := decoding(path)
	d.Decode(data, &more)
	for _, key := range strict.Keys(documentType) {
		if more.Has(key) && !slices.Contains([]string{"tenants", "services", "listeners", "routes"}, key) {
			d.Errors = append(d.Errors, more.Errorf(key, "belongs into the main file; an included file holds tenants, services, listeners and routes"))
		}
	}
	for name, t := range more.Tenants {
		if first, twice := doc.Tenants[name]; twice {
			d.Errors = append(d.Errors, t.Errorf("", "tenant %s is declared twice (first at %s)", name, first.String()))
			continue
		}
		if doc.Tenants == nil {
			doc.Tenants = map[string]tenantDoc{}
		}
		doc.Tenants[name] = t
	}
	doc.Services = append(doc.Services, more.Services...)
	doc.Listeners = append(doc.Listeners, more.Listeners...)
	doc.Routes = append(doc.Routes, more.Routes...)
	return d.Errors
}

var variable = regexp.MustCompile(`\$\{([^}]*)\}`)

// expand replaces ${VAR} and ${file:PATH}; $${ is a literal ${.
func expand(path, s string) (string, error) {
	var bad error
	const literal = "\x00"
	s = strings.ReplaceAll(s, "$${", literal)
	s = variable.ReplaceAllStringFunc(s, func(m string) string {
		name := m[2 : len(m)-1]
		if p, ok := strings.CutPrefix(name, "file:"); ok {
			data, err := os.ReadFile(resolve(path, p))
			if err != nil {
				bad = errors.Join(bad, fmt.Errorf("%s: %w", m, err))
			}
			return strings.TrimRight(string(data), "\r\n")
		}
		v, ok := os.LookupEnv(name)
		if !ok {
			bad = errors.Join(bad, fmt.Errorf("%s: the environment variable %s is not set", m, name))
		}
		return v
	})
	return strings.ReplaceAll(s, literal, "${"), bad
}

// resolve makes p, written in file, a path from here.
func resolve(file, p string) string {
	if p == "" || filepath.IsAbs(p) || file == "" {
		return p
	}
	return filepath.Join(filepath.Dir(file), p)
}
