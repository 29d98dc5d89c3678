package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
)

// Finding is one check of this host.
type Finding struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Fix    string `json:"fix"` // the command that mends it; "" when ok
}

// Facts are what a check has to know beside the host itself.
type Facts struct {
	Config    *config.Config
	Ports     []uint16     // that callers dial
	Dedicated []netip.Addr // dedicated IPs
	Captured  uint16       // port of the capture listener
}

const (
	fewFiles    = 4096
	dialTimeout = time.Second
	privileged  = 1024
)

// Check looks at this host; every finding that is not ok names its mend.
func Check(ctx context.Context, f Facts) []Finding {
	out := []Finding{guardFinding(f), filesFinding(), portsFinding(f.Ports)}
	out = append(out, routeFindings(f.Config)...)
	out = append(out, dnsFindings(ctx, f.Config)...)
	return append(out, dedicatedFindings(f)...)
}

func ok(name, format string, args ...any) Finding {
	return Finding{Name: name, OK: true, Detail: fmt.Sprintf(format, args...)}
}

func bad(name, fix, format string, args ...any) Finding {
	return Finding{Name: name, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

func guardFinding(f Facts) Finding {
	rules := RulesFor(f.Config, f.Captured)
	there, err := Installed(rules)
	switch {
	case there:
		return ok("guard", "wildcard sockets and container engines cannot answer for service addresses")
	case err != nil:
		return bad("guard", "sudo roost check", "cannot be seen: %v", err)
	}
	detail := "a process that listens on 0.0.0.0 could answer for a service address that Envoy does not hold, and so could a published container port"
	for _, p := range WildcardPorts() {
		if slices.Contains(f.Ports, p) {
			detail += fmt.Sprintf("; one listens at port %d now", p)
		}
	}
	return bad("guard", "roost capture install, or: "+nftScript(rules), "%s", detail)
}

// nftScript is the command that installs the rules by hand.
func nftScript(r Rules) string {
	var raw, nat, input []string
	for _, p := range r.Pools {
		family := "ip"
		if p.Addr().Is6() {
			family = "ip6"
		}
		input = append(input, fmt.Sprintf("%s daddr %s meta l4proto tcp socket wildcard 1 reject with tcp reset", family, p))
		if r.captures(p) {
			nat = append(nat, fmt.Sprintf("ip daddr %s meta l4proto tcp redirect to :%d", p, r.Capture))
		} else {
			raw = append(raw, fmt.Sprintf("%s daddr %s notrack", family, p))
		}
	}
	var chains []string
	add := func(kind, priority string, rules []string, hooks ...string) {
		for _, hook := range hooks {
			if len(rules) > 0 {
				chains = append(chains, fmt.Sprintf("chain %s_%s { type %s hook %s priority %s; %s; }", hook, kind, kind, hook, priority, strings.Join(rules, "; ")))
			}
		}
	}
	add("filter", "-300", raw, "prerouting", "output")
	add("nat", "-150", nat, "output")
	if r.Everybody {
		add("nat", "-150", nat, "prerouting")
	}
	chains = append(chains, fmt.Sprintf("chain input { type filter hook input priority 0; %s; }", strings.Join(input, "; ")))
	return fmt.Sprintf("nft 'table inet %s { %s; }'", r.tableName(), strings.Join(chains, "; "))
}

func filesFinding() Finding {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return bad("open files", "ulimit -n", "the limit cannot be read: %v", err)
	}
	if l.Max < fewFiles {
		return bad("open files", "ulimit -Hn 65536 (systemd: LimitNOFILE=65536, Docker: --ulimit nofile=65536)", "Envoy may open %d files; each listener takes one for each worker", l.Max)
	}
	return ok("open files", "Envoy may open %d", l.Max)
}

func portsFinding(ports []uint16) Finding {
	low := slices.DeleteFunc(slices.Clone(ports), func(p uint16) bool { return p >= privileged })
	if len(low) == 0 {
		return ok("ports below 1024", "no service uses one")
	}
	lowest := slices.Min(low)
	start, err := unprivilegedStart()
	if err == nil && start <= lowest {
		return ok("ports below 1024", "anybody may bind from %d", start)
	}
	if os.Geteuid() == 0 || canBindLow() {
		return ok("ports below 1024", "this user may bind them")
	}
	return bad("ports below 1024", fmt.Sprintf("sysctl -w net.ipv4.ip_unprivileged_port_start=%d, or run roost envoy with AmbientCapabilities=CAP_NET_BIND_SERVICE", lowest),
		"services use port %d, which this user may not bind", lowest)
}

func unprivilegedStart() (uint16, error) {
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 16)
	return uint16(n), err
}

// canBindLow looks for CAP_NET_BIND_SERVICE among the effective capabilities.
func canBindLow() bool {
	const bindService = 10
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if hex, found := strings.CutPrefix(line, "CapEff:"); found {
			n, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && n&(1<<bindService) != 0
		}
	}
	return false
}

func routeFindings(c *config.Config) []Finding {
	var out []Finding
	for _, p := range c.Model.InternalPools {
		name := "pool " + p.String()
		if p.Addr().IsLoopback() {
			out = append(out, ok(name, "Linux treats all of 127.0.0.0/8 as local; the addresses are reached from this network namespace only"))
			continue
		}
		has, err := HasRoute(p)
		switch {
		case err != nil:
			out = append(out, bad(name, routeCommand(p), "its route cannot be read: %v", err))
		case !has:
			out = append(out, bad(name, routeCommand(p)+" (once in this namespace, and in that of every sidecar)", "has no local route, so that no connection to it arrives"))
		default:
			out = append(out, ok(name, "is local to this host"))
		}
		if overlaps, err := Overlapping(p); err == nil && len(overlaps) > 0 {
			out = append(out, bad(name+" overlap", "set addresses.internal to a range that nothing else uses", "overlaps the routes to %s", strings.Join(overlaps, ", ")))
		}
	}
	return out
}

// dnsFindings asks the DNS server itself, and looks whether this host's
// programs ask it.
func dnsFindings(ctx context.Context, c *config.Config) []Finding {
	var out []Finding
	ours := map[string]bool{}
	for _, l := range c.DNS.Listen {
		if l.Address.Port() == 53 {
			ours[l.Address.Addr().String()] = true
		}
		r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, l.Address.String())
		}}
		if _, err := r.LookupNS(ctx, c.Model.Domain+"."); err != nil {
			var dns *net.DNSError
			if errors.As(err, &dns) {
				err = errors.New(dns.Err) // its server is the system's, which was not asked
			}
			out = append(out, bad("dns "+l.Address.String(), "roost run (dns.addresses)", "does not answer for %s: %v", c.Model.Domain, err))
			continue
		}
		out = append(out, ok("dns "+l.Address.String(), "answers for %s", c.Model.Domain))
	}
	data, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return append(out, bad("resolver", "", "/etc/resolv.conf cannot be read: %v", err))
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "nameserver" && ours[fields[1]] {
			return append(out, ok("resolver", "/etc/resolv.conf asks %s", fields[1]))
		}
	}
	if len(ours) == 0 {
		return append(out, bad("resolver", "add HOST_IP:53 to dns.addresses and name HOST_IP in /etc/resolv.conf (containers: docker run --dns HOST_IP)", "programs on this host do not ask roost: resolv.conf knows no port, and no address of dns.addresses has port 53"))
	}
	return append(out, bad("resolver", "name one of dns.addresses in /etc/resolv.conf (containers: docker run --dns ADDRESS; systemd-resolved: resolvectl dns IFACE ADDRESS && resolvectl domain IFACE '~"+c.Model.Domain+"')", "/etc/resolv.conf does not name roost"))
}

// dedicatedFindings prints how each dedicated IP gets onto its interface.
func dedicatedFindings(f Facts) []Finding {
	have := map[netip.Addr]bool{}
	if list, err := net.InterfaceAddrs(); err == nil {
		for _, a := range list {
			if n, isNet := a.(*net.IPNet); isNet {
				if addr, valid := netip.AddrFromSlice(n.IP); valid {
					have[addr.Unmap()] = true
				}
			}
		}
	}
	var out []Finding
	for _, a := range f.Dedicated {
		name := "dedicated IP " + a.String()
		if a.IsLoopback() || have[a] {
			out = append(out, ok(name, "is on this host"))
			continue
		}
		device := "IFACE"
		for _, p := range f.Config.Model.DedicatedPools {
			if p.Prefix.Contains(a) && p.Interface != "" {
				device = p.Interface
			}
		}
		out = append(out, bad(name, fmt.Sprintf("ip addr add %s/%d dev %s", a, a.BitLen(), device), "is on no interface of this host; needed on the host of one gateway"))
	}
	return out
}
