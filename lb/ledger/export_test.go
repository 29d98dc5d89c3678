package ledger

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func exported() State {
	since := time.Unix(1700000000, 0).UTC()
	rec := func(service, at, state string) Record {
		return Record{Address: netip.MustParseAddr(at), Kind: Internal, Pool: "127.128.0.0/9", Owner: Owner{"acme", service}, Generation: 3, State: state, Since: since, Reason: "test"}
	}
	return State{
		Generation: 42,
		Records:    []Record{rec("cart", "127.128.0.1", Bound), rec("shop", "127.128.0.2", Quarantined), rec("<käse>", "127.128.0.3", Bound)},
		Objects:    []Object{{Owner: Owner{"acme", "cart"}, Origin: "api", Spec: []byte(`{"body":{"ports":[1,"<&>"]}}`), Generation: 7}, {Owner: Owner{"acme", "shop"}, Origin: "consul:h1/x", Spec: []byte{0, 1, 255}}},
		Marks:      []Mark{{Kind: MarkDrain, Name: "acme/cart/1@h1", Since: since, Generation: 9, Data: json.RawMessage(`{"by":"ada"}`)}},
	}
}

func TestExportIsWhatImportReads(t *testing.T) {
	want := exported()
	data, err := Export(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Import(data)
	if err != nil {
		t.Fatal(err)
	}
	want.Records[0], want.Records[1], want.Records[2] = got.Records[0], got.Records[1], got.Records[2]
	if d := cmp.Diff(exported(), got, exact); d != "" {
		t.Errorf("%s\n%s", d, data)
	}
	if again, err := Export(got); err != nil || string(again) != string(data) {
		t.Errorf("a second export differs: %v", err)
	}
	if empty, err := Export(State{}); err != nil || strings.Contains(string(empty), "null") {
		t.Errorf("%s %v", empty, err)
	}
}

func TestImportIsStrict(t *testing.T) {
	data, err := Export(exported())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ old, new, want string }{
		"no JSON":         {`"generation": 42,`, `"generation": 42`, "line 4, column"},
		"cut off":         {string(data[len(data)/2:]), "", "unexpected EOF"},
		"a wrong type":    {`"generation": 42,`, `"generation": "x",`, "line 3, column"},
		"a bad address":   {`"127.128.0.2"`, `"127.128.0.256"`, "127.128.0.256"},
		"an unknown name": {`"reason": "test",`, `"raeson": "test",`, `unknown field "raeson"`},
		"more after it":   {"\n}\n", "\n}\n{}", "there is more after the end"},
		"another format":  {"export-1", "export-2", `format is "roost-ledger-export-2"`},
		"two owners":      {`"127.128.0.2"`, `"127.128.0.1"`, "127.128.0.1 belongs to acme/cart and to acme/shop"},
		"two addresses":   {`"service": "shop"`, `"service": "cart"`, "acme/cart has two internal addresses"},
		"a wrong state":   {`"quarantined"`, `"gone"`, `state is "gone"`},
		"no owner":        {`"tenant": "acme"`, `"tenant": ""`, "has no owner"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(string(data), c.old, c.new, 1)
			if text == string(data) {
				t.Fatalf("%q is not in the export", c.old)
			}
			if _, err := Import([]byte(text)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestImportIntoALedger(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "a.db")
	l, b := open(t, path)
	if added, err := l.Import(ctx, exported()); err != nil || added != 6 || l.Generation() != 43 {
		t.Fatalf("added %d, generation %d: %v", added, l.Generation(), err)
	}
	before := l.State()
	if added, err := l.Import(ctx, exported()); err != nil || added != 0 || l.Generation() != 43 {
		t.Errorf("again: added %d, generation %d: %v", added, l.Generation(), err)
	}
	later := exported()
	later.Generation = 99
	if added, err := l.Import(ctx, later); err != nil || added != 0 || l.Generation() != 100 {
		t.Errorf("of a higher generation: added %d, generation %d: %v", added, l.Generation(), err)
	}
	wrong := exported()
	wrong.Records[0].Address, wrong.Records[1].Owner = netip.MustParseAddr("127.128.0.9"), Owner{"evil", "shop"}
	_, err := l.Import(ctx, wrong)
	if err == nil || !strings.Contains(err.Error(), "acme/cart has 127.128.0.1 here, 127.128.0.9 in the import") || !strings.Contains(err.Error(), "127.128.0.2 is the internal address of acme/shop here, of evil/shop") {
		t.Errorf("conflicts: %v", err)
	}
	_ = b.Close()
	l, b = open(t, path)
	defer func() { _ = b.Close() }()
	before.Generation = 100
	if d := cmp.Diff(before, l.State(), exact); d != "" {
		t.Error(d)
	}
}
