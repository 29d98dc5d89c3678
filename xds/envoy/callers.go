package envoy

import (
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"

	"github.com/roostmesh/roost/lb"
)

// callersPrefix begins the names of the rules that say from where a service may
// be called through a node proxy.
const callersPrefix = "callers:"

// callersName is the rule of a service: all services of one tenant with the
// same grants share it.
func callersName(s *lb.Service) string {
	var grants []string
	for _, g := range s.Spec.Allow {
		grants = append(grants, g.String())
	}
	slices.Sort(grants)
	return callersPrefix + strings.Join(append([]string{s.Key.Tenant}, slices.Compact(grants)...), ",")
}

// parseCallers reads the name of a rule.
func parseCallers(name string) (tenant string, allow []lb.Grant, ok bool) {
	rest, ok := strings.CutPrefix(name, callersPrefix)
	if !ok {
		return "", nil, false
	}
	parts := strings.Split(rest, ",")
	for _, g := range parts[1:] {
		tenant, service, _ := strings.Cut(g, "/")
		allow = append(allow, lb.Grant{Tenant: tenant, Service: service})
	}
	return parts[0], allow, true
}

// callersFilter closes the connections of foreign callers. What it accepts
// comes by ECDS, so that a caller that comes or goes touches no listener; until
// it has come every connection is closed.
func callersFilter(rule string) *listenerv3.Filter {
	return &listenerv3.Filter{Name: rule, ConfigType: &listenerv3.Filter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{
		ConfigSource: fromADS(rdsTimeout), TypeUrls: []string{"type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"},
	}}}
}

// callersRule is the rule's content on one node.
func callersRule(c *lb.Callers, node, name string) *Resource {
	tenant, allow, ok := parseCallers(name)
	if !ok {
		return nil
	}
	policies := map[string]*rbacconfigv3.Policy{}
	for _, a := range c.Admit(node, tenant, allow) {
		from := &rbacconfigv3.Principal{Identifier: &rbacconfigv3.Principal_DirectRemoteIp{DirectRemoteIp: cidr(a.Prefix)}}
		for _, inner := range a.Except {
			from = &rbacconfigv3.Principal{Identifier: &rbacconfigv3.Principal_AndIds{AndIds: &rbacconfigv3.Principal_Set{Ids: []*rbacconfigv3.Principal{
				from, {Identifier: &rbacconfigv3.Principal_NotId{NotId: &rbacconfigv3.Principal{Identifier: &rbacconfigv3.Principal_DirectRemoteIp{DirectRemoteIp: cidr(inner)}}}},
			}}}}
		}
		policies[a.Prefix.String()] = &rbacconfigv3.Policy{
			Permissions: []*rbacconfigv3.Permission{{Rule: &rbacconfigv3.Permission_Any{Any: true}}},
			Principals:  []*rbacconfigv3.Principal{from},
		}
	}
	return encode(Extension, name, &corev3.TypedExtensionConfig{Name: name, TypedConfig: pack(&rbacv3.RBAC{
		StatPrefix: "callers.", Rules: &rbacconfigv3.RBAC{Action: rbacconfigv3.RBAC_ALLOW, Policies: policies},
	})})
}
