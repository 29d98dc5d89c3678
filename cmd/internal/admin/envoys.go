package admin

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	scrapeTimeout = 2 * time.Second
	maxStatsSize  = 64 << 20
	statsPath     = "/stats?filter=%5Ecluster%5C..*upstream_rq_%5B1-5%5D%5B0-9%5D%5B0-9%5D%24"
)

// requests matches a counter of Envoy: cluster.SERVICE.TENANT_PORT....upstream_rq_CODE.
var requests = regexp.MustCompile(`^cluster\.([a-z0-9-]+)\.([a-z0-9-]+)_.*\.upstream_rq_([1-5][0-9][0-9]): ([0-9]+)$`)

// envoyCollector gathers request counts from the Envoys of this host when it
// is asked to. Envoys that cannot be reached are left out and counted.
type envoyCollector struct {
	d        *daemon.Daemon
	log      *slog.Logger
	requests *prometheus.Desc
	failed   *prometheus.Desc
}

func newEnvoyCollector(d *daemon.Daemon, log *slog.Logger) *envoyCollector {
	return &envoyCollector{
		d: d, log: log,
		requests: prometheus.NewDesc("roost_requests_total", "Requests that the Envoys of this host have answered, Envoy's own answers included.", []string{"tenant", "service", "code", "role"}, nil),
		failed:   prometheus.NewDesc("roost_proxies_unreachable", "Envoys of this host whose counters could not be read.", nil, nil),
	}
}

// Describe sends the descriptions.
func (c *envoyCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.requests
	ch <- c.failed
}

type requestKey struct{ tenant, service, code, role string }

// Collect reads every Envoy at once.
func (c *envoyCollector) Collect(ch chan<- prometheus.Metric) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	sum, failed := map[requestKey]float64{}, 0
	for _, p := range c.d.XDS.Proxies() {
		at := p.Metadata[envoy.MetadataAdmin]
		if !p.Connected || at == "" {
			continue
		}
		wg.Go(func() {
			counts, err := scrape(at, p)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed++
				c.log.Debug("envoy's counters cannot be read", "proxy", p.ID, "error", err)
				return
			}
			for k, n := range counts {
				sum[k] += n
			}
		})
	}
	wg.Wait()
	for k, n := range sum {
		ch <- prometheus.MustNewConstMetric(c.requests, prometheus.CounterValue, n, k.tenant, k.service, k.code, k.role)
	}
	ch <- prometheus.MustNewConstMetric(c.failed, prometheus.GaugeValue, float64(failed))
}

// scrape reads one Envoy's counters over its admin interface, which is a unix
// socket or a loopback address: what a proxy claims leads nowhere else.
func scrape(at string, p xds.ProxyStatus) (map[requestKey]float64, error) {
	dialer := net.Dialer{Timeout: scrapeTimeout}
	var transport http.Transport
	host := "envoy"
	if path, ok := strings.CutPrefix(at, "unix:"); ok {
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
	} else {
		ap, err := netip.ParseAddrPort(at)
		if err != nil || !ap.Addr().IsLoopback() {
			return nil, fmt.Errorf("admin address %q is not on loopback", at)
		}
		host = at
	}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: &transport, Timeout: scrapeTimeout}
	res, err := client.Get("http://" + host + statsPath)
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	out := map[requestKey]float64{}
	lines := bufio.NewScanner(io.LimitReader(res.Body, maxStatsSize))
	for lines.Scan() {
		line := lines.Text()
		if strings.Contains(line, ".internal.upstream_rq_") || strings.Contains(line, ".external.upstream_rq_") {
			continue // counted in the sum of both, too
		}
		if m := requests.FindStringSubmatch(line); m != nil {
			n, err := strconv.ParseFloat(m[4], 64)
			if err == nil {
				out[requestKey{m[2], m[1], m[3], string(p.Identity.Role)}] += n
			}
		}
	}
	return out, lines.Err()
}

func certificates(d *daemon.Daemon) []Certificate {
	var out []Certificate
	for _, l := range d.Snapshot().Listeners {
		for _, c := range l.Spec.Certificates {
			cert := Certificate{Names: []string{}, CertFile: c.CertFile, Origin: c.Origin}
			pair, err := d.Certificate(c)
			if pair != nil {
				notAfter := pair.Leaf.NotAfter.UTC()
				cert.Names, cert.NotAfter, cert.Issuer = append(cert.Names, pair.Names...), &notAfter, optional(pair.Leaf.Issuer.String())
			}
			if err != nil {
				cert.Error = optional(err.Error())
			}
			out = append(out, cert)
		}
	}
	return out
}
