package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/cmd/internal/pins"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// problemLog remembers since when each problem is there.
type problemLog struct {
	mu    sync.Mutex
	since map[problemID]time.Time // guarded by mu
}

type problemID struct{ code, object, place string }

func newProblemLog() *problemLog { return &problemLog{since: map[problemID]time.Time{}} }

// stamp fills Since and forgets problems that are gone.
func (l *problemLog) stamp(list []lb.Problem) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UTC().Truncate(time.Millisecond)
	next := make(map[problemID]time.Time, len(list))
	for i := range list {
		id := problemID{list[i].Code, list[i].Object, list[i].Place}
		since, ok := l.since[id]
		if !ok {
			since = now
		}
		if !list[i].Since.IsZero() {
			since = list[i].Since
		}
		next[id], list[i].Since = since, since
	}
	l.since = next
}

// Problems are all that is wrong now, the worst first.
func (d *Daemon) Problems() []lb.Problem {
	var all []lb.Problem
	if s := d.snapshot.Load(); s != nil {
		all = slices.Clone(s.Problems)
	}
	all = append(all, d.XDS.Problems()...)
	all = append(all, d.limits()...)
	all = append(all, d.pinProblems()...)
	all = append(all, d.DNS.Problems()...)
	for _, p := range d.files.Problems() {
		out := lb.Problem{Code: "certificate_invalid", Severity: discovery.SeverityError, Object: "certificate " + p.File.CertFile, Place: p.Origin, Message: p.Err.Error() + "; the last good one stays in use", Fix: "put a valid certificate and its key there; they are read again at once", Since: p.Since}
		if p.Expired {
			out.Code = "certificate_expired"
		}
		all = append(all, out)
	}
	all = append(all, d.replicaProblems()...)
	if r := d.refused.Load(); r != nil {
		all = append(all, r.problems...)
	}
	if h := d.hostProblems.Load(); h != nil {
		all = append(all, *h...)
	}
	d.problems.stamp(all)
	lb.SortProblems(all)
	return all
}

func (d *Daemon) onReject(id string, name envoy.Name, version, message string) {
	d.Events.Add(events.Fact(events.ProxyRejected, id, fmt.Sprintf("%s %s %s: %s", name.Type, name.Name, version, message)))
	if pins.Pinnable(name.Type) && !xds.OfHost(name.Type, message) {
		d.refusals.add(name)
	}
}

// Waiting is a thing that is not ready, and why.
type Waiting struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

// NotReady lists what is not ready; none is ready.
func (d *Daemon) NotReady() []Waiting {
	out := []Waiting{}
	if d.leaving.Load() {
		out = append(out, Waiting{"roost", "it is about to stop"})
	}
	s := d.snapshot.Load()
	if s == nil {
		return append(out, Waiting{"snapshot", "nothing has been built yet"})
	}
	for _, src := range s.Catalog.Sources {
		if !src.Ready {
			why := "it has not answered yet"
			if src.LastError != "" {
				why = src.LastError
			}
			out = append(out, Waiting{"source " + src.Name, why})
		}
	}
	if len(s.Catalog.Sources) == 0 {
		out = append(out, Waiting{"sources", "none has answered yet"})
	}
	return out
}

// Degraded lists what goes on with its last good state.
func (d *Daemon) Degraded() []Waiting {
	out := []Waiting{}
	s := d.snapshot.Load()
	if s == nil {
		return out
	}
	for _, src := range s.Catalog.Sources {
		if src.Stale {
			out = append(out, Waiting{"source " + src.Name, "its last good state is served: " + src.LastError})
		}
		if src.Held > 0 {
			out = append(out, Waiting{"source " + src.Name, fmt.Sprintf("%d instances are held that it lost", src.Held)})
		}
	}
	return out
}

// refusal is a reload that was not taken, wholly or in part.
type refusal struct{ problems []lb.Problem }

// refuse turns the mistakes of a file into Problems.
func refuse(err error) *refusal {
	r := &refusal{}
	var errs strict.Errors
	if !errors.As(err, &errs) {
		errs = strict.Errors{{Message: err.Error()}}
	}
	for _, e := range errs {
		r.problems = append(r.problems, lb.Problem{Code: "config_refused", Severity: discovery.SeverityError, Object: "config", Place: e.Place,
			Message: fmt.Sprintf("%s %s; the last good config is in force, but a restart would fail", e.Path, e.Message), Fix: "mend the file; it is read again when it changes"})
	}
	return r
}

func chgrp(path, group string) error {
	if group == "" {
		return nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	id, err := strconv.Atoi(g.Gid)
	if err != nil {
		return fmt.Errorf("%s: group %s: %w", path, group, err)
	}
	return os.Chown(path, -1, id)
}

// Certificate is the pair in use for a certificate, if any, and what is wrong
// with its files.
func (d *Daemon) Certificate(c lb.Certificate) (*certs.Pair, error) {
	f := certs.File{CertFile: c.CertFile, KeyFile: c.KeyFile}
	for _, p := range d.files.Problems() {
		if p.File == f {
			return d.files.Pairs()[f], p.Err
		}
	}
	return d.files.Pairs()[f], nil
}

// SetHostProblems replaces what is wrong with this host.
func (d *Daemon) SetHostProblems(list []lb.Problem) { d.hostProblems.Store(&list) }

// limits names the proxies whose file descriptors do not suffice for all of
// their listeners.
func (d *Daemon) limits() []lb.Problem {
	world := d.world.Load()
	if world == nil {
		return nil
	}
	var out []lb.Problem
	for _, p := range d.XDS.Proxies() {
		limit := envoy.ProxyOf(p.Identity, p.Metadata)
		if beyond := world.Beyond(limit); p.Connected && beyond > 0 {
			out = append(out, lb.Problem{Code: "listener_limit", Severity: discovery.SeverityError, Object: p.ID, Place: "file descriptors " + p.Metadata[envoy.MetadataFDs],
				Message: fmt.Sprintf("its file descriptors allow %d listeners; %d more are left out, and callers of those services on that host do not reach them", limit.MaxListeners, beyond),
				Fix:     "raise the limit (systemd: LimitNOFILE=, Docker: --ulimit nofile=, shell: ulimit -n), start Envoy with a lower --concurrency, or let the proxy see fewer tenants"})
		}
	}
	return out
}
