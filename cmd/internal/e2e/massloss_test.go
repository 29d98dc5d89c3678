package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestMassLoss: Consul is wiped. What it lost is held while it answers, marked
// and said everywhere; what is dead goes; an operator can let go of the rest.
func TestMassLoss(t *testing.T) {
	c := newCatalog(t)
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.175.0.0/16", "discovery: {consul: {address: \"http://"+c.addr+"\"}}\n")).serve()
	for i := range 4 {
		at := fmt.Sprintf("127.0.0.%d:9001", 81+i)
		h.app("http", fmt.Sprint("c", i), at)
		c.register(fmt.Sprint("c", i), at)
	}
	dead := h.app("http", "dead", "127.0.0.85:9001")
	c.register("dead", "127.0.0.85:9001")
	instances := func() map[string]bool {
		var list struct {
			Items []struct {
				ID   string
				Held bool
			}
		}
		r.json(&list, "instances")
		out := map[string]bool{}
		for _, i := range list.Items {
			out[i.ID] = i.Held
		}
		return out
	}
	until(t, "all are there", func() error {
		if got := instances(); len(got) != 5 {
			return fmt.Errorf("instances %v", got)
		}
		return nil
	})
	url := "http://" + r.address("acme/cart") + ":18081/"
	r.envoy("--node", "h1")
	until(t, "an answer", func() error {
		if got := h.call("http", url); !strings.HasPrefix(got, "200") {
			return errors.New(got)
		}
		return nil
	})
	l := newLoad(t, url, up)

	c.kill()
	c.start() // in dev mode nothing is kept
	p := r.problem("mass_loss_held")
	if !strings.Contains(p.Fix, "roost discovery release consul") {
		t.Errorf("problem %+v", p)
	}
	dead.Stop(0)
	until(t, "the dead one goes, the others are held", func() error {
		got := instances()
		if _, there := got["dead"]; there || len(got) != 4 || !got["c0"] || !got["c3"] {
			return fmt.Errorf("instances %v", got)
		}
		return nil
	})
	l.none(t, "while they are held")
	var ready struct {
		Ready   bool
		Verbose struct {
			Held    int
			Sources []struct {
				Name    string
				Held    int
				HeldWhy *string `json:"held_why"`
			}
		}
	}
	got := r.ask("GET", "/readyz?verbose", "")
	if err := json.Unmarshal([]byte(got.body), &ready); err != nil || got.status != 200 || !ready.Ready || ready.Verbose.Held != 4 {
		t.Errorf("readyz: %d %s, %v", got.status, got.body, err)
	}
	if n := r.metric("roost_discovery_held_instances"); n != 4 {
		t.Errorf("metric: %v", n)
	}
	// One comes back by itself.
	c.register("c0", "127.0.0.81:9001")
	until(t, "it is ordinary again", func() error {
		if got := instances(); got["c0"] || len(got) != 4 {
			return fmt.Errorf("instances %v", got)
		}
		return nil
	})
	r.ok("discovery", "release", "consul")
	until(t, "the rest is let go", func() error {
		if got := instances(); len(got) != 1 {
			return fmt.Errorf("instances %v", got)
		}
		return nil
	})
	l.none(t, "after the release")
}
