package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb"
)

// The defaults of the contract.
const (
	DefaultAdmin      = "127.0.0.1:7480"
	DefaultXDS        = "127.0.0.1:7481"
	DefaultDNS        = "127.0.0.1:7453"
	DefaultPool       = "127.128.0.0/9"
	defaultQuarantine = 10 * time.Minute
	defaultTTL        = 5 * time.Second
	defaultMaxConsul  = 150
	// dnsHost is the host part of the DNS address in a routed pool: its .53.
	dnsHost = 53
)

var (
	documentType = reflect.TypeFor[document]()
	label        = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	zone         = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
)

// builder checks a document and fills a Config; every mistake is kept.
type builder struct {
	doc    *document
	config *Config
	errs   strict.Errors
	node   func(*Config) string
}

func (b *builder) bad(p strict.Place, key, format string, args ...any) {
	b.errs = append(b.errs, p.Errorf(key, format, args...))
}

func (b *builder) build() {
	b.sources()
	b.general()
	b.servers()
	b.pools()
	b.dns()
	b.tenants()
	b.services()
	b.listeners()
	b.routes()
}

func (b *builder) general() {
	d, m := b.doc, b.config.Model
	m.Domain = strings.Trim(strings.ToLower(cmp.Or(d.Domain, "roost")), ".")
	if !zone.MatchString(m.Domain) || len(m.Domain) > 120 {
		b.bad(d.Place, "domain", "%q is not a DNS name", d.Domain)
	}
	m.Datacenter = cmp.Or(d.Datacenter, "dc1")
	m.TrustDomain = cmp.Or(d.TrustDomain, m.Domain)
	b.config.DataDir = resolve(b.config.Path, d.DataDir)
	if b.config.DataDir == "" {
		b.config.DataDir = defaultDataDir()
	}
	m.Node = cmp.Or(d.Node, b.node(b.config))
	if m.Node == "" {
		m.Node, _ = os.Hostname()
	}
	m.CaptureNode = b.oneOf(d.Capture.Place, "node", d.Capture.Node, lb.CaptureBind, lb.CaptureTproxy, lb.CaptureNft)
	m.CaptureSidecar = b.oneOf(d.Capture.Place, "sidecar", d.Capture.Sidecar, lb.CaptureBind, lb.CaptureNft)
	m.Loopback, m.LoopbackSet = cmp.Or(d.Loopback, lb.LoopbackAll), d.Loopback != ""
	if l := m.Loopback; l != lb.LoopbackAll && l != lb.LoopbackNone && !b.hasTenant(l) {
		b.bad(d.Place, "loopback", "%q is neither all, none nor a tenant that is declared%s", l, hint(l, slices.Sorted(maps.Keys(d.Tenants))))
	}
	b.config.Log = Log{b.oneOf(d.Log.Place, "level", d.Log.Level, "info", "debug", "warn", "error"), b.oneOf(d.Log.Place, "format", d.Log.Format, "text", "json")}
	a := d.AccessLog
	m.AccessLog = lb.AccessLog{Format: b.oneOf(a.Place, "format", a.Format, "json", "text", "none"), Proxies: b.oneOf(a.Place, "proxies", a.Proxies, "gateway", "all"), Errors: b.oneOf(a.Place, "errors", a.Errors, "all", "none")}
	if k := d.Store.Consul; k != nil {
		if d.Discovery.Consul == nil {
			b.bad(d.Store.Place, "consul", "needs discovery.consul, whose connection it uses; write discovery: {consul: {}} for the agent on this host")
		}
		b.config.Store = &Store{cmp.Or(k.Prefix, "roost/")}
	}
}

// hasTenant tells whether a tenant may be meant: all are when none is declared.
func (b *builder) hasTenant(name string) bool {
	_, ok := b.doc.Tenants[name]
	return ok
}

func hint(word string, known []string) string {
	if len(known) == 0 {
		return ""
	}
	return strict.Nearest(word, known)
}

func (b *builder) oneOf(p strict.Place, key, value string, allowed ...string) string {
	if value == "" {
		return allowed[0]
	}
	if !slices.Contains(allowed, value) {
		b.bad(p, key, "%q is none of %s", value, strings.Join(allowed, ", "))
	}
	return value
}

func defaultDataDir() string {
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "roost")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "/var/lib/roost"
	}
	return filepath.Join(home, ".local", "state", "roost")
}

func (b *builder) servers() {
	d := b.doc
	b.config.Admin = Admin{Address: b.address(d.Admin.Place, cmp.Or(d.Admin.Address, DefaultAdmin)), Socket: resolve(b.config.Path, d.Admin.Socket)}
	if b.config.Admin.Socket == "" {
		b.config.Admin.Socket = filepath.Join(b.config.DataDir, "admin.sock")
	}
	if a := b.config.Admin.Address; a.IsValid() && !a.Addr().IsLoopback() {
		b.bad(d.Admin.Place, "address", "%s is not a loopback address: the admin API has no tokens yet; use 127.0.0.1 or the unix socket, or a tunnel", a)
	}
	b.config.XDS.Address = b.address(d.XDS.Place, cmp.Or(d.XDS.Address, DefaultXDS))
	if a := b.config.XDS.Address; a.IsValid() && !a.Addr().IsLoopback() && !d.XDS.Insecure {
		b.bad(d.XDS.Place, "address", "%s is not a loopback address, and proxies cannot prove who they are yet; run one roost on each host, or write xds: {insecure: true} if everybody who reaches the port may see everything", a)
	}
	for _, s := range d.XDS.Sockets {
		b.socket(s)
	}
}

func (b *builder) socket(s socketDoc) {
	out := Socket{Path: resolve(b.config.Path, s.Path), Tenant: s.Tenant, Group: s.Group, Mode: 0o660}
	if s.Path == "" {
		b.bad(s.Place, "path", "is missing")
	}
	if !label.MatchString(s.Tenant) {
		b.bad(s.Place, "tenant", "%q is no tenant; the socket serves one tenant only, name it", s.Tenant)
	}
	if s.Mode != "" {
		mode, err := strconv.ParseUint(s.Mode, 8, 32)
		if err != nil || mode > 0o777 {
			b.bad(s.Place, "mode", "%q is no octal file mode; write it like \"0660\"", s.Mode)
		}
		out.Mode = os.FileMode(mode)
	}
	b.config.XDS.Sockets = append(b.config.XDS.Sockets, out)
}

func (b *builder) address(p strict.Place, value string) netip.AddrPort {
	a, err := splitHostPort(value)
	if err != nil {
		b.bad(p, "address", "%q is not IP:PORT", value)
	}
	return a
}

func (b *builder) pools() {
	d, m := b.doc.Addresses, b.config.Model
	b.config.Quarantine = cmp.Or(d.Quarantine, defaultQuarantine)
	internal := []string(d.Internal)
	if len(internal) == 0 {
		internal = []string{DefaultPool}
	}
	for _, s := range internal {
		if p, ok := b.prefix(d.Place, "internal", s); ok {
			m.InternalPools = append(m.InternalPools, p)
		}
	}
	slices.SortStableFunc(m.InternalPools, func(a, b netip.Prefix) int { return cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen()) }) // IPv4 first
	if v4 := slices.IndexFunc(m.InternalPools, func(p netip.Prefix) bool { return p.Addr().Is4() }); v4 < 0 && len(m.InternalPools) > 0 {
		b.bad(d.Place, "internal", "has no IPv4 CIDR; write [IPV4_CIDR, IPV6_CIDR]")
	}
	if len(m.InternalPools) > 2 || len(m.InternalPools) == 2 && m.InternalPools[0].Addr().Is4() == m.InternalPools[1].Addr().Is4() {
		b.bad(d.Place, "internal", "there is one internal pool: one IPv4 CIDR and at most one IPv6 CIDR")
	}
	for _, name := range slices.Sorted(maps.Keys(d.Dedicated)) {
		pool := d.Dedicated[name]
		p, ok := b.prefix(pool.Place, "cidr", pool.CIDR)
		if !ok {
			continue
		}
		for _, other := range m.InternalPools {
			if other.Overlaps(p) {
				b.bad(pool.Place, "cidr", "%s overlaps the internal pool %s; give each its own range", p, other)
			}
		}
		for _, other := range m.DedicatedPools {
			if other.Prefix.Overlaps(p) {
				b.bad(pool.Place, "cidr", "%s overlaps the pool %s (%s); give each its own range", p, other.Name, other.Prefix)
			}
		}
		m.DedicatedPools = append(m.DedicatedPools, lb.DedicatedPool{Name: name, Prefix: p, Interface: pool.Interface, Origin: pool.String()})
	}
}

func (b *builder) prefix(place strict.Place, key, s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, aerr := netip.ParseAddr(s); aerr == nil {
			return netip.PrefixFrom(a, a.BitLen()), true
		}
		b.bad(place, key, "%q is not a CIDR like 10.42.0.0/16", s)
		return p, false
	}
	if p != p.Masked() {
		b.bad(place, key, "%s has bits set after its prefix; write %s", p, p.Masked())
		return p, false
	}
	return p, true
}

// Routed tells whether addresses of the internal pool are routed, not loopback.
func (c *Config) Routed() bool {
	return len(c.Model.InternalPools) > 0 && !c.Model.InternalPools[0].Addr().IsLoopback()
}

// PoolDNS is the address of a routed pool at which DNS answers.
func PoolDNS(pool netip.Prefix) netip.Addr {
	a := pool.Masked().Addr().As4()
	a[3] += dnsHost
	return netip.AddrFrom4(a)
}

func (b *builder) dns() {
	d := b.doc.DNS
	b.config.Model.TTL = cmp.Or(d.TTL, defaultTTL)
	addresses := d.Addresses
	if len(addresses) == 0 {
		addresses = []dnsAddressDoc{{Address: DefaultDNS}}
	}
	for _, a := range addresses {
		at := b.address(a.Place, a.Address)
		b.config.DNS.Listen = append(b.config.DNS.Listen, DNSListen{Address: at, Tenant: a.Tenant})
	}
	if b.config.Routed() {
		if p := b.config.Model.InternalPools[0]; p.Addr().Is4() && p.Bits() <= 24 {
			at := netip.AddrPortFrom(PoolDNS(p), 53)
			if !slices.ContainsFunc(b.config.DNS.Listen, func(l DNSListen) bool { return l.Address == at }) {
				b.config.DNS.Listen = append(b.config.DNS.Listen, DNSListen{Address: at, Default: true})
			}
		}
	}
	forward := d.Forward
	if !d.Has("forward") {
		forward = []forwardDoc{{To: []string{"/etc/resolv.conf"}}}
	}
	for _, f := range forward {
		out := Forward{Zone: strings.Trim(strings.ToLower(f.Zone), ".")}
		for _, to := range f.To {
			if strings.HasPrefix(to, "/") || strings.HasPrefix(to, ".") {
				out.Files = append(out.Files, resolve(b.config.Path, to))
				continue
			}
			if ip, err := netip.ParseAddr(to); err == nil {
				out.To = append(out.To, netip.AddrPortFrom(ip, 53))
				continue
			}
			at, err := splitHostPort(to)
			if err != nil {
				b.bad(f.Place, "to", "%q is neither a file (with a leading /) nor IP or IP:PORT", to)
			}
			out.To = append(out.To, at)
		}
		b.config.DNS.Forward = append(b.config.DNS.Forward, out)
	}
}

func (b *builder) sources() {
	d := b.doc.Discovery
	if f := d.File; f != nil {
		b.config.InstancePath = resolve(b.config.Path, f.Path)
		if f.Path == "" {
			b.bad(f.Place, "path", "is missing; name a YAML file or a directory of them")
		}
	}
	c := d.Consul
	if c == nil {
		return
	}
	out := &Consul{Address: c.Address, TokenFile: resolve(b.config.Path, c.TokenFile), DefaultTenant: c.DefaultTenant, TenantMeta: cmp.Or(c.TenantMeta, "roost-tenant"), MaxConnections: int(cmp.Or(c.MaxConnections, defaultMaxConsul))}
	if t := c.TLS; t != nil {
		out.CAFile, out.CertFile, out.KeyFile, out.ServerName = resolve(b.config.Path, t.CAFile), resolve(b.config.Path, t.CertFile), resolve(b.config.Path, t.KeyFile), t.ServerName
		if (t.CertFile == "") != (t.KeyFile == "") {
			b.bad(t.Place, "cert_file", "cert_file and key_file go together")
		}
	}
	if out.DefaultTenant != "" && !b.tenantName(out.DefaultTenant) {
		b.bad(c.Place, "default_tenant", "%q is no tenant name (a lower-case DNS label)", out.DefaultTenant)
	}
	if out.MaxConnections < 2 {
		b.bad(c.Place, "max_connections", "%d is too few; two watches need two connections", out.MaxConnections)
	}
	b.config.Consul = out
}

func (b *builder) tenantName(s string) bool { return label.MatchString(s) && s != "dedicated" }

func (b *builder) tenants() {
	m := b.config.Model
	owner := map[string]lb.Client{}
	who := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(b.doc.Tenants)) {
		t := b.doc.Tenants[name]
		if !b.tenantName(name) {
			b.bad(t.Place, "", "%q is no tenant name: a lower-case DNS label, and not \"dedicated\"", name)
		}
		out := &lb.Tenant{Name: name, Hosts: lower(t.Hosts), Origin: t.String()}
		for _, c := range t.Clients {
			p, ok := b.prefix(c.Place, "cidr", c.CIDR)
			if !ok {
				continue
			}
			client := lb.Client{Prefix: p, Node: c.Node, Origin: c.String()}
			id := p.String() + "@" + c.Node
			if other, twice := owner[id]; twice {
				b.bad(c.Place, "cidr", "%s is already of tenant %s (%s); one source address is of one tenant", p, who[id], other.Origin)
			}
			owner[id], who[id] = client, name
			out.Clients = append(out.Clients, client)
		}
		m.Tenants = append(m.Tenants, out)
	}
}

func lower(list []string) []string {
	out := slices.Clone(list)
	for i := range out {
		out[i] = strings.ToLower(out[i])
	}
	return out
}

func (b *builder) services() {
	first := map[lb.Key]string{}
	for _, s := range b.doc.Services {
		key := lb.Key{Tenant: s.Tenant, Service: s.Name}
		b.errs = append(b.errs, checkKey(s.Place, key)...)
		if len(b.doc.Tenants) > 0 && !b.hasTenant(s.Tenant) && label.MatchString(s.Tenant) {
			b.bad(s.Place, "tenant", "%q is not declared under tenants%s", s.Tenant, hint(s.Tenant, slices.Sorted(maps.Keys(b.doc.Tenants))))
		}
		if at, twice := first[key]; twice {
			b.bad(s.Place, "name", "service %s is declared twice (first at %s); keep one", key, at)
		}
		first[key] = s.String()
		spec, errs := typedService(key, s.Place, s.serviceKeys, b.config.Model.DedicatedPools)
		b.errs = append(b.errs, errs...)
		b.config.Model.Services = append(b.config.Model.Services, spec)
		b.instances(key, s)
	}
}

func (b *builder) instances(key lb.Key, s serviceDoc) {
	seen := map[string]string{}
	for _, row := range s.Instances {
		if row.Tenant != "" && row.Tenant != key.Tenant || row.Service != "" && row.Service != key.Service {
			b.bad(row.Place, "service", "an instance below service %s is of that service", key)
		}
		i, errs := row.Instance(key, b.config.DefaultNode())
		b.errs = append(b.errs, errs...)
		if at, twice := seen[i.QualifiedName()]; twice {
			b.bad(row.Place, "id", "instance %s is listed twice (first at %s)", i.QualifiedName(), at)
		}
		seen[i.QualifiedName()] = row.String()
		b.config.Static = append(b.config.Static, i)
	}
}

func checkKey(p strict.Place, key lb.Key) strict.Errors {
	var errs strict.Errors
	if !label.MatchString(key.Service) {
		errs = append(errs, p.Errorf("name", "%q is no service name: a lower-case DNS label (a-z, 0-9, -; up to 63)", key.Service))
	}
	if !label.MatchString(key.Tenant) || key.Tenant == "dedicated" {
		errs = append(errs, p.Errorf("tenant", "%q is no tenant name: a lower-case DNS label, and not \"dedicated\"", key.Tenant))
	}
	return errs
}

// ParseService reads the body of a service as the API takes it: JSON with the
// keys of services[] but name, tenant and instances. Places are "body:LINE:COL".
func ParseService(key lb.Key, body []byte, pools []lb.DedicatedPool) (*lb.ServiceSpec, error) {
	d := strict.Decoding{File: "body"}
	var doc serviceBody
	d.Decode(body, &doc)
	reading := len(d.Errors)
	if reading > 0 && doc.String() == (strict.Place{}).String() {
		return nil, d.Errors // it is no mapping: everything else follows from that
	}
	spec, more := typedService(key, doc.Place, doc.serviceKeys, pools)
	errs := append(append(d.Errors, checkKey(doc.Place, key)...), more...)
	if len(errs) > 0 {
		return nil, apart(errs, reading)
	}
	spec.Origin = "api"
	return spec, nil
}

// String names the address for messages.
func (s Socket) String() string { return fmt.Sprintf("unix:%s", s.Path) }
