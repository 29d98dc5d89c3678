package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// held is an application that answers /slow and TCP connections only when it is
// let.
type held struct {
	name    string
	address string
	let     chan struct{} // one value lets one answer out
	began   chan struct{} // one value for each that waits
}

func newHeld(t *testing.T, name, address string, tcp bool) *held {
	t.Helper()
	h := &held{name: name, address: address, let: make(chan struct{}), began: make(chan struct{}, 16)}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	end := make(chan struct{})
	t.Cleanup(func() {
		close(end)
		_ = l.Close()
		wg.Wait()
	})
	wait := func() {
		h.began <- struct{}{}
		select {
		case <-h.let:
		case <-end:
		}
	}
	if !tcp {
		s := http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				wait()
			}
			_, _ = io.WriteString(w, name)
		})}
		wg.Go(func() { _ = s.Serve(l) })
		t.Cleanup(func() { _ = s.Close() })
		return h
	}
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				_, _ = io.WriteString(conn, name)
				wait()
				_ = conn.Close()
			})
		}
	})
	return h
}

type drainJSON struct {
	Instance               string
	Drained                bool
	TimedOut               bool   `json:"timed_out"`
	InFlight               uint64 `json:"in_flight"`
	Waiting, Unknown, Gone []string
	Took                   float64
}

const twoInstances = `services:
  - name: shop
    tenant: acme
    ports: [{port: 18095, protocol: http}]
    drain: {timeout: 10s}
    instances: [{id: a, address: "127.0.0.61:9001"}, {id: b, address: "127.0.0.62:9001"}]
  - name: db
    tenant: acme
    ports: [{port: 18096}]
    instances: [{id: d1, address: "127.0.0.63:9001"}]
`

// TestDrain: an instance that drains gets nothing new; the call returns when
// what it has in flight has ended, or when its time is over, and says so. The
// wish outlives kill -9.
func TestDrain(t *testing.T) {
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.165.0.0/16", twoInstances)).serve()
	a := newHeld(t, "a", "127.0.0.61:9001", false)
	b := newHeld(t, "b", "127.0.0.62:9001", false)
	r.envoy("--node", "h1")
	url := "http://" + r.address("acme/shop") + ":18095/"
	answers := func(want string) {
		t.Helper()
		until(t, "answers of "+want, func() error {
			seen := map[string]bool{}
			for range 10 {
				seen[h.call("http", url)] = true
			}
			for name := range strings.SplitSeq("a b", " ") {
				if seen["200  "+name] != strings.Contains(want, name) {
					return fmt.Errorf("got %v", seen)
				}
			}
			return nil
		})
	}
	answers("a b")

	drain := func(id string, flags ...string) (out drainJSON) {
		t.Helper()
		r.json(&out, append([]string{"drain", id}, flags...)...)
		return out
	}
	if out := drain("acme/shop/a"); !out.Drained || out.Instance != "acme/shop/a@h1" || len(out.Waiting) != 0 || out.Took > 5 {
		t.Errorf("nothing in flight: %+v", out)
	}
	for range 20 {
		if got := h.call("http", url); got != "200  b" {
			t.Fatalf("after the drain: %s", got)
		}
	}
	r.crash()
	r.serve()
	for range 20 {
		if got := h.call("http", url); got != "200  b" {
			t.Fatalf("after kill -9: %s", got)
		}
	}
	if out := drain("a"); !out.Drained {
		t.Errorf("drained before: %+v", out)
	}
	if code, _, errOut := r.cli("undrain", "a"); code != 0 {
		t.Fatal(errOut)
	}
	answers("a b")

	// One request in flight holds the drain up, until it has ended.
	slow := make(chan string)
	go func() { slow <- h.call("http", url+"slow") }()
	busy, other := "a", "b"
	select {
	case <-a.began:
	case <-b.began:
		a, busy, other = b, "b", "a"
	}
	done := make(chan drainJSON)
	go func() {
		var out drainJSON
		r.json(&out, "drain", busy)
		done <- out
	}()
	answers(other)
	select {
	case out := <-done:
		t.Fatalf("it did not wait for the request in flight: %+v", out)
	case <-time.After(500 * time.Millisecond):
	}
	a.let <- struct{}{}
	if got := <-slow; got != "200  "+busy {
		t.Errorf("the request in flight: %s", got)
	}
	if out := <-done; !out.Drained || out.TimedOut {
		t.Errorf("after its end: %+v", out)
	}
	r.drainEvents(busy)
}

// drainEvents checks what a drain is told as.
func (r *roost) drainEvents(id string) {
	r.t.Helper()
	until(r.t, "events", func() error {
		var list struct {
			Items []struct {
				Kind, Message string
				Instance      *string
				AckedBy       []string `json:"acked_by"`
			}
		}
		r.json(&list, "events")
		draining, removed := false, false
		for _, e := range list.Items {
			if e.Instance == nil || *e.Instance != "acme/shop/"+id || len(e.AckedBy) != 1 || e.AckedBy[0] != "node~h1" {
				continue
			}
			draining = draining || e.Kind == "instance_draining"
			removed = removed || draining && e.Kind == "instance_removed" && e.Message == "drained"
		}
		if !draining || !removed {
			return fmt.Errorf("draining %v, then removed %v in %+v", draining, removed, list.Items)
		}
		return nil
	})
}

// TestDrainTimeout: a TCP connection that does not end is counted when the time
// is over; a proxy that does not answer is named, and the exit code says so.
func TestDrainTimeout(t *testing.T) {
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.166.0.0/16", twoInstances)).serve()
	db := newHeld(t, "d1", "127.0.0.63:9001", true)
	envoy := r.envoy("--node", "h1")
	at := r.address("acme/db") + ":18096"
	var conn net.Conn
	until(t, "a connection", func() (err error) {
		if conn, err = net.Dial("tcp", at); err != nil {
			return err
		}
		select {
		case <-db.began:
			return nil
		case <-time.After(time.Second):
			return errors.New("not accepted")
		}
	})
	defer func() { _ = conn.Close() }()
	var out drainJSON
	r.json(&out, "drain", "d1", "--timeout", "300ms")
	if out.Drained || !out.TimedOut || out.InFlight != 1 || len(out.Waiting) != 0 {
		t.Errorf("a connection in flight: %+v", out)
	}
	if got := h.call("tcp", at); got != "got" {
		t.Errorf("a new connection: %s", got)
	}
	if code, _, errOut := r.cli("undrain", "acme/db/d1"); code != 0 {
		t.Fatal(errOut)
	}
	if code, _, errOut := r.cli("undrain", "acme/db/d1"); code != 1 || !strings.Contains(errOut, "the instance does not drain") {
		t.Errorf("undrain of one that does not drain: exit %d %s", code, errOut)
	}
	if code, _, errOut := r.cli("drain", "none"); code != 1 || !strings.Contains(errOut, "there is no such instance: none") {
		t.Errorf("drain of nothing: exit %d %s", code, errOut)
	}

	stopEnvoy(t, envoy)
	code, _, errOut := r.cli("drain", "a", "--timeout", "300ms")
	if code != 1 || !strings.Contains(errOut, "may still get traffic: proxy node~h1 has not confirmed") {
		t.Errorf("a proxy that does not answer: exit %d %s", code, errOut)
	}
}

// TestDrainCloses: TCP connections that outlive the drain are closed where the
// service says so, those of other instances and those of a Roost that is killed
// live on.
func TestDrainCloses(t *testing.T) {
	h := host{t, ""}
	r := newRoost(h, onLoopback(t, "127.168.0.0/16", `services:
  - name: db
    tenant: acme
    ports: [{port: 18100}]
    drain: {timeout: 300ms, close: true}
    instances: [{id: d1, address: "127.0.0.64:9001"}, {id: d2, address: "127.0.0.65:9001"}]
`)).serve()
	newHeld(t, "d1", "127.0.0.64:9001", true)
	newHeld(t, "d2", "127.0.0.65:9001", true)
	r.envoy("--node", "h1")
	at := r.address("acme/db") + ":18100"
	conns := map[string]net.Conn{} // the first by the instance that greeted
	until(t, "a connection to each", func() error {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = conn.Close() })
		var name [2]byte
		if _, err := io.ReadFull(conn, name[:]); err != nil {
			return err
		}
		if conns[string(name[:])] == nil {
			conns[string(name[:])] = conn
		}
		if len(conns) < 2 {
			return fmt.Errorf("connected to %v", conns)
		}
		return nil
	})
	open := func(id string, want bool) {
		t.Helper()
		if err := conns[id].SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := conns[id].Read(make([]byte, 1))
		if lives := errors.Is(err, os.ErrDeadlineExceeded); lives != want {
			t.Errorf("the connection to %s is open: %v, want %v (%v)", id, lives, want, err)
		}
	}
	r.crash()
	<-time.After(2500 * time.Millisecond) // two checks without an answer
	open("d1", true)
	r.serve()
	open("d2", true)
	var out drainJSON
	until(t, "the proxy is back", func() error {
		if r.metric("roost_xds_proxies") != 1 {
			return errors.New("no proxy")
		}
		return nil
	})
	r.json(&out, "drain", "d1", "--timeout", "6s") // Envoy reports again some seconds after a restart of Roost
	if !out.Drained || !out.TimedOut || out.InFlight != 0 || len(out.Waiting)+len(out.Unknown) != 0 {
		t.Errorf("drain: %+v", out)
	}
	open("d1", false)
	open("d2", true)
	if got := h.call("tcp", at); got != "got d2" {
		t.Errorf("a new connection: %s", got)
	}
}
