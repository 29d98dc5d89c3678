//go:build !linux

package dns

import (
	"errors"
	"syscall"
)

// freebind is not to be had here: an address that this host does not have is
// tried again.
func freebind(string, string, syscall.RawConn) error { return errors.ErrUnsupported }
