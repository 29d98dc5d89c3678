package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestKilledAtAnyInstant: whatever was acknowledged before SIGKILL is there
// after it, with the same address; what was deleted reaches nobody.
func TestKilledAtAnyInstant(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.172.0.0/16", "")).serve()
	made, deleted := map[string]string{}, map[string]bool{}
	n := 0
	for round := range 25 {
		end := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			client := http.Client{Timeout: 2 * time.Second}
			for {
				select {
				case <-end:
					return
				default:
				}
				n++
				name := fmt.Sprintf("s%d", n)
				if address := putService(&client, r.args, name); address != "" {
					made[name] = address
				}
				if n%3 == 0 {
					delete(made, name) // a delete that was not answered may have happened
					deleted[name] = deleteService(&client, r.args, name)
				}
			}
		})
		<-time.After(time.Duration(5+rand.N(60)) * time.Millisecond)
		if round%2 == 0 { // just after a change; else in the middle of one
			close(end)
		}
		r.crash()
		if round%2 != 0 {
			close(end)
		}
		wg.Wait()
		r.serve()
		var list struct{ Items []serviceJSON }
		r.json(&list, "services")
		have := map[string]string{}
		for _, s := range list.Items {
			have[s.Name] = s.Address
		}
		for name, address := range made {
			if have[name] != address {
				t.Fatalf("round %d: %s was acknowledged at %s, and is at %q", round, name, address, have[name])
			}
		}
		for name, sure := range deleted {
			if sure && have[name] != "" {
				t.Fatalf("round %d: %s was deleted, and is at %s", round, name, have[name])
			}
		}
	}
	if len(made) < 25 {
		t.Errorf("only %d services were made", len(made))
	}
}

// putService makes a service and returns its address, if that was acknowledged.
func putService(c *http.Client, at, name string) (address string) {
	req, err := http.NewRequest(http.MethodPut, "http://"+at+"/api/v1/services/acme/"+name, strings.NewReader(`{"ports": [{"port": 80}]}`))
	if err != nil {
		return ""
	}
	var s serviceJSON
	if decode(c, req, &s) != nil {
		return ""
	}
	return s.Address
}

func deleteService(c *http.Client, at, name string) bool {
	req, err := http.NewRequest(http.MethodDelete, "http://"+at+"/api/v1/services/acme/"+name, nil)
	return err == nil && decode(c, req, nil) == nil
}

// TestFullDisk: what cannot be written down does not happen, and is said; what
// is bound goes on, over a restart, too; with room again everything works.
func TestFullDisk(t *testing.T) {
	needNetns(t) // the same rights
	r := newRoost(host{t, ""}, onLoopback(t, "127.173.0.0/16", ""))
	data := filepath.Join(r.dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	r.sh("mount", "-t", "tmpfs", "-o", "size=1m", "none", data)
	t.Cleanup(func() { r.sh("umount", "-l", data) })
	r.serve()
	r.ok("service", "create", "acme/before", "--port", "80")
	address := r.address("acme/before")

	filler := filepath.Join(data, "filler")
	fill(t, filler)
	refused := func(when string) {
		t.Helper()
		until(t, when+": a service is refused", func() error { // what is left of a page may take one
			name := fmt.Sprintf("acme/x%d", rand.Uint32())
			code, _, errOut := r.cli("service", "create", name, "--port", "80")
			if code == 0 {
				fill(t, filler)
				return errors.New("it was made")
			}
			if !strings.Contains(errOut, "ledger") {
				return errors.New(errOut)
			}
			if code, _, _ := r.cli("service", "show", name); code == 0 {
				t.Errorf("%s: %s was refused and exists", when, name)
			}
			return nil
		})
		r.problem("ledger_write_failed")
		r.sees("acme/before", address)
	}
	refused("full")
	r.crash()
	r.serve()
	r.sees("acme/before", address)
	refused("full after a restart")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	r.ok("service", "create", "acme/after", "--port", "80")

	r.crash()
	r.sh("mount", "-o", "remount,bind,ro", data)
	fails(t, 2, "read-only file system", "run", "--config", r.config)
	r.sh("mount", "-o", "remount,bind,rw", data)
	r.serve()
	r.sees("acme/before", address)
}

// fill writes until there is no room.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }()
	for size := 64 << 10; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

// TestDamagedState: a state file that cannot be used stops the start with its
// path and the way out; it is left as it is.
func TestDamagedState(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.174.0.0/16", "")).serve()
	r.ok("service", "create", "acme/shop", "--port", "80")
	address := r.address("acme/shop")
	r.crash()
	path := filepath.Join(r.dir, "data", "ledger.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"cut off": good[:len(good)/2], "foreign": []byte(strings.Repeat("a letter to a friend\n", 2000))} {
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		fails(t, 2, path, "run", "--config", r.config)
		if now, err := os.ReadFile(path); err != nil || string(now) != string(bad) {
			t.Errorf("%s: it was changed, or %v", name, err)
		}
	}
	// An older one is brought forwards by its journal, and so is one that is gone.
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	r.serve()
	r.ok("service", "create", "acme/late", "--port", "80")
	late := r.address("acme/late")
	r.crash()
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	r.serve()
	r.sees("acme/shop", address)
	r.sees("acme/late", late)
	r.crash()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.serve()
	r.sees("acme/late", late)
}
