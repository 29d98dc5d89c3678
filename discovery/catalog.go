// Package discovery says which instances exist. Facts from several sources
// (Consul, watched files, the configuration itself) go in as Updates; one
// immutable Catalog comes out. It decides nothing about routing.
//
// The Aggregator owns one goroutine (Run) that merges; each Source runs in a
// goroutine that the Aggregator starts and waits for. Readers of the Catalog
// take no lock.
package discovery

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Key names a service: one name inside one tenant.
type Key struct {
	Tenant  string `json:"tenant"`
	Service string `json:"service"`
}

// String gives "tenant/service".
func (k Key) String() string { return k.Tenant + "/" + k.Service }

// Compare orders keys by tenant, then by service.
func (k Key) Compare(o Key) int {
	return cmp.Or(strings.Compare(k.Tenant, o.Tenant), strings.Compare(k.Service, o.Service))
}

// Health is what a source says of an instance.
type Health string

// The healths of the contract. Passing, warning and unknown (a source without
// checks) take traffic; critical does not; maintenance drains.
const (
	Passing     Health = "passing"
	Warning     Health = "warning"
	Critical    Health = "critical"
	Maintenance Health = "maintenance"
	Unknown     Health = "unknown"
)

// Serving tells whether an instance of this health takes new traffic.
func (h Health) Serving() bool { return h == Passing || h == Warning || h == Unknown }

// Port is one port that an instance listens on. An empty name means the
// service's only, or first, port.
type Port struct {
	Name   string `json:"name"`
	Number uint16 `json:"number"`
}

// WantedPort is a service port as a registration asks for it.
type WantedPort struct {
	Name     string `json:"name"`
	Dial     uint16 `json:"dial"`     // what callers dial
	Protocol string `json:"protocol"` // http http2 grpc tcp
	Guessed  bool   `json:"guessed"`  // no explicit meta: derived from the protocol or the instance
}

// Instance is one running copy of a service. It is immutable once published.
type Instance struct {
	ID      string     `json:"id"`   // what its source calls it
	Node    string     `json:"node"` // where it runs; "" is no node
	Key     Key        `json:"key"`
	Address netip.Addr `json:"address"`
	Ports   []Port     `json:"ports"`
	Zone    string     `json:"zone"`
	Version string     `json:"version"`
	Weight  uint32     `json:"weight"` // at least 1
	Health  Health     `json:"health"`
	Inbound uint16     `json:"inbound"` // port of its sidecar's inbound listener; 0 is none
	// NodeAddress is the node's own address where the source knows it.
	NodeAddress netip.Addr `json:"node_address"`
	Origin      string     `json:"origin"` // FILE:LINE:COL or consul:NODE/ID
	Source      string     `json:"source"`
	// Wants is what the registration says of the service itself; nil when the
	// source only lists instances.
	Wants []WantedPort `json:"wants"`
	// NodeDown says that it is critical because its whole node is.
	NodeDown bool `json:"node_down"`
	// Stale is set by the Aggregator: the source has not confirmed it lately.
	Stale bool `json:"stale"`
	// Held is set by the Aggregator: the source lost it in a way that proves
	// nothing. What is held is stale, too.
	Held bool `json:"held"`
}

// Name is the instance's full name where the id alone is unique:
// tenant/service/id.
func (i *Instance) Name() string { return i.Key.String() + "/" + i.ID }

// QualifiedName is tenant/service/id@node; without a node it is the Name.
func (i *Instance) QualifiedName() string {
	if i.Node == "" {
		return i.Name()
	}
	return i.Name() + "@" + i.Node
}

func compareInstances(a, b *Instance) int {
	return cmp.Or(a.Key.Compare(b.Key), strings.Compare(a.ID, b.ID), strings.Compare(a.Node, b.Node), strings.Compare(a.Source, b.Source))
}

func sameInstance(a, b *Instance) bool {
	return a.ID == b.ID && a.Node == b.Node && a.Key == b.Key && a.Address == b.Address &&
		slices.Equal(a.Ports, b.Ports) && a.Zone == b.Zone && a.Version == b.Version && a.Weight == b.Weight &&
		a.Health == b.Health && a.NodeAddress == b.NodeAddress && a.Inbound == b.Inbound && a.Origin == b.Origin && a.Source == b.Source &&
		slices.Equal(a.Wants, b.Wants) && a.NodeDown == b.NodeDown && a.Stale == b.Stale && a.Held == b.Held
}

// Problem is a mistake or a danger that a person has to mend. Everything else
// goes on.
type Problem struct {
	Code     string    `json:"code"`     // stable word, snake_case
	Severity string    `json:"severity"` // error warning info
	Object   string    `json:"object"`   // what it is about: acme/shop, a proxy, a listener
	Place    string    `json:"place"`    // FILE:LINE:COL, consul:NODE/ID, flag, path
	Message  string    `json:"message"`
	Fix      string    `json:"fix"` // the way out
	Since    time.Time `json:"since"`
}

// The severities of a Problem.
const (
	SeverityError   = "error"
	SeverityWarning = "warning"
	SeverityInfo    = "info"
)

// Update is all that one source knows of one scope: it replaces what that
// source said of that scope before.
type Update struct {
	Source string
	// Scope is the unit that the source replaces as a whole: a Consul service
	// name, a file's path.
	Scope     string
	Instances []Instance
	Problems  []Problem
	Index     uint64    // the source's own index; 0 when it has none
	Seen      time.Time // when the source's answer had arrived
	// Regressed says that the source's state was lost or restored, or that it
	// hides a part of it, so absence proves nothing and missing instances are held.
	Regressed bool
	// Identity tells one incarnation of the source's state from another: a
	// registry that was wiped, or another one in its place. Where it differs
	// from what a scope was last said under, the scope counts as Regressed. ""
	// says nothing.
	Identity string
	// Err is set when the source failed: the last good set stays and is stale.
	// With an empty Scope the whole source is stale.
	Err error
	// Complete ends the source's first pass; Scopes then lists every scope it
	// knows, and scopes remembered from an earlier run that are not in it go.
	Complete bool
	Scopes   []string
}

// Group is all instances of one service, ordered by id and node. Unchanged
// groups keep their pointer from one Catalog to the next.
type Group struct {
	Key       Key
	Instances []*Instance
	// Of the last change that a source told: its name, its index, and when its
	// answer had arrived. A mark of staleness is no such change.
	Source string
	Index  uint64
	Seen   time.Time
}

// SourceStatus is how a source fares.
type SourceStatus struct {
	Name      string    `json:"name"`
	Ready     bool      `json:"ready"`      // it has answered, or its last good state was loaded
	Stale     bool      `json:"stale"`      // its last answer was an error
	Since     time.Time `json:"since"`      // of Stale's last change
	LastError string    `json:"last_error"` // "" when it never failed
	Held      int       `json:"held"`       // instances kept although the source lost them
	HeldSince time.Time `json:"held_since"` // zero when none is
	HeldWhy   string    `json:"held_why"`   // "" when none is
}

// Catalog is every instance that is known, at one moment. It is immutable.
type Catalog struct {
	Version  uint64
	Groups   Table[Key, *Group]
	Sources  []SourceStatus // ordered by name
	Problems []Problem
	// Ready is set when every source has answered once or its last good state
	// was loaded.
	Ready bool
}

// NewCatalog makes a ready Catalog of instances that all exist at once; of two
// with the same id and node the first one stays.
func NewCatalog(instances []Instance) *Catalog {
	m := newMerge(Config{})
	const all = "all"
	m.apply(Update{Source: all, Scope: all, Instances: instances, Complete: true, Scopes: []string{all}})
	c := m.catalog()
	c.Ready = true
	return c
}
