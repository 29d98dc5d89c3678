package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

type addressJSON struct {
	Address, Tenant, Service, State string
	Holders                         []string
	FreeAfter                       *time.Time `json:"free_after"`
}

func (r *roost) record(service string) (addressJSON, error) {
	r.t.Helper()
	var list struct{ Items []addressJSON }
	r.json(&list, "addresses", service)
	if len(list.Items) == 0 {
		return addressJSON{}, errors.New("no record of " + service)
	}
	return list.Items[0], nil
}

// children lists the processes that one has started, by any of its threads.
func children(pid int) (all []int) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil
	}
	for _, list := range lists {
		data, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for f := range strings.FieldsSeq(string(data)) {
			if n, err := strconv.Atoi(f); err == nil {
				all = append(append(all, n), children(n)...)
			}
		}
	}
	return all
}

// stopEnvoy stops the Envoy under a supervisor by SIGSTOP, until the test ends
// or resume is called.
func stopEnvoy(t *testing.T, supervisor *binaries.Process) (resume func()) {
	t.Helper()
	pids := children(supervisor.Pid())
	if len(pids) == 0 {
		t.Fatal("the supervisor has no Envoy")
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	resume = func() {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGCONT) // it may have ended
		}
	}
	t.Cleanup(resume)
	return resume
}

// TestQuarantine: a deleted service's address refuses connections and goes to
// nobody else while a proxy may still hold it; then it does.
func TestQuarantine(t *testing.T) {
	h := host{t, ""}
	config := onLoopback(t, "127.167.0.0/30", "") // two addresses
	config = strings.Replace(config, "internal: 127.167.0.0/30", "internal: 127.167.0.0/30, quarantine: 1s", 1)
	config = strings.Replace(config, "forward: []", "ttl: 1s, forward: []", 1)
	r := newRoost(h, config).serve()
	ok := func(args ...string) {
		t.Helper()
		if code, _, errOut := r.cli(args...); code != 0 {
			t.Fatalf("roost %v: exit %d: %s", args, code, errOut)
		}
	}
	h.app("http", "other", "0.0.0.0:9001")
	envoy := r.envoy("--node", "h1")
	ok("service", "create", "acme/one", "--port", "18097:http")
	ok("service", "create", "acme/two", "--port", "18098:http")
	one := r.address("acme/one")
	until(t, "the listener is there", func() error {
		if got := h.call("http", "http://"+one+":18097/"); !strings.HasPrefix(got, "503 no_endpoint") {
			return errors.New(got)
		}
		return nil
	})

	resume := stopEnvoy(t, envoy)
	ok("service", "delete", "acme/one")
	ok("service", "create", "acme/three", "--port", "18099:http")
	r.problem("pool_full") // its address is still one's
	rec, err := r.record("acme/one")
	if err != nil || rec.State != "quarantined" || rec.Address != one || len(rec.Holders) != 1 || rec.Holders[0] != "node~h1" || rec.FreeAfter == nil {
		t.Fatalf("record %+v, %v", rec, err)
	}
	waited := time.NewTimer(time.Until(*rec.FreeAfter) + 2*time.Second)
	<-waited.C
	if rec, err := r.record("acme/one"); err != nil || rec.State != "quarantined" {
		t.Fatalf("a proxy has it, but the record is %+v, %v", rec, err)
	}
	resume()
	until(t, "it is free, and given to the service that waits", func() error {
		rec, err := r.record("acme/three")
		if err != nil {
			return err
		}
		if rec.Address != one || rec.State != "bound" {
			return fmt.Errorf("record %+v", rec)
		}
		return nil
	})
	until(t, "the new service answers there", func() error {
		if got := h.call("http", "http://"+one+":18099/"); !strings.HasPrefix(got, "503 no_endpoint") {
			return errors.New(got)
		}
		return nil
	})
	if got := h.call("tcp", one+":18097"); got != "refused" {
		t.Errorf("the old service's port: %s", got)
	}

	// A proxy that has gone is waited for as long as the forget time.
	envoy.Stop(5 * time.Second)
	ok("service", "delete", "acme/three")
	rec, err = r.record("acme/three")
	if err != nil || len(rec.Holders) != 1 || !strings.Contains(rec.Holders[0], "node~h1 (gone since") {
		t.Errorf("record %+v, %v", rec, err)
	}
	until(t, "it is forgotten", func() error {
		if rec, err := r.record("acme/three"); err == nil {
			return fmt.Errorf("record %+v", rec)
		}
		return nil
	})
	var list struct {
		Items []struct{ Kind, Message string }
	}
	r.json(&list, "events")
	freed := 0
	for _, e := range list.Items {
		if e.Kind == "address_freed" && strings.Contains(e.Message, one) {
			freed++
		}
	}
	if freed != 2 {
		t.Errorf("freed %d times: %+v", freed, list.Items)
	}
}
