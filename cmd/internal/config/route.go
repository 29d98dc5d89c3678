package config

import (
	"cmp"
	"regexp"
	"slices"
	"strings"

	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
)

var methodName = regexp.MustCompile(`^[A-Z][A-Z0-9_-]*$`)

func (b *builder) listeners() {
	seen := map[string]string{}
	for _, l := range b.doc.Listeners {
		out := &lb.ListenerSpec{Name: l.Name, Protocol: cmp.Or(l.Protocol, lb.HTTP), Gateway: l.Gateway, RedirectFrom: l.RedirectFrom, ExternalPort: l.ExternalPort, ProxyProtocol: l.ProxyProtocol, Origin: l.String()}
		if !label.MatchString(l.Name) {
			b.bad(l.Place, "name", "%q is no listener name (a lower-case DNS label)", l.Name)
		}
		if at, twice := seen[l.Name]; twice {
			b.bad(l.Place, "name", "listener %s is declared twice (first at %s); keep one", l.Name, at)
		}
		seen[l.Name] = l.String()
		if !slices.Contains(listenerProtocols, out.Protocol) {
			b.bad(l.Place, "protocol", "%q is none of %s", l.Protocol, strings.Join(listenerProtocols, ", "))
		}
		if l.Gateway == "" {
			b.bad(l.Place, "gateway", "is missing; name the gateway group that this listener lives on, like edge")
		}
		out.Address = b.address(l.Place, l.Address)
		if out.Address.IsValid() && out.Address.Port() == 0 {
			b.bad(l.Place, "address", "port 0 is no port to listen on")
		}
		for _, p := range l.TrustedProxies {
			if prefix, ok := b.prefix(l.Place, "trusted_proxies", p); ok {
				out.TrustedProxies = append(out.TrustedProxies, prefix)
			}
		}
		b.certificates(l, out)
		b.overlap(l.Place, out)
		b.config.Model.Listeners = append(b.config.Model.Listeners, out)
	}
	for _, l := range b.doc.Listeners {
		b.redirect(l)
	}
}

func (b *builder) certificates(l listenerDoc, out *lb.ListenerSpec) {
	for _, c := range l.Certificates {
		if c.CertFile == "" || c.KeyFile == "" {
			b.bad(c.Place, "", "cert_file and key_file are both needed")
		}
		out.Certificates = append(out.Certificates, lb.Certificate{CertFile: resolve(b.fileOf(c.Place), c.CertFile), KeyFile: resolve(b.fileOf(c.Place), c.KeyFile), Origin: c.String()})
	}
	switch {
	case out.Protocol == lb.HTTPS && len(l.Certificates) == 0:
		b.bad(l.Place, "certificates", "is missing; an https listener needs at least one {cert_file, key_file}")
	case out.Protocol != lb.HTTPS && len(l.Certificates) > 0:
		b.bad(l.Place, "certificates", "a listener of protocol %s uses none; make it https", out.Protocol)
	}
}

// fileOf is the file in which a place lies.
func (b *builder) fileOf(p strict.Place) string {
	s := p.String()
	for range 2 {
		if i := strings.LastIndexByte(s, ':'); i > 0 {
			s = s[:i]
		}
	}
	return s
}

// overlap refuses two listeners of one gateway that would share an address.
func (b *builder) overlap(p strict.Place, l *lb.ListenerSpec) {
	for _, o := range b.config.Model.Listeners {
		if o.Gateway == l.Gateway && o.Address == l.Address && (o.Protocol == lb.UDP) == (l.Protocol == lb.UDP) {
			b.bad(p, "address", "%s is already the address of listener %s (%s) on gateway %s", l.Address, o.Name, o.Origin, l.Gateway)
		}
	}
}

func (b *builder) redirect(l listenerDoc) {
	if l.RedirectFrom == "" {
		return
	}
	for _, o := range b.config.Model.Listeners {
		if o.Name != l.RedirectFrom {
			continue
		}
		if o.Protocol != lb.HTTP || l.Protocol != lb.HTTPS || o.Gateway != l.Gateway {
			b.bad(l.Place, "redirect_from", "goes from an http listener to an https listener of one gateway; %s is %s on %s", o.Name, o.Protocol, o.Gateway)
		}
		return
	}
	b.bad(l.Place, "redirect_from", "there is no listener %q", l.RedirectFrom)
}

func (b *builder) routes() {
	seen := map[string]string{}
	for _, r := range b.doc.Routes {
		c := checker{place: r.Place}
		out := &lb.RouteSpec{Name: r.Name, Tenant: r.Tenant, Listeners: r.Listeners, Hosts: lower(r.Hosts), Timeout: r.Timeout, Origin: r.String()}
		if r.Name == "" {
			c.bad(r.Place, "name", "is missing")
		}
		if at, twice := seen[r.Name]; twice {
			c.bad(r.Place, "name", "route %s is declared twice (first at %s); keep one", r.Name, at)
		}
		seen[r.Name] = r.String()
		if !b.tenantName(r.Tenant) {
			c.bad(r.Place, "tenant", "%q is no tenant; a route belongs to one", r.Tenant)
		} else if len(b.doc.Tenants) > 0 && !b.hasTenant(r.Tenant) {
			c.bad(r.Place, "tenant", "%q is not declared under tenants", r.Tenant)
		}
		for _, h := range out.Hosts {
			name := strings.TrimPrefix(h, "*.")
			if h != "*" && !zone.MatchString(name) {
				c.bad(r.Place, "hosts", "%q is neither a host name, *.example.com nor *", h)
			}
		}
		out.Match = c.match(r.Match)
		if r.Retry != nil {
			out.Retry = c.retry(r.Retry)
		}
		c.targets(out, r)
		b.errs = append(b.errs, c.errs...)
		b.config.Model.Routes = append(b.config.Model.Routes, out)
	}
}

func (c *checker) match(m matchDoc) lb.Match {
	out := lb.Match{Path: m.Path, PathPrefix: m.PathPrefix, PathRegex: m.PathRegex}
	paths := 0
	for _, p := range []struct{ key, value string }{{"path", m.Path}, {"path_prefix", m.PathPrefix}, {"path_regex", m.PathRegex}} {
		if p.value == "" {
			continue
		}
		paths++
		if p.key != "path_regex" && !strings.HasPrefix(p.value, "/") {
			c.bad(m.Place, p.key, "%q does not begin with /", p.value)
		}
	}
	if paths > 1 {
		c.bad(m.Place, "", "path, path_prefix and path_regex exclude each other")
	}
	c.regex(m.Place, "path_regex", m.PathRegex)
	for _, method := range m.Methods {
		if !methodName.MatchString(method) {
			c.bad(m.Place, "methods", "%q is no method; write it in capitals, like GET", method)
		}
		out.Methods = append(out.Methods, method)
	}
	for _, h := range m.Headers {
		v := c.value(h)
		v.Name = strings.ToLower(v.Name)
		out.Headers = append(out.Headers, v)
	}
	for _, q := range m.Query {
		if q.Invert {
			c.bad(q.Place, "invert", "is for headers only: Envoy cannot ask for a query parameter not to match; put the other case into a route of its own")
		}
		out.Query = append(out.Query, c.value(q))
	}
	return out
}

func (c *checker) value(v valueDoc) lb.ValueMatch {
	if v.Name == "" {
		c.bad(v.Place, "name", "is missing")
	}
	set := 0
	for _, s := range []string{v.Exact, v.Prefix, v.Regex} {
		if s != "" {
			set++
		}
	}
	if set > 1 {
		c.bad(v.Place, "", "exact, prefix and regex exclude each other")
	}
	c.regex(v.Place, "regex", v.Regex)
	return lb.ValueMatch{Name: v.Name, Exact: v.Exact, Prefix: v.Prefix, Regex: v.Regex, Invert: v.Invert}
}

func (c *checker) regex(p strict.Place, key, expr string) {
	if _, err := regexp.Compile(expr); err != nil {
		c.bad(p, key, "%v (RE2 syntax)", err)
	}
}

func (c *checker) targets(out *lb.RouteSpec, r routeDoc) {
	if len(r.To) == 0 {
		c.bad(r.Place, "to", "is missing; name at least one {service: NAME}")
	}
	total := uint64(0)
	for _, t := range r.To {
		tenant, service := cmp.Or(t.Tenant, r.Tenant), t.Service
		if before, after, ok := strings.Cut(service, "/"); ok {
			tenant, service = before, after
		}
		if !label.MatchString(service) {
			c.bad(t.Place, "service", "%q is no service name", t.Service)
		}
		weight := uint32(1)
		if t.Weight != nil {
			weight = *t.Weight
		}
		total += uint64(weight)
		out.To = append(out.To, lb.Target{Service: lb.Key{Tenant: tenant, Service: service}, Port: t.Port, Version: t.Version, Weight: weight})
	}
	if len(r.To) > 0 && (total == 0 || total > 1<<31) {
		c.bad(r.Place, "to", "the weights add up to %d; they must add up to 1 at least and 2147483648 at most", total)
	}
}
