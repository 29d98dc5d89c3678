package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Install puts the rules in place, in one transaction; what is there already is
// replaced by the same.
func Install(r Rules) error {
	return transaction(func(c *nftables.Conn) {
		table := &nftables.Table{Family: nftables.TableFamilyINet, Name: r.tableName()}
		// Adding before deleting makes the deletion of a table that may not be
		// there no error.
		c.AddTable(table)
		c.DelTable(table)
		c.AddTable(table)
		r.add(c, table)
	})
}

// Remove takes the rules away again.
func Remove(r Rules) error {
	return transaction(func(c *nftables.Conn) {
		table := &nftables.Table{Family: nftables.TableFamilyINet, Name: r.tableName()}
		c.AddTable(table)
		c.DelTable(table)
	})
}

// Installed tells whether the rules' table is there.
func Installed(r Rules) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, permission(err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, permission(err)
	}
	for _, t := range tables {
		if t.Name == r.tableName() {
			return true, nil
		}
	}
	return false, nil
}

func transaction(f func(*nftables.Conn)) error {
	c, err := nftables.New()
	if err != nil {
		return permission(err)
	}
	f(c)
	return permission(c.Flush())
}

func permission(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, os.ErrPermission):
		return fmt.Errorf("nftables: %w", ErrNotPermitted)
	}
	return fmt.Errorf("nftables: %w", err)
}

// chain is a base chain of the table.
func chain(c *nftables.Conn, t *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: &priority})
}

// beforeConntrack is the priority at which packets can still be kept out of
// connection tracking, and so out of any engine's address translation.
const beforeConntrack nftables.ChainPriority = -300

// beforeEngines is the priority at which a capture comes before the address
// translation of container engines (-100): the first one decides.
const beforeEngines nftables.ChainPriority = -150

func (r Rules) add(c *nftables.Conn, t *nftables.Table) {
	input := chain(c, t, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter)
	var raw, nat []*nftables.Chain
	if slices.ContainsFunc(r.Pools, func(p netip.Prefix) bool { return !r.captures(p) }) {
		raw = append(raw,
			chain(c, t, "prerouting_raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeConntrack),
			chain(c, t, "output_raw", nftables.ChainTypeFilter, nftables.ChainHookOutput, beforeConntrack))
	}
	if slices.ContainsFunc(r.Pools, r.captures) {
		nat = append(nat, chain(c, t, "output_capture", nftables.ChainTypeNAT, nftables.ChainHookOutput, beforeEngines))
		if r.Everybody {
			nat = append(nat, chain(c, t, "prerouting_capture", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, beforeEngines))
		}
	}
	for _, pool := range r.Pools {
		rule := func(ch *nftables.Chain, parts ...[]expr.Any) {
			var all []expr.Any
			for _, p := range append([][]expr.Any{to(pool)}, parts...) {
				all = append(all, p...)
			}
			c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all})
		}
		if !r.captures(pool) {
			for _, ch := range raw {
				rule(ch, []expr.Any{&expr.Notrack{}})
			}
		}
		// A socket on every address must not answer for a service.
		rule(input, tcp(), []expr.Any{
			&expr.Socket{Key: expr.SocketKeyWildcard, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		})
		for _, ch := range nat {
			if r.captures(pool) {
				rule(ch, tcp(), []expr.Any{
					&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(r.Capture)},
					&expr.Redir{RegisterProtoMin: 1},
				})
			}
		}
	}
}

// to matches packets to a prefix.
func to(p netip.Prefix) []expr.Any {
	family, offset, length := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if p.Addr().Is6() {
		family, offset, length = unix.NFPROTO_IPV6, 24, 16
	}
	mask := net.CIDRMask(p.Bits(), int(length)*8)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: length, Mask: mask, Xor: make([]byte, length)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

func tcp() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
}

// KeepRoute makes every address of the pool one of this host's own.
func KeepRoute(p netip.Prefix) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("interface lo: %w", err)
	}
	route := &netlink.Route{LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		Dst: &net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is4() {
		// Without it host callers would appear with the service's own address.
		route.Src = net.IPv4(127, 0, 0, 1)
	}
	if has, err := HasRoute(p); err == nil && has {
		return nil
	}
	switch err := netlink.RouteReplace(route); {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("route: %w", ErrNotPermitted)
	case err != nil:
		return fmt.Errorf("route: %w", err)
	}
	return nil
}

// DropRoute takes the pool's route away; one that is not there is no error.
func DropRoute(p netip.Prefix) error {
	has, err := HasRoute(p)
	if err != nil || !has {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("interface lo: %w", err)
	}
	err = netlink.RouteDel(&netlink.Route{LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		Dst: &net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}})
	if err != nil {
		return fmt.Errorf("route: %w", err)
	}
	return nil
}

// HasRoute tells whether the pool is local to this host.
func HasRoute(p netip.Prefix) (bool, error) {
	routes, err := netlink.RouteListFiltered(family(p), &netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	if err != nil {
		return false, err
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		if a, ok := netip.AddrFromSlice(r.Dst.IP); ok && netip.PrefixFrom(a.Unmap(), ones).Contains(p.Addr()) && ones <= p.Bits() {
			return true, nil
		}
	}
	return false, nil
}

// Overlapping lists the routes of this host that overlap the pool and are not
// the pool's own.
func Overlapping(p netip.Prefix) ([]string, error) {
	routes, err := netlink.RouteList(nil, family(p))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		if q := netip.PrefixFrom(a.Unmap(), ones); ok && ones > 0 && q.Overlaps(p) {
			out = append(out, q.String())
		}
	}
	return out, nil
}

func family(p netip.Prefix) int {
	if p.Addr().Is6() {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}
