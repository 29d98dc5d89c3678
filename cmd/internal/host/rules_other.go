//go:build !linux

package host

import (
	"errors"
	"net/netip"
)

var errLinux = errors.New("only on Linux")

// Install is only on Linux.
func Install(Rules) error { return errLinux }

// Remove is only on Linux.
func Remove(Rules) error { return nil }

// Installed is only on Linux.
func Installed(Rules) (bool, error) { return false, errLinux }

// KeepRoute is only on Linux.
func KeepRoute(netip.Prefix) error { return errLinux }

// HasRoute is only on Linux.
func HasRoute(netip.Prefix) (bool, error) { return false, errLinux }

// Overlapping is only on Linux.
func Overlapping(netip.Prefix) ([]string, error) { return nil, errLinux }

// DropRoute is only on Linux.
func DropRoute(netip.Prefix) error { return nil }
