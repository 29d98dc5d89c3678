package pins

import (
	"crypto/rand"
	"strings"
	"testing"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

var web = envoy.Name{Type: envoy.Route, Name: "web"}

// version is a version of route web whose body says so.
func version(v string) *envoy.Resource {
	content, err := anypb.New(&routev3.RouteConfiguration{Name: v})
	if err != nil {
		panic(err)
	}
	body, err := proto.Marshal(&discoveryv3.Resource{Name: "web", Version: v, Resource: content})
	if err != nil {
		panic(err)
	}
	return &envoy.Resource{Name: web, Version: v, Body: body, Refs: []envoy.Name{{Type: envoy.Cluster, Name: "a.b:http@v1"}}}
}

func unknown(v string) *envoy.Resource { return &envoy.Resource{Name: web, Version: v} }

func huge(v string) *envoy.Resource {
	r := version(v)
	r.Body = make([]byte, 2*maxBody)
	_, _ = rand.Read(r.Body) // it never fails
	return r
}

func TestDecide(t *testing.T) {
	refuses := func(id, bad string, held *envoy.Resource) xds.Stand {
		return xds.Stand{ID: id, Role: lb.Gateway, Connected: true, Held: held, Refused: bad, Message: "no " + bad}
	}
	has := func(id string, held *envoy.Resource) xds.Stand {
		return xds.Stand{ID: id, Role: lb.Gateway, Connected: true, Held: held}
	}
	gone := func(s xds.Stand) xds.Stand {
		s.Connected = false
		return s
	}
	node := func(s xds.Stand) xds.Stand {
		s.Role = lb.Node
		return s
	}
	type want struct{ Refused, By, Good, Denied string }
	for _, c := range []struct {
		what    string
		stands  []xds.Stand
		unbuilt bool
		unsaid  bool
		want    []want
	}{
		{what: "nobody refuses", stands: []xds.Stand{has("a", version("1")), has("b", version("2"))}},
		{what: "two refuse", stands: []xds.Stand{refuses("b", "2", version("1")), refuses("a", "2", version("1"))}, want: []want{{"2", "a b", "1", ""}}},
		{what: "one refuses, others take it", stands: []xds.Stand{refuses("a", "2", version("1")), has("b", version("2"))}, want: []want{{"2", "a", "1", ""}}},
		{what: "they hold different ones", stands: []xds.Stand{refuses("a", "3", version("2")), refuses("b", "3", version("1")), has("c", version("1"))}, want: []want{{"3", "a b", "1", ""}}},
		{what: "as many hold each", stands: []xds.Stand{refuses("a", "3", version("2")), refuses("b", "3", version("1"))}, want: []want{{"3", "a b", "1", ""}}},
		{what: "those that refuse are new", stands: []xds.Stand{refuses("a", "2", nil), refuses("b", "2", nil), gone(has("c", version("1")))}, want: []want{{"2", "a b", "1", ""}}},
		{what: "another role's version is another thing", stands: []xds.Stand{refuses("a", "2", nil), refuses("b", "2", nil), node(has("n", version("1")))}, want: []want{{"2", "a b", "", ""}}},
		{what: "those that have gone count less", stands: []xds.Stand{refuses("a", "3", nil), refuses("b", "3", nil), gone(has("c", version("1"))), gone(has("d", version("1"))), has("e", version("2"))}, want: []want{{"3", "a b", "2", ""}}},
		{what: "so do others than those that refuse", stands: []xds.Stand{refuses("a", "3", version("2")), refuses("b", "3", nil), has("c", version("1")), has("d", version("1"))}, want: []want{{"3", "a b", "2", ""}}},
		{what: "nobody has ever had it", stands: []xds.Stand{refuses("a", "2", nil), refuses("b", "2", nil)}, want: []want{{"2", "a b", "", ""}}},
		{what: "so it seems", unsaid: true, stands: []xds.Stand{refuses("a", "2", nil), refuses("b", "2", nil)}, want: []want{{"2", "a b", "", "roost has just started"}}},
		{what: "new, and taken by another", stands: []xds.Stand{refuses("a", "2", nil), refuses("b", "2", nil), has("c", version("2"))}, want: []want{{"2", "a b", "", "other proxies have taken this one"}}},
		{what: "the content is not known", stands: []xds.Stand{refuses("a", "2", unknown("1")), refuses("b", "2", unknown("1"))}, want: []want{{"2", "a b", "", "is not known any more"}}},
		{what: "known of some", stands: []xds.Stand{refuses("a", "2", unknown("1")), refuses("b", "2", version("1"))}, want: []want{{"2", "a b", "1", ""}}},
		{what: "built otherwise", unbuilt: true, stands: []xds.Stand{refuses("a", "2", version("1"))}, want: []want{{"2", "a", "", "built otherwise"}}},
		{what: "too large", stands: []xds.Stand{refuses("a", "2", huge("1")), refuses("b", "2", huge("1"))}, want: []want{{"2", "a b", "", "more than 128 KB"}}},
		{what: "two versions", stands: []xds.Stand{refuses("a", "3", version("1")), refuses("b", "2", version("1"))}, want: []want{{"2", "b", "1", ""}, {"3", "a", "1", ""}}},
	} {
		built := func(v string) *envoy.Resource {
			if c.unbuilt {
				return nil
			}
			return version(v)
		}
		var got []want
		for n, v := range Decide(web, c.stands, built, !c.unsaid) {
			w := want{Refused: v.Refused, By: strings.Join(v.By, " "), Denied: v.Denied}
			if v.Good != nil {
				w.Good = v.Good.Version
			}
			if n < len(c.want) && c.want[n].Denied != "" && strings.Contains(w.Denied, c.want[n].Denied) {
				w.Denied = c.want[n].Denied
			}
			if v.Message != "no "+v.Refused {
				t.Errorf("%s: message %q", c.what, v.Message)
			}
			got = append(got, w)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.what, diff)
		}
	}
}

func TestPinnable(t *testing.T) {
	for typ := range envoy.Types {
		name := envoy.Name{Type: typ, Name: "x"}
		stands := []xds.Stand{{ID: "a", Refused: "2"}, {ID: "b", Refused: "2"}}
		v := Decide(name, stands, version, true)[0]
		if want := typ == envoy.Cluster || typ == envoy.Listener || typ == envoy.Route; (v.Denied == "") != want || Pinnable(typ) != want {
			t.Errorf("%s: %q", typ, v.Denied)
		}
	}
}

// TestRecord: what the ledger keeps is what was decided, and a second proxy, of
// whatever replica, puts it in force.
func TestRecord(t *testing.T) {
	good := version("1")
	first, err := RecordOf(Verdict{Name: web, Refused: "2", By: []string{"a"}, Message: "no\xff"})
	if err != nil || first.InForce() {
		t.Fatalf("%+v, %v", first, err)
	}
	second, err := RecordOf(Verdict{Name: web, Refused: "2", By: []string{"b"}, Message: "no", Good: good})
	if err != nil {
		t.Fatal(err)
	}
	if !first.Merge(second) || first.Merge(second) || !first.InForce() || first.Join([]string{"c"}) {
		t.Errorf("merged %+v", first)
	}
	first.Since = time.Unix(1, 0)
	m, err := first.Mark()
	if err != nil || m.Kind != "pin" || m.Name != "route web 2" || m.Key() != Key(web, "2") {
		t.Fatalf("mark %+v, %v", m, err)
	}
	read, err := Read(m)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, read); diff != "" {
		t.Error(diff)
	}
	pin, err := read.Pin()
	if err != nil {
		t.Fatal(err)
	}
	want := *good
	want.InPlaceOf = "2"
	if diff := cmp.Diff(&want, pin.Good); diff != "" || pin.Name != web || pin.Refused != "2" {
		t.Errorf("pin %+v: %s", pin, diff)
	}
	for _, bad := range []string{`{`, `{"type":"secret","name":"web","refused":"2"}`, `{"type":"route","name":"web","refused":"2","good":"1","body":"bm8="}`, `{"type":"route","name":"web","refused":"2","good":"1","refs":[{"type":"new"}]}`} {
		m.Data = []byte(bad)
		r, err := Read(m)
		if err == nil {
			_, err = r.Pin()
		}
		if err == nil {
			t.Errorf("%s is understood", bad)
		}
	}
}
