package xds

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// Codes of the problems that proxies have.
const (
	CodeRejected     = "proxy_rejected"
	CodeInUse        = "listener_address_in_use"
	CodeNoPermission = "listener_no_permission"
	CodeDuplicate    = "proxy_duplicate"
)

// unprivilegedFrom is the first port that Linux lets everybody bind.
const unprivilegedFrom = 1024

// boundAddress finds the address in Envoy's "cannot bind 'ADDRESS': REASON".
var boundAddress = regexp.MustCompile(`cannot bind '([^']+)'`)

// Problems lists what connected proxies refuse, and the ids that two proxies
// use, by object and place.
func (s *Server) Problems() []lb.Problem {
	var all []lb.Problem
	for _, p := range s.Proxies() {
		if !p.Connected {
			continue
		}
		for _, r := range p.Rejected {
			all = append(all, problemOf(p, r))
		}
	}
	s.mu.Lock()
	for id, d := range s.duplicates {
		if s.cfg.Now().Sub(d.last) > duplicateFor {
			continue
		}
		all = append(all, lb.Problem{
			Code: CodeDuplicate, Severity: lb.SeverityWarning, Object: id, Since: d.since,
			Message: "a second proxy came with this node id while the first was connected: the newer one is served, the older one was cut off",
			Fix:     "give each Envoy a node id of its own; stop the one that should not run. A proxy that lost its network and came back looks the same for a minute",
		})
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b lb.Problem) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Place, b.Place), cmp.Compare(a.Code, b.Code))
	})
	return all
}

func problemOf(p ProxyStatus, r Rejected) lb.Problem {
	thing := r.Type.String() + " " + r.Name.Name
	problem := lb.Problem{
		Code: CodeRejected, Severity: lb.SeverityError, Object: p.ID, Place: thing, Since: r.Since,
		Fix: "mend what the text names; that version is not sent to this proxy again until it changes",
	}
	address := r.Name.Name
	if m := boundAddress.FindStringSubmatch(r.Message); m != nil {
		address = m[1]
	}
	who := "Envoy"
	if p.Identity.Role == lb.Proxyless {
		who = "the gRPC library"
	}
	problem.Message = fmt.Sprintf("%s refuses %s: %s; %s", who, thing, strings.TrimSpace(r.Message), consequence(r, p.Identity.Role, address))
	if r.Type != envoy.Listener {
		return problem
	}
	port := portOf(address)
	switch {
	case strings.Contains(r.Message, textInUse):
		problem.Code = CodeInUse
		problem.Fix = inUseFix(p.Identity.Role, port)
	case strings.Contains(r.Message, textNoPermission) && port < unprivilegedFrom:
		problem.Code = CodeNoPermission
		problem.Fix = noPermissionFix(port)
	}
	return problem
}

// consequence says what a refusal means for callers.
func consequence(r Rejected, role lb.Role, address string) string {
	switch {
	case r.Held != "":
		return "the proxy goes on with its old version"
	case role == lb.Proxyless:
		return fmt.Sprintf("its calls to what needs this %s fail", r.Type)
	case r.Type == envoy.Listener:
		return fmt.Sprintf("callers of %s on that host do not reach it", address)
	default:
		return fmt.Sprintf("the proxy goes on without it: what uses this %s does not work there", r.Type)
	}
}

func inUseFix(role lb.Role, port uint16) string {
	fix := "another process in the same network namespace holds that port"
	if port > 0 {
		fix = fmt.Sprintf("another process in the same network namespace holds that port (0.0.0.0:%d; find it with: ss -ltnp 'sport = :%d')", port, port)
	}
	switch role {
	case lb.Sidecar:
		fix += "; set capture: {sidecar: nft}, or bind the application to 127.0.0.1 or to its own address"
	case lb.Node:
		fix += "; set capture: {node: tproxy}, or bind that process to 127.0.0.1 or to its own address"
	default:
		fix += "; stop it, or bind it to 127.0.0.1 or to its own address"
	}
	return fix + "; the listener is tried again by itself"
}

func noPermissionFix(port uint16) string {
	n := "PORT"
	if port > 0 {
		n = fmt.Sprint(port)
	}
	return "in that network namespace: sysctl -w net.ipv4.ip_unprivileged_port_start=" + n +
		"; or start Envoy with AmbientCapabilities=CAP_NET_BIND_SERVICE; the listener is tried again by itself"
}

func portOf(address string) uint16 {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return 0
	}
	return ap.Port()
}
