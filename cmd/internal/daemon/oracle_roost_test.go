package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/drain"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// The world of the oracle is small, so that collisions, full pools and reuse
// are what happens all the time.
var (
	oraclePools     = []netip.Prefix{netip.MustParsePrefix("127.128.0.0/29"), netip.MustParsePrefix("fd00:1::/125")}
	oracleDedicated = lb.DedicatedPool{Name: "public", Prefix: netip.MustParsePrefix("198.51.100.0/29")}
	oracleTenants   = []string{"acme", "globex"}
	oracleKeys      = func() (keys []lb.Key) {
		for _, tenant := range oracleTenants {
			for n := range 6 {
				keys = append(keys, lb.Key{Tenant: tenant, Service: fmt.Sprint("s", n)})
			}
		}
		return keys
	}()
	// oracleBodies are what a service may say of itself.
	oracleBodies = []string{
		`{"ports":[{"name":"a","port":80,"protocol":"tcp"}]}`,
		`{"ports":[{"name":"a","port":80,"protocol":"http"}]}`,
		`{"ports":[{"name":"b","port":81,"protocol":"tcp"},{"name":"a","port":80,"protocol":"http"}]}`,
	}
	oraclePorts = []uint16{80, 81}
)

// withDedicated asks for a dedicated IP, too.
func withDedicated(body string) string {
	return body[:len(body)-1] + `,"dedicated_ip":{"pool":"` + oracleDedicated.Name + `"}}`
}

// How a write of the ledger ends.
const (
	writeWell  = iota
	writeFull  // the disk is full: nothing is written
	writeDying // it is on the disk, and Roost dies before it knows
)

var errOracleDisk = errors.New("no space left on device")

// unreliable is a disk on which writes can fail.
type unreliable struct {
	ledger.Store
	mode  int
	tries int
}

func (u *unreliable) Apply(ctx context.Context, b ledger.Batch) error {
	u.tries++
	switch u.mode {
	case writeFull:
		return errOracleDisk
	case writeDying:
		return errors.Join(u.Store.Apply(ctx, b), errOracleDisk)
	}
	return u.Store.Apply(ctx, b)
}

// model is what must be true of services, whatever Roost does.
type model struct {
	recorded map[lb.Key]bool // made through the API or seen in Consul, and not deleted
	declared map[lb.Key]string
	since    map[lb.Key]lb.Addresses // what each service that exists has had since its creation
}

// world is a Roost on a simulated host.
type world struct {
	t interface {
		Helper()
		Logf(format string, args ...any)
		Fatalf(format string, args ...any)
	}
	chance *rapid.T // nil where a test says itself what happens
	now    time.Time

	// Roost; nil while it is down.
	d    *Daemon
	r    *reconciler
	disk *unreliable

	dir       string // the data directory; another one after each death
	root      string
	deaths    int
	backups   []string
	catalog   *discovery.Catalog
	instances []discovery.Instance
	stands    map[envoy.Name][]xds.Stand // who refuses what
	known     bool                       // a source has answered since the start
	wiped     bool                       // Consul is empty
	started   int                        // instances so far

	quarantine, ttl time.Duration
	model           model
	unsure          bool            // Roost died before it could say what it had written
	records         []ledger.Record // after the last build
	checked         uint64          // Snapshot version
	proxies         []*proxy        // alive
	named           int             // proxies so far
	remember        time.Duration   // of those that have gone
	told            map[answer]time.Time
	decoded         *decoder
	seen            *tally
	last            map[netip.Addr]ledger.Owner // who had an address last
}

// tally counts what has happened over all runs, so that nobody is content with
// runs in which nothing does.
type tally struct{ steps, builds, quarantined, again, reused, freed, healed, reached, silent, forgotten int }

// randomWorld is a world in which things happen by chance.
func randomWorld(t *rapid.T, root string, seen *tally) *world {
	quarantine, ttl := rapid.IntRange(2, 8).Draw(t, "quarantine"), rapid.IntRange(1, 12).Draw(t, "ttl")
	w := newWorld(root, seen, time.Duration(quarantine)*time.Second, time.Duration(ttl)*time.Second)
	w.t, w.chance = t, t
	w.begin()
	return w
}

// quietWorld is a world in which nothing happens but what a test says.
func quietWorld(t *testing.T) *world {
	w := newWorld(t.TempDir(), &tally{}, 4*time.Second, time.Second)
	w.t = t
	w.begin()
	t.Cleanup(w.close)
	return w
}

func newWorld(root string, seen *tally, quarantine, ttl time.Duration) *world {
	return &world{
		now: time.Unix(1_700_000_000, 0), root: root, known: true, quarantine: quarantine, ttl: ttl,
		model: model{recorded: map[lb.Key]bool{}, declared: map[lb.Key]string{}, since: map[lb.Key]lb.Addresses{}},
		told:  map[answer]time.Time{}, decoded: newDecoder(), seen: seen, last: map[netip.Addr]ledger.Owner{},
	}
}

func (w *world) begin() {
	w.dir = w.fresh()
	w.collect()
	w.start()
}

func (w *world) close() {
	if w.d != nil {
		_ = w.d.store.Close()
	}
}

func (w *world) fresh() string {
	w.deaths++
	dir := filepath.Join(w.root, fmt.Sprint("data", w.deaths))
	w.must(os.Mkdir(dir, 0o700))
	return dir
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatalf("%v", err)
	}
}

// start opens Roost as New and Run do, without sockets.
func (w *world) start() {
	bolt, err := ledger.OpenBolt(filepath.Join(w.dir, ledgerFile))
	w.must(err)
	w.disk = &unreliable{Store: bolt}
	journal, err := ledger.NewJournal(w.disk, filepath.Join(w.dir, journalFile))
	w.must(err)
	clock := func() time.Time { return w.now }
	l, err := ledger.Open(context.Background(), journal, clock)
	w.must(err)
	if journal.Healed() != "" {
		w.seen.healed++
	}
	log := slog.New(slog.DiscardHandler)
	c := w.config()
	w.d = &Daemon{
		Events: events.New(clock, nil), log: log, start: c, problems: newProblemLog(), refusals: newRefusals(), store: journal, ledger: l,
		commands: make(chan command), stopped: make(chan struct{}), outcomes: drain.NewOutcomes(),
		files: certs.NewFiles(log, nil), static: discovery.NewStatic(SourceConfig, nil),
	}
	w.d.config.Store(c)
	w.remember = 0
	w.r = newReconciler(w.d, clock)
	w.r.catalog, w.r.proxies = func() *discovery.Catalog { return w.catalog }, w
	w.r.setConfig(c)
	w.d.rec = w.r
	w.checked, w.records = 0, w.remembered()
	w.build()
}

// remembered is what must still be true of the ledger after a restart.
func (w *world) remembered() []ledger.Record {
	if !w.unsure {
		w.checkLedger(w.d.ledger.Records())
		return w.records
	}
	w.unsure = false
	w.model.recorded = map[lb.Key]bool{}
	for _, o := range w.d.ledger.Objects() {
		w.model.recorded[keyOf(o.Owner)] = true
	}
	return w.d.ledger.Records()
}

// die is the end of Roost's process: what is on the disk at this moment is all
// that is left. No proxy is told; each keeps what it has.
func (w *world) die() {
	next := w.fresh()
	for _, name := range []string{ledgerFile, journalFile} {
		w.copyFile(filepath.Join(w.dir, name), filepath.Join(next, name))
	}
	w.must(w.d.store.Close()) // lets go of files that nobody reads any more
	w.must(os.RemoveAll(w.dir))
	w.dir, w.d, w.r, w.disk = next, nil, nil, nil
	for _, p := range w.proxies {
		p.cut(w)
		p.noticed(w)
		p.conn = nil
	}
}

func (w *world) copyFile(from, to string) {
	data, err := os.ReadFile(from)
	w.must(err)
	w.must(os.WriteFile(to, data, 0o600))
}

// config is roost.yaml of now.
func (w *world) config() *config.Config {
	c := &config.Config{Quarantine: w.quarantine, Model: &lb.Config{
		Domain: "roost", Node: "h1", TTL: w.ttl, InternalPools: oraclePools, DedicatedPools: []lb.DedicatedPool{oracleDedicated},
		Loopback: lb.LoopbackAll, LoopbackSet: true,
	}}
	for _, tenant := range oracleTenants {
		c.Model.Tenants = append(c.Model.Tenants, &lb.Tenant{Name: tenant})
	}
	for _, key := range oracleKeys {
		body, ok := w.model.declared[key]
		if !ok {
			continue
		}
		spec, err := config.ParseService(key, []byte(body), c.Model.DedicatedPools)
		w.must(err)
		spec.Origin = "roost.yaml:1:1"
		c.Model.Services = append(c.Model.Services, spec)
	}
	return c
}

// reload is what the reconciler does with a changed file.
func (w *world) reload() {
	if w.r == nil {
		return
	}
	c := w.config()
	w.d.config.Store(c)
	w.r.setConfig(c)
	w.build()
}

// collect makes the Catalog of the instances of now.
func (w *world) collect() {
	switch {
	case !w.known:
		w.catalog = &discovery.Catalog{}
	case w.wiped:
		w.catalog = discovery.NewCatalog(nil)
	default:
		w.catalog = discovery.NewCatalog(slices.Clone(w.instances))
	}
}

func (w *world) build() {
	w.built(w.r.build(context.Background()))
}

// built looks at what a build has made.
func (w *world) built(err error) {
	w.seen.builds++
	if err == nil {
		for key, group := range w.catalog.Groups.All() {
			wants := slices.ContainsFunc(group.Instances, func(i *discovery.Instance) bool { return i.Wants != nil })
			if _, declared := w.model.declared[key]; !declared && wants {
				w.model.recorded[key] = true
			}
		}
	}
	w.checkBuild(err)
}

// command runs an API call through the reconciler, as a request would.
func (w *world) command(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	w.r.execute(context.Background(), <-w.d.commands)
	return <-done
}

func (w *world) put(key lb.Key, body string) {
	before := w.quarantined(key)
	err := w.command(func() error {
		_, _, err := w.d.PutService(context.Background(), key, []byte(body), Condition{})
		return err
	})
	_, declared := w.model.declared[key]
	switch {
	case declared != errors.Is(err, ErrDeclared), err != nil && !declared && w.disk.mode == writeWell:
		w.t.Fatalf("put %s, declared %v: %v", key, declared, err)
	case err == nil:
		w.model.recorded[key] = true
	}
	w.built(err)
	w.sameAgain(key, before)
	w.t.Logf("put %s %s: %v", key, body, err)
}

func (w *world) remove(key lb.Key) {
	err := w.command(func() error {
		_, err := w.d.DeleteService(context.Background(), key, Condition{})
		return err
	})
	if err == nil {
		delete(w.model.recorded, key)
	}
	w.built(err)
	w.t.Logf("delete %s: %v", key, err)
}

// quarantined are the addresses of an owner that wait to be free.
func (w *world) quarantined(key lb.Key) (out []ledger.Record) {
	for _, r := range w.records {
		if r.Owner == ownerOf(key) && r.State == ledger.Quarantined {
			out = append(out, r)
		}
	}
	return out
}

// sameAgain: who is created again in time has its address back.
func (w *world) sameAgain(key lb.Key, before []ledger.Record) {
	for _, was := range before {
		now, ok := w.d.ledger.Lookup(was.Owner, was.Kind, was.Address.Is6())
		if !ok || now.Address != was.Address {
			w.t.Fatalf("%s came back within the quarantine of %s and has %+v", key, was.Address, now)
		}
	}
}

// pass lets time go by, with all that happens on its own.
func (w *world) pass(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); {
		w.now = w.now.Add(min(tickEvery, end.Sub(w.now)))
		w.expire()
		if w.r != nil && w.r.tick() {
			w.build()
		}
	}
}

// Publish implements proxies.
func (w *world) Publish(envoy.World, envoy.Change) {}

// Stands implements proxies: those of this world refuse nothing.
func (w *world) Stands(...envoy.Name) map[envoy.Name][]xds.Stand { return w.stands }
