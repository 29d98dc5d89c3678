package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/xds/envoy"
)

// sizes tells how many resources the World has encoded, and their bytes. They are
// counted when somebody looks.
type sizes struct {
	world            func() *envoy.Translation // nil before the first
	resources, bytes *prometheus.Desc
}

func newSizes(world func() *envoy.Translation) sizes {
	return sizes{world,
		prometheus.NewDesc("roost_xds_resources", "Encoded resources, each shared by all proxies that hold it.", []string{"type"}, nil),
		prometheus.NewDesc("roost_xds_resource_bytes", "Bytes of encoded resources.", []string{"type"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (s sizes) Describe(out chan<- *prometheus.Desc) {
	out <- s.resources
	out <- s.bytes
}

// Collect implements prometheus.Collector.
func (s sizes) Collect(out chan<- prometheus.Metric) {
	w := s.world()
	if w == nil {
		return
	}
	for t, size := range w.Sizes() {
		name := envoy.Type(t).String()
		out <- prometheus.MustNewConstMetric(s.resources, prometheus.GaugeValue, float64(size.Resources), name)
		out <- prometheus.MustNewConstMetric(s.bytes, prometheus.GaugeValue, float64(size.Bytes), name)
	}
}
