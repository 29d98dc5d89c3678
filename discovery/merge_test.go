package discovery

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestTwoSources: a service has the instances of both; the failure of one marks
// its own stale, and only those.
func TestTwoSources(t *testing.T) {
	m := newMerge(Config{Log: quiet()})
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}})
	m.apply(Update{Source: "file", Scope: "i.yaml", Instances: []Instance{at("b", "10.0.0.2:80"), at("a", "10.0.0.9:80")}})
	want := func(what, ids string) {
		t.Helper()
		var got []string
		for _, i := range m.catalog().Groups.Get(shop).Instances {
			text := i.ID + "/" + i.Source
			if i.Stale {
				text += "?"
			}
			got = append(got, text)
		}
		if strings.Join(got, " ") != ids {
			t.Errorf("%s: %q, want %q", what, got, ids)
		}
	}
	want("of one id and node the first source's stays", "a/consul b/file")
	m.apply(Update{Source: "file", Scope: "i.yaml", Err: errors.New("not YAML")})
	want("one fails", "a/consul b/file?")
	m.apply(Update{Source: "consul", Scope: "shop", Index: 9})
	want("the other one removes", "a/file? b/file?")
	m.apply(Update{Source: "file", Complete: true, Scopes: []string{}})
	if g := m.catalog().Groups.Get(shop); g != nil {
		t.Errorf("%+v is left", g)
	}
	if len(m.where) != 0 {
		t.Errorf("places are left: %v", m.where)
	}
}

// TestErrorsOfAStaleSource: each scope has an error of its own; they are no
// reason for a Catalog each.
func TestErrorsOfAStaleSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMerge(Config{Log: quiet()})
		published := 0
		for i := range 300 {
			if m.apply(Update{Source: "consul", Scope: fmt.Sprint(i), Err: fmt.Errorf("service %d: refused", i)}) {
				published++
			}
		}
		pass(sayAgain)
		if m.apply(Update{Source: "consul", Scope: "1", Err: errors.New("no leader")}) {
			published++
		}
		if p := m.catalog().Problems; published != 2 || len(p) != 1 || !strings.HasSuffix(p[0].Message, "no leader") {
			t.Errorf("%d catalogs; problems %+v", published, p)
		}
	})
}

// TestProblemsComeAndGo: a scope's problems are published when they change, and
// leave with it.
func TestProblemsComeAndGo(t *testing.T) {
	m := newMerge(Config{Log: quiet()})
	bad := Problem{Code: "instance_invalid", Place: "consul:h1/a", Message: "no port"}
	u := Update{Source: "consul", Scope: "shop", Problems: []Problem{bad}}
	if !m.apply(u) || len(m.catalog().Problems) != 1 {
		t.Error("a problem is not published")
	}
	if m.apply(u) {
		t.Error("the same problem is published twice")
	}
	bad.Message = "no address"
	u.Problems = []Problem{bad}
	if !m.apply(u) || m.catalog().Problems[0].Message != "no address" {
		t.Error("another problem is not published")
	}
	if u.Problems = nil; !m.apply(u) || len(m.catalog().Problems) != 0 || len(m.sources["consul"].scopes) != 0 {
		t.Error("a problem stays")
	}
}

// TestUntouchedGroupsKeepTheirPointer: so that what is built from them is not
// built again.
func TestUntouchedGroupsKeepTheirPointer(t *testing.T) {
	m := newMerge(Config{Log: quiet()})
	cart := at("c", "10.0.0.3:80")
	cart.Key = Key{"acme", "cart"}
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}, Index: 1})
	m.apply(Update{Source: "consul", Scope: "cart", Instances: []Instance{cart}, Index: 2})
	before := m.catalog()
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{at("a", "10.0.0.2:80")}, Index: 3, Seen: time.Unix(9, 0)})
	after := m.catalog()
	if after.Groups.Get(cart.Key) != before.Groups.Get(cart.Key) {
		t.Error("another service's group is new")
	}
	if g := after.Groups.Get(shop); g == before.Groups.Get(shop) || g.Source != "consul" || g.Index != 3 || !g.Seen.Equal(time.Unix(9, 0)) {
		t.Errorf("%+v", g)
	}
	m.apply(Update{Source: "consul", Err: errors.New("no leader")})
	if g := m.catalog().Groups.Get(shop); !g.Instances[0].Stale || g.Source != "consul" || g.Index != 3 || !g.Seen.Equal(time.Unix(9, 0)) {
		t.Errorf("a mark counts as a change: %+v", g)
	}
	if before.Groups.Get(shop).Instances[0].Address.String() != "10.0.0.1" {
		t.Error("a published group was written to")
	}
}

// TestOneScopeOfManyTenants: instances of one Consul name may belong to several
// services.
func TestOneScopeOfManyTenants(t *testing.T) {
	m := newMerge(Config{Log: quiet()})
	other := at("b", "10.0.0.2:80")
	other.Key.Tenant = "globex"
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80"), other}})
	if got := m.catalog().Groups; got.Len() != 2 || len(got.Get(shop).Instances) != 1 {
		t.Errorf("%+v", got)
	}
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{other}})
	if got := m.catalog().Groups; got.Len() != 1 || got.Get(other.Key) == nil {
		t.Errorf("%+v", got)
	}
}

// TestKeptMeanwhile: what is written is the state when it fell due, whatever
// comes meanwhile, and what cannot be written is due again.
func TestKeptMeanwhile(t *testing.T) {
	dir := t.TempDir()
	c := Config{Log: quiet(), Dir: filepath.Join(dir, "catalog"), Remember: []string{"consul"}}
	m := newMerge(c)
	m.source("consul")
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{at("a", "10.0.0.1:80")}, Index: 5})
	if len(m.due()) != 0 {
		t.Error("due before the first pass has ended")
	}
	m.apply(Update{Source: "consul", Complete: true, Scopes: []string{"shop"}, Index: 5})
	list := m.due()
	m.apply(Update{Source: "consul", Err: errors.New("gone")})
	m.apply(Update{Source: "consul", Scope: "shop", Index: 9})
	if err := os.WriteFile(c.Dir, nil, 0o600); err != nil { // in the way
		t.Fatal(err)
	}
	failed := c.keep(list)
	if !slices.Equal(failed, []string{"consul"}) {
		t.Errorf("failed %v", failed)
	}
	if err := os.Remove(c.Dir); err != nil {
		t.Fatal(err)
	}
	if failed := c.keep(list); failed != nil {
		t.Errorf("failed %v", failed)
	}
	kept, err := readLastGood(c.path("consul"))
	if err != nil || len(kept.Scopes["shop"].Instances) != 1 || kept.Scopes["shop"].Instances[0].Stale {
		t.Errorf("%+v %v", kept, err)
	}
	m.apply(Update{Source: "consul", Scope: "shop", Index: 9})
	m.again(failed)
	if list := m.due(); len(list) != 1 || len(m.due()) != 0 {
		t.Errorf("due %v", list)
	}
	if entries, err := os.ReadDir(c.Dir); err != nil || len(entries) != 1 {
		t.Errorf("files are left: %v %v", entries, err)
	}
}

// TestLastGoodThatCannotBeUsed: none of these is a reason not to start.
func TestLastGoodThatCannotBeUsed(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "half": `{"format": 1, "scopes": {"a": {"inst`, "another format": `{"format": 9}`, "an empty scope": `{"format": 1, "scopes": {"a": null}}`,
		"bad address": `{"format": 1, "scopes": {"a": {"instances": [{"address": "nowhere"}]}}}`,
	} {
		dir := t.TempDir()
		c := Config{Log: quiet(), Dir: dir, Remember: []string{"consul"}}
		if err := os.WriteFile(c.path("consul"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		m := newMerge(c)
		m.load()
		if got := m.catalog(); got.Ready || got.Groups.Len() != 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestProbesBeginAnew: one that answers between two failures is alive.
func TestProbesBeginAnew(t *testing.T) {
	m := newMerge(Config{Log: quiet()})
	a := at("a", "10.0.0.1:80")
	m.apply(Update{Source: "consul", Scope: "shop", Instances: []Instance{a}, Index: 9})
	m.apply(Update{Source: "consul", Scope: "shop", Index: 1})
	probe := func(alive bool) bool {
		m.sources["consul"].held[idOf(&a)].running = true
		r := probeResult{source: "consul", id: idOf(&a)}
		if !alive {
			r.err = errors.New("silent")
		}
		return m.probed(r)
	}
	for _, alive := range []bool{false, false, true, false, false} {
		if probe(alive) {
			t.Error("it is gone")
		}
	}
	if !probe(false) || m.catalog().Groups.Len() != 0 || m.sources["consul"].status.Held != 0 {
		t.Error("it stays")
	}
	if m.probed(probeResult{source: "consul", id: idOf(&a), err: errors.New("late")}) {
		t.Error("a probe of one that has gone says something")
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }
