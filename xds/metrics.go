package xds

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// Why a stream is refused; the labels of roost_xds_refused_total.
const (
	refusedRate     = "rate"     // more come than the cores can serve
	refusedFull     = "full"     // as many are connected as may be
	refusedIdentity = "identity" // nobody that is served here
	refusedBounds   = "bounds"   // it asks for more than one may
)

// metrics count what is served; their labels come from closed sets.
type metrics struct {
	proxies   *prometheus.GaugeVec
	responses [envoy.Types]prometheus.Counter
	bytes     [envoy.Types]prometheus.Counter
	nacks     [envoy.Types]prometheus.Counter
	refused   *prometheus.CounterVec
	evicted   prometheus.Counter
}

func newMetrics(r prometheus.Registerer, queued func() int) *metrics {
	m := &metrics{
		proxies: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "roost_xds_proxies", Help: "Connected proxies."}, []string{"role"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_refused_total", Help: "Streams that were not admitted, or ended for what they asked."}, []string{"reason"}),
		evicted: prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_xds_evicted_total", Help: "Streams that were ended because their proxy did not answer."}),
	}
	responses := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_responses_total", Help: "Responses sent to proxies."}, []string{"type"})
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_sent_bytes_total", Help: "Bytes of resources sent to proxies."}, []string{"type"})
	nacks := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_xds_nacks_total", Help: "Responses that proxies refused, wholly or in part."}, []string{"type"})
	for t := range envoy.Types {
		m.responses[t], m.bytes[t], m.nacks[t] = responses.WithLabelValues(t.String()), bytes.WithLabelValues(t.String()), nacks.WithLabelValues(t.String())
	}
	for _, role := range []lb.Role{lb.Sidecar, lb.Node, lb.Gateway, lb.Proxyless} {
		m.proxies.WithLabelValues(string(role))
	}
	for _, reason := range []string{refusedRate, refusedFull, refusedIdentity, refusedBounds} {
		m.refused.WithLabelValues(reason)
	}
	queue := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "roost_xds_queue_streams", Help: "Streams that wait to be brought to a newer World."}, func() float64 { return float64(queued()) })
	if r != nil {
		r.MustRegister(m.proxies, responses, bytes, nacks, m.refused, m.evicted, queue)
	}
	return m
}
