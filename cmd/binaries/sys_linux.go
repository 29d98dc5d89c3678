package binaries

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// sysProcAttr makes a child that is killed when we die, in a process group of its own: Ctrl-C then reaches only us, and we
// decide how the child ends.
func sysProcAttr(ambientCaps bool) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if ambientCaps {
		attr.AmbientCaps = keepableCaps()
	}
	return attr
}

// keepableCaps are those of the capabilities a proxy can use (ports below 1024, transparent sockets) that this process may
// hand on over exec: permitted, and in the bounding set.
func keepableCaps() []uintptr {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return nil
	}
	var caps []uintptr
	for _, c := range []uint{unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_ADMIN} {
		if data[c/32].Permitted&(1<<(c%32)) == 0 {
			continue
		}
		if in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err == nil && in == 1 {
			caps = append(caps, uintptr(c))
		}
	}
	return caps
}

// RaiseFileLimit lets this process and the children it starts from now on open as many files as the hard limit allows,
// and returns that number. Go raises the limit for itself at start and lowers it again for children; after an explicit
// call it no longer lowers it.
func RaiseFileLimit() (uint64, error) {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("file descriptor limit: %w", err)
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("file descriptor limit: %w", err)
	}
	return l.Cur, nil
}
