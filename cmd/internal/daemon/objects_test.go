package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/lb"
)

// TestConditionsWithinABatch: commands that share a build see each other. Of two
// clients that may change a service only as they have read it one does.
func TestConditionsWithinABatch(t *testing.T) {
	defer goleak.VerifyNone(t)
	d := stopped(t)
	key := lb.Key{Tenant: "acme", Service: "shop"}
	var tag string
	put := func(port string, c Condition) func(context.Context) error {
		return func(ctx context.Context) error {
			_, got, err := d.PutService(ctx, key, []byte(`{"ports": [{"name": "http", "port": `+port+`, "protocol": "http"}]}`), c)
			if err == nil {
				tag = got
			}
			return err
		}
	}
	remove := func(ctx context.Context) error {
		_, err := d.DeleteService(ctx, key, Condition{})
		return err
	}
	batch(t, d, put("80", Condition{None: true}), nil, put("81", Condition{None: true}), ErrChanged)
	read := Condition{Match: []string{tag}}
	batch(t, d, put("82", read), nil, put("83", read), ErrChanged)
	if got := d.Snapshot().Services.Get(key).Ports[0].Port; got != 82 || tag != d.rec.objects[key].etag() {
		t.Errorf("port %d, tag %s", got, tag)
	}
	batch(t, d, remove, nil, remove, ErrUnknownService)
	batch(t, d, put("84", Condition{None: true}), nil, remove, nil)
	if s := d.Snapshot().Services.Get(key); s != nil {
		t.Errorf("it is there: %+v", s)
	}
}

// stopped is a Daemon that the test runs by hand.
func stopped(t *testing.T) *Daemon {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "roost.yaml")
	yaml := "node: h1\ndata_dir: " + filepath.Join(dir, "data") + "\nadmin: {address: '127.0.0.1:0'}\nxds: {address: '127.0.0.1:0'}\ndns: {addresses: ['127.0.0.1:0'], forward: []}\n"
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(t.Context(), c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if err := d.rec.build(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

// batch runs two commands, one after the other, with one build for both.
func batch(t *testing.T, d *Daemon, first func(context.Context) error, want1 error, second func(context.Context) error, want2 error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := [2]chan error{make(chan error, 1), make(chan error, 1)}
	var waiting []command
	for n, f := range []func(context.Context) error{first, second} {
		go func() { done[n] <- f(ctx) }()
		select {
		case c := <-d.commands:
			if err := c.f(d.rec); err != nil {
				c.done <- err
			} else {
				waiting = append(waiting, c)
			}
		case err := <-done[n]:
			t.Fatalf("command %d has not come: %v", n, err)
		}
	}
	err := d.rec.build(ctx)
	for _, c := range waiting {
		c.done <- err
	}
	for n, want := range []error{want1, want2} {
		if err := <-done[n]; !errors.Is(err, want) {
			t.Errorf("command %d: %v, want %v", n, err, want)
		}
	}
}
