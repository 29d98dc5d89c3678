// Package host is the glue to the machine that Roost runs on: the rules that
// keep service addresses from being answered by anything but Envoy, the route
// of a routed pool, and the checks that say what is missing. A Config goes in;
// kernel state, Problems and Findings come out. Guard owns one goroutine, its
// caller's.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// ErrNotPermitted is wrapped when the kernel state cannot be changed for want
// of CAP_NET_ADMIN.
var ErrNotPermitted = errors.New("needs CAP_NET_ADMIN")

// guardEvery is how often the rules and the route are looked at again, since
// somebody may flush them.
const guardEvery = 10 * time.Second

// Rules are what the kernel should do with connections to pool addresses.
type Rules struct {
	Pools []netip.Prefix
	// Capture redirects the TCP of the Captured pools to this port, where Envoy
	// learns from connection tracking what was dialled; 0 is no capture. Other
	// pools are taken out of connection tracking. (A transparent socket would need none,
	// but bridges that pass their packets through the kernel's filters, as
	// container engines make them do, lose it on the way.)
	Capture  uint16
	Captured []netip.Prefix
	// Everybody captures what comes from other namespaces, too.
	Everybody bool
}

// tableName names the table of one set of pools, so that several Roosts on one
// host keep out of each other's way.
func (r Rules) tableName() string {
	var b strings.Builder
	b.WriteString("roost")
	for _, p := range r.Pools {
		b.WriteByte('_')
		for _, c := range p.String() {
			if c >= '0' && c <= '9' || c >= 'a' && c <= 'f' {
				b.WriteRune(c)
			} else {
				b.WriteByte('_')
			}
		}
	}
	return b.String()
}

// captures says that connections to a pool are redirected.
func (r Rules) captures(pool netip.Prefix) bool {
	return r.Capture != 0 && pool.Addr().Is4() && slices.Contains(r.Captured, pool)
}

// RulesFor are the rules of a host that runs `roost run` or a node proxy.
func RulesFor(c *config.Config, captured uint16) Rules {
	// Dedicated IPs are bound by gateways, also where the node proxy captures.
	r := Rules{Pools: c.Model.InternalPools, Captured: c.Model.InternalPools}
	for _, p := range c.Model.DedicatedPools {
		r.Pools = append(slices.Clone(r.Pools), p.Prefix)
	}
	if c.Model.CaptureNode != lb.CaptureBind {
		r.Capture, r.Everybody = captured, true
	}
	return r
}

// Guard keeps the rules and the pool's route in place until ctx ends, and
// reports what it may not do together with the dangers that are there because
// of it. They stay when Roost ends: Envoy goes on without it.
func Guard(ctx context.Context, c *config.Config, snapshot func() *lb.Snapshot, captured uint16, log *slog.Logger, report func([]lb.Problem)) error {
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	logged := ""
	for first := true; ; first = false {
		problems, err := keep(c, captured, snapshot(), first)
		report(problems)
		if text := fmt.Sprint(err); err != nil && text != logged {
			logged = text
			log.Warn("the guard of service addresses is not in place", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// keep makes the kernel state right where it may, and lists what is not. Rules
// that are there already are replaced only at the start, when another config
// may have put them there.
func keep(c *config.Config, captured uint16, s *lb.Snapshot, replace bool) ([]lb.Problem, error) {
	var problems []lb.Problem
	rules := RulesFor(c, captured)
	there, err := Installed(rules)
	if err == nil && (replace || !there) {
		err = Install(rules)
	}
	if err != nil {
		problems = append(problems, unguarded(c, s)...)
		if c.Model.CaptureNode != lb.CaptureBind {
			problems = append(problems, lb.Problem{Code: "capture_missing", Severity: discovery.SeverityError, Object: "host " + c.Model.Node, Place: "capture.node",
				Message: "capture of the pool is not in place: " + err.Error(), Fix: "run roost with CAP_NET_ADMIN, or write capture: {node: bind}"})
		}
	}
	for _, p := range RoutedPools(c) {
		if rerr := KeepRoute(p); rerr != nil {
			problems = append(problems, lb.Problem{Code: "pool_route_missing", Severity: discovery.SeverityError, Object: "host " + c.Model.Node, Place: "addresses.internal",
				Message: fmt.Sprintf("pool %s is not routed to this host's proxies: %v", p, rerr), Fix: routeCommand(p)})
			err = errors.Join(err, rerr)
		}
	}
	return problems, err
}

// RoutedPools are the internal pools that need a route: all but loopback.
func RoutedPools(c *config.Config) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(c.Model.InternalPools), func(p netip.Prefix) bool { return p.Addr().IsLoopback() })
}

// Describe shows the commands that put the rules and the route in place, or
// take them away.
func Describe(c *config.Config, captured uint16, remove bool) string {
	rules := RulesFor(c, captured)
	out := nftScript(rules) + "\n"
	if remove {
		out = "nft delete table inet " + rules.tableName() + "\n"
	}
	for _, p := range RoutedPools(c) {
		command := routeCommand(p)
		if remove {
			command = strings.Replace(command, " route add ", " route del ", 1)
		}
		out += command + "\n"
	}
	return out
}

func routeCommand(p netip.Prefix) string {
	if p.Addr().Is4() {
		return fmt.Sprintf("ip route add local %s dev lo src 127.0.0.1", p)
	}
	return fmt.Sprintf("ip -6 route add local %s dev lo", p)
}

// unguarded lists the sockets that would answer for a service while Envoy does
// not: the promise is stated without them.
func unguarded(c *config.Config, s *lb.Snapshot) []lb.Problem {
	if s == nil {
		return nil
	}
	wanted := map[uint16]string{}
	for _, svc := range s.Order {
		for _, p := range svc.Ports {
			if _, ok := wanted[p.Port]; !ok {
				wanted[p.Port] = svc.Key.String()
			}
		}
	}
	var out []lb.Problem
	for _, port := range WildcardPorts() {
		owner, ok := wanted[port]
		if !ok {
			continue
		}
		out = append(out, lb.Problem{Code: "wildcard_socket", Severity: discovery.SeverityWarning, Object: fmt.Sprintf("host %s port %d", c.Model.Node, port), Place: fmt.Sprintf("0.0.0.0:%d", port),
			Message: fmt.Sprintf("a process listens on every address at port %d, which service %s uses: it would answer for a service address that Envoy does not hold, and Roost may not install the guard against that", port, owner),
			Fix:     fmt.Sprintf("run roost with CAP_NET_ADMIN, bind that process to its own address (find it with: ss -ltnp 'sport = :%d'), or install the guard by hand: roost check shows it", port)})
	}
	return out
}

// InstallGuard does the same once, for an Envoy in a namespace of its own.
func InstallGuard(r Rules, log *slog.Logger) {
	err := Install(r)
	switch {
	case errors.Is(err, ErrNotPermitted):
		log.Info("the guard of service addresses is left to roost run or the operator", "reason", err)
	case err != nil:
		log.Warn("the guard of service addresses cannot be installed", "error", err)
	}
}
