package discovery

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

const (
	// A refused connection comes from the host itself: two in a row are proof. A
	// silence may be the network's.
	deadAfterRefused = 2
	deadAfterFailed  = 3
	probeAgain       = 500 * time.Millisecond
	probeTimeout     = time.Second
	// One that answers is asked less and less often.
	probeAtLeastEvery = 10 * time.Second
	// So many at once are done with 4,000 silent instances within 30 s.
	maxProbes = 512
)

// probing is how the probes of a held instance go.
type probing struct {
	running         bool
	next            time.Time
	pause           time.Duration
	failed, refused int // in a row
}

type probeResult struct {
	source string
	id     instanceID
	err    error
}

// prober starts the probes that are due. Its fields belong to the loop.
type prober struct {
	config  Config
	group   *errgroup.Group
	results chan probeResult
	running int
}

func newProber(config Config, group *errgroup.Group) *prober {
	return &prober{config: config, group: group, results: make(chan probeResult, maxProbes)}
}

// more takes the results that have come beside r, so that many are one change.
func (p *prober) more(r probeResult) []probeResult {
	list := []probeResult{r}
	for len(p.results) > 0 {
		list = append(list, <-p.results)
	}
	p.running -= len(list)
	return list
}

func (p *prober) start(ctx context.Context, m *merge) {
	now := m.now()
	for source, s := range m.sources {
		for id, h := range s.held {
			if p.running >= maxProbes {
				return
			}
			at, ok := probeAt(h.instance)
			if !ok || h.running || now.Before(h.next) {
				continue
			}
			h.running = true
			p.running++
			p.group.Go(func() error {
				ctx, cancel := context.WithTimeout(ctx, probeTimeout)
				defer cancel()
				p.results <- probeResult{source, id, p.config.Probe(ctx, at)} // never full: as large as the bound
				return nil
			})
		}
	}
}

// probeAt is where i answers TCP; false when it does so nowhere.
func probeAt(i *Instance) (netip.AddrPort, bool) {
	for _, port := range i.Ports {
		udp := false
		for _, w := range i.Wants {
			udp = udp || w.Name == port.Name && w.Protocol == "udp"
		}
		if !udp && port.Number != 0 {
			return netip.AddrPortFrom(i.Address, port.Number), true
		}
	}
	return netip.AddrPort{}, false
}

func dial(ctx context.Context, at netip.AddrPort) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	return conn.Close()
}

// probed takes the results of probes; instances that are dead are let go.
func (m *merge) probed(results ...probeResult) bool {
	dead := map[string][]instanceID{}
	for _, r := range results {
		if h := m.sources[r.source].held[r.id]; m.isDead(h, r) {
			dead[r.source] = append(dead[r.source], r.id)
		}
	}
	changed := false
	for source, ids := range dead {
		changed = m.letGo(m.sources[source], ids) || changed
	}
	return changed
}

// isDead notes a result and tells whether it is the last one needed. Nothing is
// held (nil), or it was lost anew, since a late one was started.
func (m *merge) isDead(h *heldInstance, r probeResult) bool {
	result := "alive"
	refused := errors.Is(r.err, syscall.ECONNREFUSED)
	switch {
	case refused:
		result = "refused"
	case r.err != nil:
		result = "failed"
	}
	m.metrics.probes.WithLabelValues(r.source, result).Inc()
	if h == nil || !h.running {
		return false
	}
	h.running = false
	if r.err == nil {
		h.pause = min(max(2*h.pause, m.config.ProbeEvery), max(probeAtLeastEvery, m.config.ProbeEvery))
		h.next, h.failed, h.refused = m.now().Add(h.pause), 0, 0
		return false
	}
	h.next, h.pause = m.now().Add(probeAgain), 0
	h.failed++
	if h.refused++; !refused {
		h.refused = 0
	}
	return h.refused >= deadAfterRefused || h.failed >= deadAfterFailed
}

type metrics struct {
	held     *prometheus.GaugeVec
	massLoss *prometheus.CounterVec
	probes   *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		held:     prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "roost_discovery_held_instances", Help: "Instances that are kept although their source lost them."}, []string{"source"}),
		massLoss: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_discovery_mass_loss_total", Help: "Losses of many instances without a deregistration of each."}, []string{"source"}),
		probes:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_discovery_probes_total", Help: "Probes of held instances, by result."}, []string{"source", "result"}),
	}
	if r != nil {
		r.MustRegister(m.held, m.massLoss, m.probes)
	}
	return m
}
