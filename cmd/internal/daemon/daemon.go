// Package daemon is `roost run`: it wires sources, ledger, model, xDS, DNS and
// certificates together and keeps them running. A Config goes in; a Daemon that
// the admin API reads from comes out.
//
// Run owns every goroutine and returns after all of them have ended. One of
// them is the reconciler, which alone makes Snapshots and writes the ledger.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/drain"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/cmd/internal/replicas"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/discovery/consul"
	"github.com/roostmesh/roost/discovery/file"
	"github.com/roostmesh/roost/dns"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// Names of the sources.
const (
	SourceConfig = "config"
	SourceFile   = "file"
	SourceConsul = "consul"
)

const catalogDir = "catalog"

// Daemon is a running Roost.
type Daemon struct {
	// Fixed at construction.
	Events   *events.Log
	XDS      *xds.Server
	DNS      *dns.Server
	Registry *prometheus.Registry

	log        *slog.Logger
	start      *config.Config // what cannot change at run time is read from here
	store      ledger.Store
	shared     *sharedStore    // store, where replicas share it; else nil
	group      *replicas.Group // those replicas; nil without a shared store
	outcomes   *drain.Outcomes // of this replica's drains
	ledger     *ledger.Ledger
	aggregator *discovery.Aggregator
	static     *discovery.Static
	files      *certs.Files
	problems   *problemLog
	refusals   *refusals
	pinned     atomic.Pointer[pinState]
	reloads    chan reload
	commands   chan command
	drainers   sync.WaitGroup // that Run waits for
	freeAfter  atomic.Pointer[map[netip.Addr]time.Time]
	closing    atomic.Pointer[map[string]bool] // envoy.DrainNames whose connections are to be closed
	builds     atomic.Pointer[[]built]         // ledger generations by Snapshot, oldest first
	cleared    atomic.Uint64                   // generation up to which nobody has a quarantined address
	leaving    atomic.Bool                     // Run is about to end
	stopped    chan struct{}
	xdsOn      []xds.Listener
	rec        *reconciler // handed to the reconciler's goroutine by Run

	config   atomic.Pointer[config.Config]
	snapshot atomic.Pointer[lb.Snapshot]
	refused  atomic.Pointer[refusal] // of the last reload; nil when it was good
	progress atomic.Pointer[xds.Progress]

	world        atomic.Pointer[envoy.Translation]
	hostProblems atomic.Pointer[[]lb.Problem]
}

// New opens everything that a start can fail at: the ledger with its lock, and
// every socket. Nothing runs before Run; Close undoes New.
func New(ctx context.Context, c *config.Config, log *slog.Logger) (*Daemon, error) {
	d := &Daemon{
		Registry: prometheus.NewRegistry(), log: log, start: c, problems: newProblemLog(), refusals: newRefusals(),
		reloads: make(chan reload), commands: make(chan command), stopped: make(chan struct{}),
		files: certs.NewFiles(log, nil), outcomes: drain.NewOutcomes(), static: discovery.NewStatic(SourceConfig, c.Static),
	}
	if err := d.open(ctx, c); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Daemon) open(ctx context.Context, c *config.Config) (err error) {
	latency := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "roost_change_seconds", Help: "From a source's answer to the last proxy's ACK of the change.",
		Buckets: []float64{.001, .002, .004, .008, .015, .03, .06, .125, .25, .5, 1, 2, 5, 10},
	})
	d.Registry.MustRegister(latency, newSizes(d.world.Load))
	d.Events = events.New(nil, func(t time.Duration) { latency.Observe(t.Seconds()) })
	if err := d.openStore(ctx, c); err != nil {
		return err
	}
	if d.shared != nil {
		d.group = replicas.New(replicas.Config{Store: d.shared, Name: c.Model.Node, Self: d.self, Status: d.status, Log: d.log})
	}
	if err := d.sources(c); err != nil {
		return err
	}
	if err := d.listenXDS(ctx, c); err != nil {
		return err
	}
	if err := d.listenDNS(ctx, c); err != nil {
		return err
	}
	d.config.Store(c)
	d.rec = newReconciler(d, time.Now)
	d.rec.catalog, d.rec.proxies, d.rec.host = d.aggregator.Catalog, d.XDS, hostAddresses(c.Model)
	d.rec.setConfig(c)
	return nil
}

func (d *Daemon) sources(c *config.Config) error {
	cfg := discovery.Config{Sources: []discovery.Source{d.static}, Log: d.log, Dir: filepath.Join(c.DataDir, catalogDir), Registerer: d.Registry}
	if c.InstancePath != "" {
		cfg.Sources = append(cfg.Sources, file.New(file.Config{Name: SourceFile, Path: c.InstancePath, Node: c.DefaultNode(), Log: d.log}))
	}
	if k := c.Consul; k != nil {
		cc := consulConfig(k)
		cc.Log, cc.Registerer = d.log, d.Registry
		source, err := consul.New(cc)
		if err != nil {
			return fmt.Errorf("discovery.consul: %w", err)
		}
		cfg.Sources = append(cfg.Sources, source)
		cfg.Remember, cfg.Guard = append(cfg.Remember, SourceConsul), append(cfg.Guard, SourceConsul)
	}
	d.aggregator = discovery.NewAggregator(cfg)
	return nil
}

func (d *Daemon) listenXDS(ctx context.Context, c *config.Config) error {
	d.XDS = xds.New(xds.Config{
		Log: d.log, Node: c.Model.Node, Registry: d.Registry, Admit: d.admit, OnProgress: d.onProgress,
		OnConnect: func(p xds.ProxyStatus) {
			d.Events.Add(events.Fact(events.ProxyConnected, p.ID, "Envoy "+p.EnvoyVersion))
		},
		OnDisconnect: func(p xds.ProxyStatus) { d.Events.Add(events.Fact(events.ProxyDisconnected, p.ID, "")) },
		OnReject:     d.onReject,
		OnAck:        d.Events.Acked,
		Closing:      d.isClosing,
	})
	l, err := listen(ctx, c.XDS.Address)
	if err != nil {
		return fmt.Errorf("xds.address: %w", err)
	}
	d.xdsOn = append(d.xdsOn, xds.Listener{Listener: l})
	for _, s := range c.XDS.Sockets {
		l, err := listenUnix(ctx, s.Path, s.Mode, s.Group)
		if err != nil {
			return fmt.Errorf("xds.sockets: %w", err)
		}
		d.xdsOn = append(d.xdsOn, xds.Listener{Listener: l, Tenant: s.Tenant})
	}
	return nil
}

func (d *Daemon) listenDNS(ctx context.Context, c *config.Config) error {
	cfg := dns.Config{Snapshot: d.snapshot.Load, Domain: c.Model.Domain, Node: c.Model.Node, Log: d.log, Registerer: d.Registry}
	for _, l := range c.DNS.Listen {
		cfg.Listen = append(cfg.Listen, dns.Listen{Addr: l.Address, Tenant: l.Tenant, Optional: l.Default})
	}
	for _, f := range c.DNS.Forward {
		cfg.Forward = append(cfg.Forward, dns.Forwarder{Zone: f.Zone, To: f.To, Files: f.Files})
	}
	var err error
	if d.DNS, err = dns.New(cfg); err != nil {
		return err
	}
	return d.DNS.Listen(ctx)
}

// listen opens a TCP socket; the error names the address.
func listen(ctx context.Context, at netip.AddrPort) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", at.String())
	var op *net.OpError
	if errors.As(err, &op) {
		return nil, fmt.Errorf("%s: %w", at, op.Err)
	}
	return l, err
}

// Sockets are the sockets' real addresses.
func (d *Daemon) Sockets() (xdsAt, dnsAt string) {
	dnsAt = ""
	if a := d.DNS.Addrs(); len(a) > 0 {
		dnsAt = a[0].String()
	}
	return d.xdsOn[0].Addr().String(), dnsAt
}

// Run runs until ctx ends or something fails that nothing can go on without.
func (d *Daemon) Run(ctx context.Context) error {
	defer close(d.stopped)
	group, ctx := errgroup.WithContext(ctx)
	// What the ledger knows is served before any source has answered.
	_ = d.rec.build(ctx) // a Problem says so
	group.Go(func() error { return d.aggregator.Run(ctx) })
	group.Go(func() error { return d.XDS.Run(ctx, d.xdsOn...) })
	group.Go(func() error { return d.DNS.Serve(ctx) })
	group.Go(func() error { return d.files.Run(ctx) })
	group.Go(func() error { return d.rec.run(ctx) })
	group.Go(func() error { return d.watchConfig(ctx) })
	if d.shared != nil {
		group.Go(func() error { return d.shared.Run(ctx) })
		group.Go(func() error { return d.group.Run(ctx) })
		group.Go(func() error { return d.followStore(ctx) })
		group.Go(func() error { return d.rememberStore(ctx) })
	}
	err := group.Wait()
	d.drainers.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Leave has this Roost say that it is not ready any more, and take no more
// proxies: Run's context is about to end.
func (d *Daemon) Leave() {
	d.leaving.Store(true)
	d.XDS.Drain()
}

// Close lets go of what New opened; after Run, or instead of it.
func (d *Daemon) Close() {
	for _, l := range d.xdsOn {
		_ = l.Close()
	}
	if d.DNS != nil {
		d.DNS.Close()
	}
	if d.store != nil {
		if err := d.store.Close(); err != nil {
			d.log.Warn("ledger was not closed cleanly", "error", err)
		}
	}
}

// Snapshot is the world of now; nil before Run.
func (d *Daemon) Snapshot() *lb.Snapshot { return d.snapshot.Load() }

// Config is the configuration in force.
func (d *Daemon) Config() *config.Config { return d.config.Load() }

// Records are the ledger's records, by address.
func (d *Daemon) Records() []ledger.Record { return d.ledger.Records() }

// Release lets go of the instances that are held although their source lost
// them, on every replica; an empty source is all. It returns after the wish is
// written down.
func (d *Daemon) Release(ctx context.Context, source string) error {
	return d.do(ctx, func(r *reconciler) error {
		m := ledger.Mark{Kind: ledger.MarkRelease, Name: cmp.Or(source, everySource), Since: time.Now()}
		r.stage(func(tx *ledger.Tx) { tx.PutMark(m) })
		return nil
	})
}

// admit completes the identity that a proxy claims.
func (d *Daemon) admit(id lb.Identity) (lb.Identity, error) {
	if !id.Beside() || id.Node != "" {
		return id, nil
	}
	s := d.snapshot.Load()
	svc := s.Services.Get(lb.Key{Tenant: id.Tenant, Service: id.Service})
	if svc == nil {
		return id, nil
	}
	var nodes []string
	for _, e := range svc.Endpoints {
		if e.Instance.ID == id.Instance {
			nodes = append(nodes, e.Instance.Node)
		}
	}
	if len(nodes) > 1 {
		return id, fmt.Errorf("%d instances are called %s/%s/%s, on the nodes %v: start this one as %s/%s/%s@NODE", len(nodes), id.Tenant, id.Service, id.Instance, nodes, id.Tenant, id.Service, id.Instance)
	}
	return id, nil
}

func (d *Daemon) onProgress(p xds.Progress) {
	before := d.acked()
	d.progress.Store(&p)
	d.Events.Progress(p.Pushed, p.Acked)
	if d.group != nil && d.acked() != before {
		d.group.Poke()
	}
}

// observeProgress fills receipts of changes that concerned no proxy.
func (d *Daemon) observeProgress() {
	if p := d.progress.Load(); p != nil {
		d.Events.Progress(p.Pushed, p.Acked)
	}
}

// listenUnix opens a unix socket in the place of one that nobody serves.
func listenUnix(ctx context.Context, path string, mode os.FileMode, group string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if conn, err := net.Dial("unix", path); err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%s: address already in use", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := errors.Join(os.Chmod(path, mode), chgrp(path, group)); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// ListenAdmin opens the admin API's sockets: TCP, and the unix socket.
func ListenAdmin(ctx context.Context, c *config.Config) (tcp, unix net.Listener, err error) {
	if tcp, err = listen(ctx, c.Admin.Address); err != nil {
		return nil, nil, fmt.Errorf("admin.address: %w", err)
	}
	if unix, err = listenUnix(ctx, c.Admin.Socket, 0o600, ""); err != nil {
		_ = tcp.Close()
		return nil, nil, fmt.Errorf("admin.socket: %w", err)
	}
	return tcp, unix, nil
}
