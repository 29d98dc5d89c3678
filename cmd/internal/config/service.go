package config

import (
	"cmp"
	"slices"
	"strings"

	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
)

const maxRetries = 10

var (
	portProtocols     = []string{lb.TCP, lb.HTTP, lb.HTTP2, lb.GRPC, lb.TLS, lb.UDP}
	listenerProtocols = []string{lb.HTTP, lb.HTTPS, lb.TCP, lb.TLS, lb.UDP}
	policies          = []string{"round_robin", "least_request", "random", "ring_hash", "maglev"}
	retryConditions   = []string{"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited", "retriable-4xx", "refused-stream", "retriable-status-codes", "retriable-headers", "http3-post-connect-failure", "cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"}
)

// checker collects the mistakes of one object.
type checker struct {
	place strict.Place
	errs  strict.Errors
}

func (c *checker) bad(p strict.Place, key, format string, args ...any) {
	c.errs = append(c.errs, p.Errorf(key, format, args...))
}

func typedService(key lb.Key, place strict.Place, doc serviceKeys, pools []lb.DedicatedPool) (*lb.ServiceSpec, strict.Errors) {
	c := checker{place: place}
	s := &lb.ServiceSpec{Key: key, Origin: place.String(), Timeout: doc.Timeout}
	c.ports(s, doc.Ports)
	for _, a := range doc.Allow {
		g := parseGrant(a)
		if !label.MatchString(g.Tenant) || strings.Contains(a, "/") && !label.MatchString(g.Service) {
			c.bad(place, "allow", "%q is neither TENANT nor TENANT/SERVICE", a)
		}
		s.Allow = append(s.Allow, g)
	}
	if d := doc.DedicatedIP; d != nil {
		c.dedicated(s, d, pools)
	}
	if l := doc.LoadBalancing; l != nil {
		s.Policy = cmp.Or(l.Policy, policies[0])
		if !slices.Contains(policies, s.Policy) {
			c.bad(l.Place, "policy", "%q is none of %s", l.Policy, strings.Join(policies, ", "))
		}
	}
	c.resilience(s, doc)
	if d := doc.Drain; d != nil {
		s.DrainTimeout, s.DrainClose = d.Timeout, d.Close
		if d.Close && doc.HealthCheck != nil {
			c.bad(d.Place, "close", "does not go with health_check: Envoy has one check a cluster, and closing takes it")
		}
	}
	return s, c.errs
}

func (c *checker) ports(s *lb.ServiceSpec, docs []portDoc) {
	if len(docs) == 0 {
		c.bad(c.place, "ports", "is missing; name at least one port that callers dial, like [{port: 80, protocol: http}]")
	}
	for _, p := range docs {
		out := lb.PortSpec{Name: p.Name, Port: p.Port, Protocol: cmp.Or(p.Protocol, lb.TCP)}
		if out.Name == "" {
			out.Name = out.Protocol
		}
		if p.Port == 0 {
			c.bad(p.Place, "port", "is missing or 0; it is what callers dial, from 1 to 65535")
		}
		if !slices.Contains(portProtocols, out.Protocol) {
			c.bad(p.Place, "protocol", "%q is none of %s", p.Protocol, strings.Join(portProtocols, ", "))
		}
		if !label.MatchString(out.Name) {
			c.bad(p.Place, "name", "%q is no port name (a lower-case DNS label)", out.Name)
		}
		for _, other := range s.Ports {
			if other.Name == out.Name {
				c.bad(p.Place, "name", "two ports are named %q; name them apart", out.Name)
			}
			if other.Port == out.Port && (other.Protocol == lb.UDP) == (out.Protocol == lb.UDP) {
				c.bad(p.Place, "port", "%d is already port %q of this service; one address has each port once", out.Port, other.Name)
			}
		}
		s.Ports = append(s.Ports, out)
	}
}

func (c *checker) dedicated(s *lb.ServiceSpec, d *dedicatedIPDoc, pools []lb.DedicatedPool) {
	s.DedicatedPool = d.Pool
	names := make([]string, len(pools))
	for i := range pools {
		names[i] = pools[i].Name
	}
	if d.Pool == "" && len(pools) == 1 {
		s.DedicatedPool = pools[0].Name
		return
	}
	if !slices.Contains(names, d.Pool) {
		c.bad(d.Place, "pool", "%q is not declared under addresses.dedicated%s", d.Pool, hint(d.Pool, names))
	}
}

func (c *checker) resilience(s *lb.ServiceSpec, doc serviceKeys) {
	if h := doc.HealthCheck; h != nil {
		s.HealthCheck = &lb.HealthCheck{Interval: h.Interval, Timeout: h.Timeout, Healthy: h.Healthy, Unhealthy: h.Unhealthy}
		if h.HTTP != nil {
			s.HealthCheck.HTTPPath = cmp.Or(h.HTTP.Path, "/")
			if !strings.HasPrefix(s.HealthCheck.HTTPPath, "/") {
				c.bad(h.HTTP.Place, "path", "%q does not begin with /", h.HTTP.Path)
			}
		}
	}
	if o := doc.OutlierDetection; o != nil {
		s.OutlierDetection = &lb.OutlierDetection{Consecutive5xx: o.Consecutive5xx, EjectionTime: o.EjectionTime, MaxPercent: o.MaxPercent}
		if o.MaxPercent > 100 {
			c.bad(o.Place, "max_ejection_percent", "%d is more than 100", o.MaxPercent)
		}
	}
	if b := doc.CircuitBreaker; b != nil {
		s.CircuitBreaker = &lb.CircuitBreaker{MaxConnections: b.MaxConnections, MaxPendingRequests: b.MaxPendingRequests, MaxRequests: b.MaxRequests, MaxRetries: b.MaxRetries}
	}
	if doc.Retry != nil {
		s.Retry = c.retry(doc.Retry)
	}
}

func (c *checker) retry(r *retryDoc) *lb.Retry {
	for _, on := range r.On {
		status := len(on) == 3 && on[0] >= '1' && on[0] <= '5' && strings.Trim(on, "0123456789") == ""
		if !status && !slices.Contains(retryConditions, on) {
			c.bad(r.Place, "on", "%q is neither a status code nor one of Envoy's retry conditions%s", on, hint(on, retryConditions))
		}
	}
	if r.Attempts > maxRetries {
		c.bad(r.Place, "attempts", "%d is more than %d", r.Attempts, maxRetries)
	}
	return &lb.Retry{On: r.On, Attempts: r.Attempts}
}
