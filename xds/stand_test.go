package xds

import (
	"fmt"
	"strings"
	"testing"

	"github.com/roostmesh/roost/xds/envoy"
)

// standing is how proxies stand to a resource, as text.
func (h *harness) standing(resource string) string {
	n := name(h.t, resource)
	var all []string
	for _, s := range h.s.Stands(n)[n] {
		held := ""
		if s.Held != nil {
			held = s.Held.Version
		}
		all = append(all, fmt.Sprintf("%s %v holds %s refuses %s %s", s.Role, s.Connected, held, s.Refused, s.Message))
	}
	return strings.Join(all, "; ")
}

// TestStands: who refuses what it should have, and what each holds, also one that
// has gone; a refusal that is the host's is none, nor one of what is no more.
func TestStands(t *testing.T) {
	h := start(t, Config{})
	h.publish("listener/l@1")
	one, two := h.dial(testID), h.dial("node~h2")
	for _, c := range []*adsClient{one, two} {
		c.subscribe(envoy.Listener)
		c.receive("listener: l@1", "")
	}
	h.acked(1)
	h.publish("listener/l@2")
	one.receive("listener: l@2", "Error adding/updating listener(s) l: bad\n")
	two.receive("listener: l@2", "")
	h.acked(2)
	expect := func(want string) {
		t.Helper()
		if got := h.standing("listener/l"); got != want {
			t.Errorf("they stand %q, want %q", got, want)
		}
	}
	expect("node true holds 2 refuses  ; sidecar true holds 1 refuses 2 l: bad")
	h.publish("listener/l@3")
	one.receive("listener: l@3", "Error adding/updating listener(s) l: cannot bind '127.0.0.1:80': Cannot assign requested address\n")
	two.receive("listener: l@3", "Error adding/updating listener(s) l: bad\n")
	h.acked(3)
	expect("node true holds 2 refuses 3 l: bad; sidecar true holds 1 refuses  ")
	h.publish("listener/l@1")
	two.receive("listener: l@1", "")
	h.acked(4)
	expect("node true holds 1 refuses  ; sidecar true holds 1 refuses  ")
	two.close()
	h.until("it has gone", func() bool { return strings.Contains(h.standing("listener/l"), "node false holds 1") })
	if got := h.standing("listener/none"); got != "" {
		t.Errorf("of nothing: %q", got)
	}
}

func TestOfHost(t *testing.T) {
	for text, want := range map[string]bool{
		"l: cannot bind '127.0.0.1:80': Address already in use":            true,
		"l: cannot bind '127.0.0.1:80': Cannot assign requested address":   true,
		"l: cannot bind '127.0.0.1:80': Permission denied":                 true,
		"error adding listener: 'l' has duplicate address '127.0.0.1:80'":  true,
		"l: failed to create a socket: Too many open files":                true,
		"regex 'a{900}' RE2 program size of 901 > max program size of 100": false,
		"Proto constraint validation failed":                               false,
	} {
		if got := OfHost(envoy.Listener, text); got != want {
			t.Errorf("%q: %v", text, got)
		}
		if OfHost(envoy.Route, text) {
			t.Errorf("a route: %q is of the host", text)
		}
	}
}
