package xds

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// metrics count what is served; their labels come from closed sets.
type metrics struct {
	proxies   *prometheus.GaugeVec
	responses [envoy.Types]prometheus.Counter
	nacks     [envoy.Types]prometheus.Counter
	bytes     prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		proxies: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "roost_xds_proxies", Help: "Connected proxies."}, []string{"role"}),
		bytes:   prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_xds_sent_bytes_total", Help: "Bytes of resources sent to proxies."}),
	}
	responses := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_responses_total", Help: "Responses sent to proxies."}, []string{"type"})
	nacks := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_nacks_total", Help: "Responses that proxies refused, wholly or in part."}, []string{"type"})
	for t := range envoy.Types {
		m.responses[t] = responses.WithLabelValues(t.String())
		m.nacks[t] = nacks.WithLabelValues(t.String())
	}
	for _, role := range []lb.Role{lb.Sidecar, lb.Node, lb.Gateway, lb.Proxyless} {
		m.proxies.WithLabelValues(string(role))
	}
	if r != nil {
		r.MustRegister(m.proxies, m.bytes, responses, nacks)
	}
	return m
}
