//go:build unix && !linux

package binaries

import (
	"fmt"
	"syscall"
)

// sysProcAttr: only Linux has a parent-death signal and ambient capabilities.
func sysProcAttr(bool) *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// RaiseFileLimit returns the number of files that this process may open; only on Linux is it raised.
func RaiseFileLimit() (uint64, error) {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("file descriptor limit: %w", err)
	}
	return uint64(l.Cur), nil
}
