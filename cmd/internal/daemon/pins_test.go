package daemon

import (
	"strings"
	"testing"
	"time"

	"github.com/roostmesh/roost/cmd/internal/pins"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

const pinBody = `{"ports":[{"name":"a","port":80,"protocol":"http"}],"outlier_detection":{"consecutive_5xx":%}}`

// pinWorld is a world in which a service's cluster has changed from good to bad.
type pinWorld struct {
	*world
	key       lb.Key
	name      envoy.Name
	good, bad *envoy.Resource
}

func newPinWorld(t *testing.T) *pinWorld {
	w := &pinWorld{world: quietWorld(t), key: oracleKeys[0]}
	w.name = envoy.Name{Type: envoy.Cluster, Name: lb.ClusterName(w.key, "a", "")}
	w.become("1")
	w.good = w.serves(w.name)
	w.become("2")
	w.bad = w.serves(w.name)
	if w.good.Version == w.bad.Version {
		t.Fatal("the versions are the same")
	}
	return w
}

func (w *pinWorld) become(n string) { w.put(w.key, strings.Replace(pinBody, "%", n, 1)) }

// serves is what a node proxy that starts now is given.
func (w *pinWorld) serves(n envoy.Name) *envoy.Resource {
	return w.r.overlaid.View(envoy.Proxy{Identity: lb.Identity{Role: lb.Node, Node: "h1"}}).Get(n)
}

func (w *pinWorld) marks() (n int) {
	for _, m := range w.d.ledger.Marks() {
		if m.Kind == ledger.MarkPin {
			n++
		}
	}
	return n
}

// refuse has proxies refuse a version while they hold another, and Roost hear of it.
func (w *pinWorld) refuse(bad string, held *envoy.Resource, ids ...string) {
	w.stands = map[envoy.Name][]xds.Stand{}
	for _, id := range ids {
		w.stands[w.name] = append(w.stands[w.name], xds.Stand{ID: id, Role: lb.Node, Connected: true, Held: held, Refused: bad, Message: "no such thing"})
		w.d.onReject(id, w.name, bad, "no such thing")
	}
	if w.r.judge() {
		w.build()
	}
}

func (w *pinWorld) expect(what string, want *envoy.Resource, marks int) {
	w.t.Helper()
	got := w.serves(w.name)
	switch {
	case want == nil && got != nil, want != nil && (got == nil || got.Version != want.Version):
		w.t.Fatalf("%s: %+v is served", what, got)
	case want == w.good && got.InPlaceOf != w.bad.Version:
		w.t.Fatalf("%s: it stands in the place of %q", what, got.InPlaceOf)
	case w.marks() != marks:
		w.t.Fatalf("%s: %d marks", what, w.marks())
	}
}

func (w *pinWorld) problem() lb.Problem {
	list := w.d.pinProblems()
	if len(list) != 1 {
		w.t.Fatalf("problems %+v", list)
	}
	return list[0]
}

// TestPin: a version that two proxies refuse is replaced for everybody, over a
// restart and while endpoints move; it ends with the next version, and its mark
// with it.
func TestPin(t *testing.T) {
	w := newPinWorld(t)
	w.refuse(w.bad.Version, w.good, "node~h1")
	w.expect("one refuses", w.bad, 0)
	if list := w.d.pinProblems(); len(list) > 0 {
		t.Errorf("one refuses: %+v", list)
	}
	w.refuse(w.bad.Version, w.good, "node~h1", "node~h2")
	w.expect("two refuse", w.good, 1)
	p := w.problem()
	if p.Code != pins.CodePinned || p.Object != w.key.String() || p.Place != "api" || !strings.Contains(p.Message, "no such thing") || !strings.Contains(p.Message, "node~h1, node~h2") {
		t.Errorf("problem %+v", p)
	}
	w.stands = nil // they have the good one

	w.die()
	w.start()
	w.expect("after a restart", w.good, 1)
	w.problem()
	endpoints := envoy.Name{Type: envoy.Endpoint, Name: w.name.Name}
	before := w.serves(endpoints).Version
	w.change([]discovery.Instance{w.instance(w.key, "i1")})
	if w.serves(endpoints).Version == before {
		t.Error("endpoints do not move")
	}
	w.pass(2 * unbuiltFor)
	w.expect("much later", w.good, 1)

	w.become("3")
	if got := w.serves(w.name); got.InPlaceOf != "" || got.Version == w.good.Version {
		t.Errorf("mended: %+v is served", got)
	}
	if list := w.d.pinProblems(); len(list) > 0 {
		t.Errorf("mended: %+v", list)
	}
	w.become("2") // at once back: the mark is still there
	w.expect("bad again", w.good, 1)
	w.become("3")
	w.pass(unbuiltFor + 2*time.Second)
	if n := w.marks(); n != 0 {
		t.Errorf("%d marks are left", n)
	}
}

// TestPinLeavesOut: what nobody has ever taken is left out, but not while proxies
// may not have said what they hold.
func TestPinLeavesOut(t *testing.T) {
	w := newPinWorld(t)
	w.refuse(w.bad.Version, nil, "node~h1", "node~h2")
	w.expect("just started", w.bad, 0)
	if p := w.problem(); p.Code != pins.CodeUnpinned || !strings.Contains(p.Message, "roost has just started") {
		t.Errorf("problem %+v", p)
	}
	w.pass(settledAfter + time.Second) // tick looks again
	w.expect("a minute later", nil, 1)
	if p := w.problem(); p.Code != pins.CodePinned || !strings.Contains(p.Message, "left out") {
		t.Errorf("problem %+v", p)
	}
	w.stands = nil
	w.become("3")
	if got := w.serves(w.name); got == nil {
		t.Error("mended: it is not there")
	}
}

// TestPinWithoutAStore: what cannot be written down is not pinned, and is tried
// again.
func TestPinWithoutAStore(t *testing.T) {
	w := newPinWorld(t)
	w.disk.mode = writeFull
	w.refuse(w.bad.Version, w.good, "node~h1", "node~h2")
	w.expect("the disk is full", w.bad, 0)
	w.disk.mode = writeWell
	w.pass(2 * patienceMin)
	w.expect("it is not any more", w.good, 1)
}

// TestPinOfAnotherReplica: what one proxy of another replica refuses does nothing
// yet; with one of this one's they are several. A mark that is not understood does
// nothing and stays.
func TestPinOfAnotherReplica(t *testing.T) {
	w := newPinWorld(t)
	record, err := pins.RecordOf(pins.Verdict{Name: w.name, Refused: w.bad.Version, By: []string{"node~elsewhere"}, Message: "no such thing", Good: w.good})
	w.must(err)
	mark, err := record.Mark()
	w.must(err)
	newer := ledger.Mark{Kind: ledger.MarkPin, Name: "new x 1", Data: []byte(`{"type":"new"}`)}
	w.r.stage(func(tx *ledger.Tx) {
		tx.PutMark(mark)
		tx.PutMark(newer)
	})
	w.build()
	w.expect("another's proxy refuses", w.bad, 2)
	w.refuse(w.bad.Version, w.good, "node~h1")
	w.expect("so does one of here", w.good, 2)
	if p := w.problem(); !strings.Contains(p.Message, "node~elsewhere, node~h1") {
		t.Errorf("problem %+v", p)
	}
	w.stands = nil
	w.become("3")
	w.pass(2 * unbuiltFor)
	if n := w.marks(); n != 1 {
		t.Errorf("%d marks are left", n)
	}
}

// TestPinBringsNothingBack: a pinned route that leads to another tenant's service
// ends with that one's grant, and a Problem says so.
func TestPinBringsNothingBack(t *testing.T) {
	w := &pinWorld{world: quietWorld(t), key: oracleKeys[0]}
	other := oracleKeys[len(oracleKeys)-1]
	if other.Tenant == w.key.Tenant {
		t.Fatal("both are of one tenant")
	}
	w.name = envoy.Name{Type: envoy.Route, Name: lb.RouteNameOf(w.key, 80)}
	w.model.declared[w.key] = oracleBodies[1]
	declare := func(regex, allow string, to ...lb.Key) {
		w.model.declared[other] = `{"ports":[{"name":"a","port":80,"protocol":"http"}],"allow":[` + allow + `]}`
		c := w.config()
		r := &lb.RouteSpec{Name: "r", Tenant: w.key.Tenant, Match: lb.Match{PathRegex: regex}, Origin: "roost.yaml:9:9"}
		for _, key := range to {
			r.To = append(r.To, lb.Target{Service: key, Weight: 1})
		}
		c.Model.Routes = []*lb.RouteSpec{r}
		w.d.config.Store(c)
		w.r.setConfig(c)
		w.build()
	}
	grant := `"` + w.key.Tenant + `"`
	declare("/good", grant, w.key, other)
	w.good = w.serves(w.name)
	declare("/bad", grant, w.key)
	w.bad = w.serves(w.name)
	w.refuse(w.bad.Version, w.good, "node~h1", "node~h2")
	w.expect("granted", w.good, 1)
	if p := w.problem(); p.Object != "route r" || p.Place != "roost.yaml:9:9" {
		t.Errorf("problem %+v", p)
	}
	declare("/bad", "", w.key)
	w.expect("the grant is taken back", w.bad, 1)
	w.refuse(w.bad.Version, w.good, "node~h1", "node~h2")
	if p := w.problem(); p.Code != pins.CodeUnpinned || !strings.Contains(p.Message, "does not allow it any more") {
		t.Errorf("problem %+v", p)
	}
	declare("/bad", grant, w.key)
	w.expect("granted again", w.good, 1)
}
