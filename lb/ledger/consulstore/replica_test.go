package consulstore

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/lb/ledger"
)

// TestReplicas see each other come, change and go.
func TestReplicas(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	one, two := a.store(t, prefix, "one"), a.store(t, prefix, "zwölf/2")
	if err := one.Announce(ctx, ledger.Replica{Config: "abc", Acked: 7, Status: []byte(`{"ok":true}`)}); err != nil {
		t.Fatal(err)
	}
	list, index, err := one.Replicas(ctx, 0)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if r := list[0]; r.Name != "one" || r.Session != one.session || r.Config != "abc" || r.Acked != 7 || string(r.Status) != `{"ok":true}` || r.Since.IsZero() || r.ModifyIndex == 0 {
		t.Errorf("%+v", r)
	}
	// next waits for a list that fits.
	next := func(what string, fits func([]ledger.Replica) bool) {
		t.Helper()
		for !fits(list) {
			if list, index, err = one.Replicas(ctx, index); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	if err := two.Announce(ctx, ledger.Replica{}); err != nil {
		t.Fatal(err)
	}
	next("a second one", func(l []ledger.Replica) bool { return len(l) == 2 && l[1].Name == "zwölf/2" })
	since := list[1].Since
	if err := two.Announce(ctx, ledger.Replica{Cleared: 9}); err != nil {
		t.Fatal(err)
	}
	next("a change", func(l []ledger.Replica) bool { return len(l) == 2 && l[1].Cleared == 9 && l[1].Since.Equal(since) })
	if err := two.Close(); err != nil {
		t.Fatal(err)
	}
	next("a farewell", func(l []ledger.Replica) bool { return len(l) == 1 && l[0].Name == "one" })
}

// TestANameIsForOneReplica: the second one that lives is refused, and a replica
// that crashed comes back at once, if it can say that it is the same.
func TestANameIsForOneReplica(t *testing.T) {
	a, prefix := consul(t), newPrefix()
	ctx := t.Context()
	as := func(identity string) func(*Config) { return func(c *Config) { c.Identity = identity } }
	first := a.store(t, prefix, "one", as("disk-1"))
	if err := first.Announce(ctx, ledger.Replica{}); err != nil {
		t.Fatal(err)
	}
	for _, identity := range []string{"", "disk-2"} {
		err := a.store(t, prefix, "one", as(identity)).Announce(ctx, ledger.Replica{})
		wantErr(t, "the second of a name", err, ledger.ErrLocked, a, prefix+"replicas/one", "is alive since", "another name")
	}
	if p, _, err := a.client.KV().Get(prefix+"replicas/one", nil); err != nil || p == nil || p.Session != first.session {
		t.Fatalf("the first one has lost its key: %+v %v", p, err)
	}
	start := time.Now()
	again := a.store(t, prefix, "one", as("disk-1"))
	if err := again.Announce(ctx, ledger.Replica{}); err != nil {
		t.Fatalf("after a crash: %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it came back after %v", took)
	}
	// And also when its session was destroyed a moment ago: no lock delay.
	if _, err := a.client.Session().Destroy(again.session, nil); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	if err := again.Announce(ctx, ledger.Replica{}); err != nil || time.Since(start) > 5*time.Second {
		t.Errorf("after its session's end: %v after %v", err, time.Since(start))
	}
	if _, err := first.Load(ctx); err != nil {
		t.Fatal(err)
	}
	err := first.Apply(ctx, ledger.Batch{Generation: 1, PutMarks: []ledger.Mark{{Kind: "drain", Name: "x"}}})
	wantErr(t, "a write of the former life", err, ledger.ErrSessionLost, a)
}

// TestRunKeepsTheSession longer than its TTL, and makes a new one of a lost one.
func TestRunKeepsTheSession(t *testing.T) {
	t.Parallel() // it waits most of the time
	a, prefix := consul(t), newPrefix()
	s := a.store(t, prefix, "one", func(c *Config) { c.TTL = 1500 * time.Millisecond })
	if err := s.Announce(t.Context(), ledger.Replica{Config: "abc"}); err != nil {
		t.Fatal(err)
	}
	list, _, err := s.Replicas(t.Context(), 0)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	run(t, s)
	first := list[0].Session
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second) // more than twice the TTL
	defer cancel()
	for index := uint64(0); ; {
		if list, index, err = s.Replicas(ctx, index); errors.Is(err, context.DeadlineExceeded) {
			break
		}
		if err != nil || len(list) != 1 || list[0].Session != first {
			t.Fatalf("while it is renewed: %+v %v", list, err)
		}
	}
	lose := func(what string, f func() error) {
		if err := f(); err != nil {
			t.Fatal(err)
		}
		until(t, "it is announced again after "+what, func() error {
			list, _, err := s.Replicas(t.Context(), 0)
			if err == nil && (len(list) != 1 || list[0].Config != "abc") {
				err = fmt.Errorf("%+v", list)
			}
			return err
		})
	}
	lose("its session was destroyed", func() error { _, err := a.client.Session().Destroy(first, nil); return err })
	lose("its key was deleted", func() error { _, err := a.client.KV().DeleteTree(prefix, nil); return err })
}

// token makes a token with rules.
func (a *agent) token(t *testing.T, name, rules string) string {
	t.Helper()
	o := &api.WriteOptions{Token: management}
	p, _, err := a.client.ACL().PolicyCreate(&api.ACLPolicy{Name: name, Rules: rules}, o)
	if err != nil {
		t.Fatal(err)
	}
	token, _, err := a.client.ACL().TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{ID: p.ID}}}, o)
	if err != nil {
		t.Fatal(err)
	}
	return token.SecretID
}
