package envoy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	statev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	"go4.org/netipx"

	"github.com/roostmesh/roost/lb"
)

// Which sources a node proxy accepts comes by ECDS, one resource for each rule
// and node, so that a caller that comes or goes touches no listener: a listener
// whose chains changed would kill live connections. Until a rule has come every
// connection is closed.
//
// There are two forms of each rule. Network RBAC decides on the caller's first
// byte, which suits HTTP; to a TCP caller that sends nothing a server that
// speaks first would have sent its greeting by then. TCP is decided as the
// connection comes: a filter sends foreign callers to a cluster that does not
// exist, and tcp_proxy closes before it has dialled anybody.
const (
	httpCallers = "callers:"
	tcpCallers  = "tcp-callers:"

	rbacURL     = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"
	setStateURL = "type.googleapis.com/envoy.extensions.filters.network.set_filter_state.v3.Config"
)

// callersName is the rule of a service: all services of one tenant with the
// same grants share it.
func callersName(s *lb.Service, http bool) string {
	var grants []string
	for _, g := range s.Spec.Allow {
		grants = append(grants, g.String())
	}
	slices.Sort(grants)
	form := tcpCallers
	if http {
		form = httpCallers
	}
	return form + strings.Join(append([]string{s.Key.Tenant}, slices.Compact(grants)...), ",")
}

// parseCallers reads the name of a rule.
func parseCallers(name string) (tenant string, allow []lb.Grant, http, ok bool) {
	rest, http := strings.CutPrefix(name, httpCallers)
	if !http {
		if rest, ok = strings.CutPrefix(name, tcpCallers); !ok {
			return "", nil, false, false
		}
	}
	parts := strings.Split(rest, ",")
	for _, g := range parts[1:] {
		tenant, service, _ := strings.Cut(g, "/")
		allow = append(allow, lb.Grant{Tenant: tenant, Service: service})
	}
	return parts[0], allow, http, true
}

// callersFilter is the place of a rule in a filter chain.
func callersFilter(rule string) *listenerv3.Filter {
	url := setStateURL
	if strings.HasPrefix(rule, httpCallers) {
		url = rbacURL
	}
	return &listenerv3.Filter{Name: rule, ConfigType: &listenerv3.Filter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{
		ConfigSource: fromADS(rdsTimeout), TypeUrls: []string{url},
	}}}
}

// callersRule is the rule's content on one node.
func callersRule(c *lb.Callers, node, name string) *Resource {
	tenant, allow, http, ok := parseCallers(name)
	if !ok {
		return nil
	}
	sources := admitted(c.Admit(node, tenant, allow))
	content := pack(refuseOthers(sources))
	if http {
		content = pack(denyOthers(sources))
	}
	return encode(Extension, name, &corev3.TypedExtensionConfig{Name: name, TypedConfig: content})
}

// admitted are the sources as disjoint prefixes, in order.
func admitted(list []lb.Admitted) []netip.Prefix {
	var all netipx.IPSetBuilder
	for _, a := range list {
		var own netipx.IPSetBuilder
		own.AddPrefix(a.Prefix)
		for _, inner := range a.Except {
			own.RemovePrefix(inner)
		}
		if set, err := own.IPSet(); err == nil {
			all.AddSet(set)
		}
	}
	set, err := all.IPSet()
	if err != nil {
		return nil // an invalid prefix admits nobody
	}
	return set.Prefixes()
}

func denyOthers(sources []netip.Prefix) *rbacv3.RBAC {
	policies := map[string]*rbacconfigv3.Policy{}
	var from []*rbacconfigv3.Principal
	for _, p := range sources {
		from = append(from, &rbacconfigv3.Principal{Identifier: &rbacconfigv3.Principal_DirectRemoteIp{DirectRemoteIp: cidr(p)}})
	}
	if len(from) > 0 {
		policies["callers"] = &rbacconfigv3.Policy{Permissions: []*rbacconfigv3.Permission{{Rule: &rbacconfigv3.Permission_Any{Any: true}}}, Principals: from}
	}
	return &rbacv3.RBAC{StatPrefix: "callers.", Rules: &rbacconfigv3.RBAC{Action: rbacconfigv3.RBAC_ALLOW, Policies: policies}}
}

// refuseOthers leaves the cluster of an admitted caller's connection as it is,
// and sets it to one that does not exist for all others. An expression that
// cannot be evaluated yields "-", which is no cluster either.
func refuseOthers(sources []netip.Prefix) *setstatev3.Config {
	var terms []string
	for _, p := range sources {
		for _, text := range textPrefixes(p) {
			terms = append(terms, fmt.Sprintf("source.address.startsWith('%s')", text))
		}
	}
	if len(terms) == 0 {
		terms = []string{"false"}
	}
	expression := fmt.Sprintf("%%CEL(%s ? '' : '%s')%%", strings.Join(terms, " || "), refused)
	return &setstatev3.Config{OnNewConnection: []*statev3.FilterStateValue{{
		Key: &statev3.FilterStateValue_ObjectKey{ObjectKey: "envoy.tcp_proxy.cluster"}, SkipIfEmpty: true,
		Value: &statev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{Format: &corev3.SubstitutionFormatString_TextFormatSource{
			TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: expression}},
		}}},
	}}}
}

const (
	octet = 8
	group = 16
	// maxSpread bounds into how many texts a partial group of an IPv6 prefix is
	// spread.
	maxSpread = 8
)

// textPrefixes are what the text IP:PORT or [IP]:PORT of every address of p, and
// of no other, begins with. IPv6 has several texts for one prefix where a group
// is zero; those, and a prefix that would need too many texts, yield none:
// their callers are refused, not let through.
func textPrefixes(p netip.Prefix) []string {
	a := p.Masked().Addr()
	if a.Is4() {
		return spread4(a.As4(), p.Bits())
	}
	if p.Bits() == a.BitLen() {
		return []string{"[" + a.String() + "]:"}
	}
	return spread6(a.As16(), p.Bits())
}

func spread4(a [4]byte, bits int) []string {
	base, full := "", bits/octet
	for _, b := range a[:full] {
		base += fmt.Sprintf("%d.", b)
	}
	if full == len(a) {
		return []string{strings.TrimSuffix(base, ".") + ":"}
	}
	if bits%octet == 0 && full > 0 {
		return []string{base}
	}
	end := "."
	if full == len(a)-1 {
		end = ":"
	}
	var out []string
	first := int(a[full])
	for v := first; v < first+1<<(octet-bits%octet); v++ {
		out = append(out, fmt.Sprintf("%s%d%s", base, v, end))
	}
	return out
}

func spread6(a [16]byte, bits int) []string {
	base, full := "[", bits/group
	word := func(i int) int { return int(a[2*i])<<octet | int(a[2*i+1]) }
	for i := range full {
		if word(i) == 0 {
			return nil
		}
		base += fmt.Sprintf("%x:", word(i))
	}
	rest := bits % group
	if rest == 0 && full > 0 {
		return []string{base}
	}
	if rest < group-maxSpread || word(full) == 0 {
		return nil
	}
	var out []string
	for v := word(full); v < word(full)+1<<(group-rest); v++ {
		out = append(out, fmt.Sprintf("%s%x:", base, v))
	}
	return out
}
