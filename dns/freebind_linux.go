package dns

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// freebind lets a socket bind an address that this host does not have yet. It
// is a net.ListenConfig.Control.
func freebind(network, _ string, c syscall.RawConn) error {
	level, option := unix.SOL_IP, unix.IP_FREEBIND
	if strings.HasSuffix(network, "6") {
		level, option = unix.SOL_IPV6, unix.IPV6_FREEBIND
	}
	var set error
	if err := c.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, 1) }); err != nil {
		return err
	}
	return set
}
