package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/roostmesh/roost/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestRows: a row that cannot be used is a Problem with its place; the others
// are served.
func TestRows(t *testing.T) {
	list, problems, err := Parse("i.yaml", []byte(`instances:
  - {tenant: acme, service: shop, id: good, address: "10.0.0.1:80", weight: 3, zone: b, version: v2}
  - {tenant: acme, service: api, id: named, address: 10.0.0.2, ports: {http: 8080, grpc: 9090}}
  - {tenant: acme, service: shop, address: "10.0.0.3:80"}
  - {tenant: acme, service: shop, id: name, address: "shop:80"}
  - {tenant: acme, service: shop, id: noport, address: 10.0.0.4}
  - {tenant: acme, service: shop, id: good, address: "10.0.0.5:80"}
  - {tenant: Acme, service: shop, id: case, address: "10.0.0.6:80"}
  - {tenant: acme, service: shop, id: sick, address: "10.0.0.7:80", health: ill}
  - {tenant: acme, service: shop, id: v6, address: "[fd00::1]:80"}
`), "h1")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range list {
		got = append(got, fmt.Sprintf("%s %s %v %d %s", i.QualifiedName(), i.Address, i.Ports, i.Weight, i.Origin))
	}
	want := []string{"acme/shop/good@h1 10.0.0.1 [{ 80}] 3 i.yaml:2:5", "acme/api/named@h1 10.0.0.2 [{grpc 9090} {http 8080}] 1 i.yaml:3:5", "acme/shop/v6@h1 fd00::1 [{ 80}] 1 i.yaml:10:5"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("instances\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	var said []string
	for _, p := range problems {
		said = append(said, p.Place+" "+p.Message)
	}
	for i, w := range []string{"i.yaml:4:5 ", "i.yaml:5:54 ", "i.yaml:6:56 ", "i.yaml:7:39 ", "i.yaml:8:14 ", "i.yaml:9:77 "} {
		if i >= len(said) || !strings.HasPrefix(said[i], w) {
			t.Errorf("problem %d is not at %s:\n%s", i, w, strings.Join(said, "\n"))
		}
	}
	if _, _, err := Parse("i.yaml", []byte("instances: [{tennant: a}]"), ""); err == nil || !strings.Contains(err.Error(), `i.yaml:1:14: instances[0].tennant: is not a known key; did you mean "tenant"?`) {
		t.Errorf("an unknown key: %v", err)
	}
}

// TestWatch: a rename is seen at once, a bad file keeps what it last said, and a
// directory may come later.
func TestWatch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "services.d")
	updates := make(chan discovery.Update, 100)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	done := make(chan error, 1)
	go func() {
		done <- New(Config{Name: "file", Path: dir, Node: "h1"}).Run(ctx, func(u discovery.Update) { updates <- u })
	}()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	next := func(what string, is func(discovery.Update) bool) {
		t.Helper()
		for {
			select {
			case u := <-updates:
				if is(u) {
					return
				}
			case <-ctx.Done():
				t.Fatalf("%s: not seen", what)
			}
		}
	}
	next("a missing directory is no reason to wait", func(u discovery.Update) bool { return u.Complete })
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(text string) {
		t.Helper()
		tmp := filepath.Join(filepath.Dir(dir), "tmp")
		if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, "i.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	put(`instances: [{tenant: acme, service: shop, id: a, address: "10.0.0.1:80"}]`)
	next("the first instance", func(u discovery.Update) bool { return len(u.Instances) == 1 && u.Instances[0].ID == "a" })
	put("instances: [")
	next("a bad file is an error", func(u discovery.Update) bool {
		return u.Err != nil && strings.Contains(u.Err.Error(), "i.yaml:2:") && strings.Contains(u.Err.Error(), "is not YAML")
	})
	put(`instances: [{tenant: acme, service: shop, id: b, address: "10.0.0.1:80"}]`)
	next("mended", func(u discovery.Update) bool { return len(u.Instances) == 1 && u.Instances[0].ID == "b" })
	if err := os.Remove(filepath.Join(dir, "i.yaml")); err != nil {
		t.Fatal(err)
	}
	next("removed", func(u discovery.Update) bool { return u.Complete && len(u.Scopes) == 0 })
}
