package daemon

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// watchEvery is how often the config files are looked at. A look is one stat a
// file; it works on every file system and for files that come and go.
const watchEvery = 200 * time.Millisecond

// reload is a config that was read again: config, or err.
type reload struct {
	config *config.Config
	err    error
}

// watchConfig reads the config again when a file of it changes or on SIGHUP.
func (d *Daemon) watchConfig(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	path := d.start.Path
	patterns := d.start.Watch
	last := fingerprint(patterns)
	for {
		forced := false
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			forced = true
		case <-tick.C:
		}
		now := fingerprint(patterns)
		if path == "" || now == last && !forced {
			continue
		}
		last = now
		c, err := config.LoadOn(path, func(*config.Config) string { return d.start.Model.Node })
		if err == nil {
			patterns = c.Watch
			last = fingerprint(patterns)
		}
		select {
		case d.reloads <- reload{c, err}:
		case <-ctx.Done():
			return nil
		}
	}
}

func fingerprint(patterns []string) string {
	var b strings.Builder
	var files []string
	for _, p := range patterns {
		matches, err := filepath.Glob(p)
		if err != nil || len(matches) == 0 {
			matches = []string{p}
		}
		files = append(files, matches...)
	}
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			fmt.Fprintf(&b, "%s gone\n", f)
			continue
		}
		inode := uint64(0)
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			inode = st.Ino
		}
		fmt.Fprintf(&b, "%s %d %d %d\n", f, info.ModTime().UnixNano(), info.Size(), inode)
	}
	return b.String()
}

// reload takes a config that was read again. A bad one is refused whole; of a
// good one, what cannot change at run time keeps its value.
func (r *reconciler) reload(c reload) {
	d := r.d
	if c.err != nil {
		d.refused.Store(refuse(c.err))
		d.log.Error("config refused; the last good one is in force, but a restart would fail", "error", c.err)
		d.Events.Add(events.Fact(events.ConfigRefused, "", cmp.Or(firstLine(c.err.Error()), "refused")))
		return
	}
	kept := keepFixed(d.start, c.config)
	var rest *refusal
	if len(kept) > 0 {
		rest = &refusal{problems: kept}
	}
	d.refused.Store(rest)
	d.config.Store(c.config)
	r.setConfig(c.config)
	d.log.Info("config reloaded", "path", c.config.Path)
	d.Events.Add(events.Fact(events.ConfigReloaded, "", c.config.Path))
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// keepFixed gives c the values of start for all that cannot change at run time,
// and says what was written otherwise.
func keepFixed(start, c *config.Config) []lb.Problem {
	var out []lb.Problem
	keep := func(key string, was, is any, restore func()) {
		if reflect.DeepEqual(was, is) {
			return
		}
		out = append(out, lb.Problem{Code: "config_needs_restart", Severity: discovery.SeverityWarning, Object: key, Place: c.Path,
			Message: fmt.Sprintf("%s cannot change while roost runs; it stays %v, the file says %v", key, was, is), Fix: "restart roost, or set it back"})
		restore()
	}
	m, s := c.Model, start.Model
	keep("domain", s.Domain, m.Domain, func() { m.Domain = s.Domain })
	keep("node", s.Node, m.Node, func() { m.Node = s.Node })
	keep("datacenter", s.Datacenter, m.Datacenter, func() { m.Datacenter = s.Datacenter })
	keep("trust_domain", s.TrustDomain, m.TrustDomain, func() { m.TrustDomain = s.TrustDomain })
	keep("data_dir", start.DataDir, c.DataDir, func() { c.DataDir = start.DataDir })
	keep("addresses.internal", s.InternalPools, m.InternalPools, func() { m.InternalPools = s.InternalPools })
	keep("capture.node", s.CaptureNode, m.CaptureNode, func() { m.CaptureNode = s.CaptureNode })
	keep("capture.sidecar", s.CaptureSidecar, m.CaptureSidecar, func() { m.CaptureSidecar = s.CaptureSidecar })
	keep("admin", start.Admin, c.Admin, func() { c.Admin = start.Admin })
	keep("xds", start.XDS, c.XDS, func() { c.XDS = start.XDS })
	keep("dns.addresses", start.DNS.Listen, c.DNS.Listen, func() { c.DNS.Listen = start.DNS.Listen })
	keep("dns.forward", start.DNS.Forward, c.DNS.Forward, func() { c.DNS.Forward = start.DNS.Forward })
	keep("store.consul", start.Store, c.Store, func() { c.Store = start.Store })
	keep("discovery.consul", start.Consul, c.Consul, func() { c.Consul = start.Consul })
	keep("discovery.file", start.InstancePath, c.InstancePath, func() { c.InstancePath = start.InstancePath })
	keep("log", start.Log, c.Log, func() { c.Log = start.Log })
	return out
}
