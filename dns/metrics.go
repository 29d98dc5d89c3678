package dns

import (
	"strconv"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// kind is what became of a query.
type kind uint8

const (
	kindOurs      kind = iota // a name of our zones
	kindForwarded             // a name of somebody else's
	kindRefused               // malformed, or something that is never answered
	kinds
)

// rcodes are the values of the label rcode, by number; every other one is
// "other".
var rcodes = [...]int{dns.RcodeSuccess, dns.RcodeFormatError, dns.RcodeServerFailure, dns.RcodeNameError,
	dns.RcodeNotImplemented, dns.RcodeRefused, dns.RcodeBadVers}

type metrics struct {
	queries  [kinds][len(rcodes) + 1]prometheus.Counter
	overflow prometheus.Counter // forwards beyond maxForwards
	failures prometheus.Counter // questions that no upstream answered
	refused  prometheus.Counter // TCP connections beyond a limit
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	queries := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "roost_dns_queries_total",
		Help: "DNS queries answered, by what became of them and response code."}, []string{"kind", "rcode"})
	m := &metrics{
		overflow: prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_dns_forward_overflow_total",
			Help: "Questions answered with SERVFAIL because too many were being forwarded."}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_dns_forward_failures_total",
			Help: "Forwarded questions that no upstream has answered."}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "roost_dns_tcp_refused_total",
			Help: "TCP connections closed because too many were open."}),
	}
	for k, name := range [kinds]string{"ours", "forwarded", "refused"} {
		for i := range m.queries[k] {
			label := "other"
			if i < len(rcodes) {
				label = rcodeName(rcodes[i])
			}
			m.queries[k][i] = queries.WithLabelValues(name, label)
		}
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{queries, m.overflow, m.failures, m.refused} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) count(k kind, rcode int) {
	at := len(rcodes)
	for i, r := range rcodes {
		if r == rcode {
			at = i
			break
		}
	}
	m.queries[k][at].Inc()
}

// rcodeName is a response code as people write it.
func rcodeName(rcode int) string {
	if rcode == dns.RcodeBadVers {
		return "BADVERS" // the codec calls 16 by its name in TSIG
	}
	if name, ok := dns.RcodeToString[rcode]; ok {
		return name
	}
	return "RCODE" + strconv.Itoa(rcode)
}
