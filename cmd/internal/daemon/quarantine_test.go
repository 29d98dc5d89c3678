package daemon

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
)

func quarantined(address, service, kind string, generation uint64) ledger.Record {
	return ledger.Record{Address: netip.MustParseAddr(address), Kind: kind, Owner: ledger.Owner{Tenant: "acme", Service: service}, State: ledger.Quarantined, Generation: generation}
}

// TestQuarantineDue: each thing that an address waits for, one by one.
func TestQuarantineDue(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	q := newQuarantine(func() time.Time { return now })
	q.configure(10*time.Second, time.Second)
	shop, public, other := quarantined("127.128.0.1", "shop", ledger.Internal, 1), quarantined("198.51.100.1", "shop", ledger.Dedicated, 1), quarantined("127.128.0.2", "other", ledger.Internal, 2)
	bound := quarantined("127.128.0.3", "bound", ledger.Internal, 1)
	bound.State = ledger.Bound
	q.sync([]ledger.Record{shop, public, other, bound})
	var have []xds.Holder
	holders := func(wanted func(string) bool) (out []xds.Holder) {
		for _, h := range have {
			if h.Name == "" || wanted(h.Name) {
				out = append(out, h)
			}
		}
		return out
	}
	due := func(what string, want ...string) {
		t.Helper()
		var got []string
		for _, r := range q.due(holders) {
			got = append(got, r.Address.String())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	now = now.Add(time.Hour)
	due("no World was served")
	q.serving()
	now = now.Add(10*time.Second - 1)
	due("a moment too early")
	now = now.Add(1)
	due("nobody has it", "127.128.0.1", "127.128.0.2", "198.51.100.1")
	have = []xds.Holder{{ID: "node~h1", Name: "shop.acme:80", Connected: true, Since: now}}
	due("a proxy has one listener", "127.128.0.2", "198.51.100.1")
	have = []xds.Holder{{ID: "gateway~edge~1", Name: "shop.acme:80@dedicated", Connected: true, Since: now}}
	due("a gateway has the dedicated one", "127.128.0.1", "127.128.0.2")
	have = []xds.Holder{{ID: "node~h1", Name: "shop.acme:80", Since: now.Add(-10*time.Second + 1)}}
	due("it has just gone", "127.128.0.2", "198.51.100.1")
	have = []xds.Holder{{ID: "node~h1", Name: "shop.acme:80", Since: now.Add(-10 * time.Second)}}
	due("it is forgotten", "127.128.0.1", "127.128.0.2", "198.51.100.1")
	have = []xds.Holder{{ID: "node~h1", Connected: true, Since: now}}
	due("one has come and not said yet what it has")
	have = nil

	again := shop
	again.Generation = 9 // bound and released again in between
	q.sync([]ledger.Record{again, other})
	due("its time begins anew", "127.128.0.2")
	q.configure(10*time.Second, time.Minute)
	due("answers of a minute may be cached")
	q.configure(10*time.Second, time.Second)
	now = now.Add(50 * time.Second)
	due("longer answers were given before")
	now = now.Add(12 * time.Second)
	due("they have expired", "127.128.0.1", "127.128.0.2")
}

func TestOwnerOfListener(t *testing.T) {
	for name, want := range map[string]listenerOwner{
		"shop.acme:80":           {"shop.acme", ledger.Internal},
		"shop.acme:80@dedicated": {"shop.acme", ledger.Dedicated},
		"web":                    {"web", ledger.Internal}, // a public one: no service is called so
	} {
		if got := ownerOfListener(name); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}
