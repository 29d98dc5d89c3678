package xds

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/roostmesh/roost/xds/envoy"
)

// wholeScript drives a state as a client of the state of the world does: as
// script, but with
//
//	ask TYPE NAME...    a request that names all it wants, and answers nothing
//	back TYPE NAME...   the same on a new stream, by a client that has a version
//	ack N, nack N TEXT  with the names of the last request of that type
type wholeScript struct {
	script
	w      sotw
	wanted [envoy.Types][]string
}

func (x *wholeScript) run(text string) {
	x.t.Helper()
	var want, got []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		want = append(want, line)
		if line[0] == '>' || line[0] == '!' {
			continue
		}
		got = append(got, line)
		x.step(line)
		got = append(got, x.news...)
		x.news = nil
		for out := x.w.next(x.s); out != nil; out = x.w.next(x.s) {
			r := out.(*wholeResponse)
			x.sent[r.nonce] = r.response
			said := fmt.Sprintf("> %s %s:", r.nonce, r.Type)
			for _, res := range r.all {
				said += " " + res.Name.Name + "@" + res.Version
			}
			got = append(got, said)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		x.t.Errorf("-want +got:\n%s", d)
	}
}

func (x *wholeScript) step(line string) {
	verb, rest, _ := strings.Cut(line, " ")
	args := strings.Fields(rest)
	q := &discovery.DiscoveryRequest{}
	var t envoy.Type
	switch verb {
	case "ask", "back":
		t, _ = envoy.TypeNamed(args[0])
		x.wanted[t], q.ResponseNonce = args[1:], "stale"
		if verb == "back" {
			q.VersionInfo, q.ResponseNonce = "some", ""
		}
	case "ack", "nack":
		t, q.ResponseNonce = x.sent[args[0]].Type, args[0]
		if _, said, ok := strings.Cut(rest, " "); ok {
			q.ErrorDetail = &rpcstatus.Status{Message: strings.ReplaceAll(said, `\n`, "\n")}
		}
	case "reconnect":
		x.w = sotw{}
		x.do(line)
		return
	default:
		x.do(line)
		return
	}
	q.ResourceNames = x.wanted[t]
	x.w.q = q
	for _, j := range x.s.request(t, x.w.delta(x.s, t), time.Time{}) {
		x.news = append(x.news, "! "+j.Type.String()+" "+j.Name.Name+"@"+j.version+" "+j.message)
	}
}

func TestStateOfTheWorld(t *testing.T) {
	for _, c := range wholeCases {
		t.Run(c.name, func(t *testing.T) {
			x := &wholeScript{script: script{t: t, sent: map[string]*response{}}}
			x.run(c.script)
		})
	}
}

var wholeCases = []struct{ name, script string }{
	{"no name at first is everything; each response is all there is", `
		world cluster/a@1 cluster/b@1
		ask cluster
		> 1 cluster: a@1 b@1
		ack 1
		world cluster/b@2
		> 2 cluster: a@1 b@2
		ack 2
		world -cluster/a
		> 3 cluster: b@2
		ack 3`},
	{"no name after names is nothing", `
		world cluster/a@1
		ask cluster a
		> 1 cluster: a@1
		ack 1
		ask cluster
		world cluster/a@2
		ask cluster a
		> 2 cluster: a@2`},
	{"everything, then names alone", `
		world cluster/a@1 cluster/b@1
		ask cluster
		> 1 cluster: a@1 b@1
		ack 1
		ask cluster a
		> 2 cluster: a@1
		ack 2
		world cluster/b@2
		world cluster/a@2
		> 3 cluster: a@2`},
	{"an empty world is told of", `
		world
		ask listener
		> 1 listener:`},
	{"a name more: all again, and what it lacks is absent", `
		world listener/l@1 listener/m@1
		ask listener l
		> 1 listener: l@1
		ack 1
		ask listener l m
		> 2 listener: l@1 m@1
		ack 2
		ask listener l m x
		> 3 listener: l@1 m@1
		ack 3
		world listener/x@1
		> 4 listener: l@1 m@1 x@1`},
	{"names of one more, while the answer is on its way", `
		world listener/l@1 listener/m@1
		ask listener l
		> 1 listener: l@1
		ask listener l m
		> 2 listener: l@1 m@1
		ack 1
		ack 2
		world listener/m@2
		> 3 listener: l@1 m@2`},
	{"endpoints: only what is new, and no removal", `
		world endpoint/a@1 endpoint/b@1
		ask endpoint a
		> 1 endpoint: a@1
		ack 1
		ask endpoint a b z
		> 2 endpoint: b@1
		ack 2
		world endpoint/b@2
		> 3 endpoint: b@2
		ack 3
		world -endpoint/a
		world endpoint/a@2
		> 5 endpoint: a@2
		ack 5
		world endpoint/z@1
		> 6 endpoint: z@1`},
	{"what is not there is not told of", `
		world
		ask route r
		ask endpoint e
		world route/r@1
		> 3 route: r@1`},
	{"grpc-go's refusal: the old version is in its place, the rest counts", `
		world listener/l@1 listener/m@1
		ask listener l m
		> 1 listener: l@1 m@1
		ack 1
		world listener/l@2 listener/m@2
		> 2 listener: l@2 m@2
		nack 2 error parsing "ListenerResource" response: resource "l": no RouteSpecifier: name:"m" resource m
		! listener l@2 no RouteSpecifier: name:"m" resource m
		world listener/m@3
		> 3 listener: l@1 m@3
		ack 3
		world listener/l@3
		> 4 listener: l@3 m@3`},
	{"C-core's refusal of two, one of which it had not", `
		world cluster/a@1 cluster/b@1 cluster/c@1
		ask cluster a b c
		> 1 cluster: a@1 b@1 c@1
		nack 1 xDS response validation errors: [resource index 0: a: INVALID_ARGUMENT: errors validating Cluster resource: [field:lb_policy error:LB policy is not supported]; resource index 2: c: INVALID_ARGUMENT: bad]
		! cluster a@1 INVALID_ARGUMENT: errors validating Cluster resource: [field:lb_policy error:LB policy is not supported]
		! cluster c@1 INVALID_ARGUMENT: bad
		world cluster/b@2
		> 2 cluster: b@2`},
	{"a refusal of what came before does not spoil what came with it", `
		world listener/l@1 listener/m@1
		ask listener l
		> 1 listener: l@1
		ask listener l m
		> 2 listener: l@1 m@1
		nack 1 error parsing "ListenerResource" response: resource "l": bad
		! listener l@1 bad
		nack 2 error parsing "ListenerResource" response: resource "l": bad
		world listener/m@2
		> 3 listener: m@2`},
	{"a refusal without a name is narrowed down", `
		world cluster/a@1 cluster/b@1
		ask cluster a b
		> 1 cluster: a@1 b@1
		nack 1 error parsing "ClusterResource" response: top level errors: oops
		> 2 cluster: a@1
		ack 2
		> 3 cluster: a@1 b@1
		nack 3 error parsing "ClusterResource" response: top level errors: oops
		! cluster b@1 error parsing "ClusterResource" response: top level errors: oops`},
	{"a client that comes again keeps what it has in the place of what it refuses", `
		world listener/l@1 listener/m@1
		ask listener l m
		> 1 listener: l@1 m@1
		ack 1
		world listener/l@2
		> 2 listener: l@2 m@1
		nack 2 error parsing "ListenerResource" response: resource "l": bad
		! listener l@2 bad
		reconnect
		back listener l m
		> 1 listener: l@1 m@1`},
	{"and everything when it starts anew", `
		world endpoint/a@1 cluster/a@1
		ask cluster a
		> 1 cluster: a@1
		ack 1
		ask endpoint a
		> 2 endpoint: a@1
		ack 2
		reconnect
		back cluster a
		> 1 cluster: a@1
		back endpoint a
		> 2 endpoint: a@1`},
	{"a cluster is sent with its endpoints", `
		world cluster/a@1 endpoint/a@1
		ask cluster
		> 1 cluster: a@1
		ask endpoint a
		> 2 endpoint: a@1
		ack 2
		ack 1
		world cluster/a@2
		> 3 cluster: a@2
		> 4 endpoint: a@1`},
	{"a listener goes before its cluster does", `
		world cluster/a@1 listener/l@1,cluster/a
		ask cluster
		> 1 cluster: a@1
		ack 1
		ask listener
		> 2 listener: l@1
		ack 2
		world -listener/l -cluster/a
		> 3 listener:
		ack 3
		> 4 cluster:`},
}

// TestWholeIsNotSplit: a client that comes again would remove what comes later.
func TestWholeIsNotSplit(t *testing.T) {
	changed := map[envoy.Name]*envoy.Resource{}
	for i := range 5 {
		r := resource(t, fmt.Sprintf("cluster/%d@1", i))
		r.Body = make([]byte, maxResponse/2)
		changed[r.Name] = r
	}
	world, _ := fakeWorld{}.with(changed)
	x := &wholeScript{script: script{t: t, s: newState(world, 1, newSets(), nil), sent: map[string]*response{}}}
	x.run(`
		back cluster
		> 1 cluster: 0@1 1@1 2@1 3@1 4@1
		ack 1`)
}

// TestWholeResponse: what is sent is what protobuf reads, and a resource's bytes
// are not copied.
func TestWholeResponse(t *testing.T) {
	var all []*envoy.Resource
	want := &discovery.DiscoveryResponse{TypeUrl: envoy.Cluster.URL(), Nonce: "7", ControlPlane: &corev3.ControlPlane{Identifier: "roost/h1"}}
	for _, n := range []string{"a", "b"} {
		content, err := anypb.New(durationpb.New(time.Second))
		if err != nil {
			t.Fatal(err)
		}
		body, err := proto.Marshal(&discovery.Resource{Name: n, Version: "1", Resource: content})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, &envoy.Resource{Name: envoy.Name{Type: envoy.Cluster, Name: n}, Version: "1", Body: body})
		want.Resources = append(want.Resources, content)
	}
	r := &wholeResponse{&response{Type: envoy.Cluster, nonce: "7"}, all}
	want.VersionInfo = r.version()
	data, err := newCodec("roost/h1").Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	got := &discovery.DiscoveryResponse{}
	if err := proto.Unmarshal(data.Materialize(), got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	changed := &wholeResponse{r.response, []*envoy.Resource{all[0], {Name: all[1].Name, Version: "2"}}}
	if r.version() == changed.version() || r.version() == (&wholeResponse{r.response, all[:1]}).version() {
		t.Error("different contents have one version")
	}
	for _, broken := range [][]byte{nil, {0x0a}, {0x12, 0x05, 1}, {0x0a, 0x01, 'x', 0x08}, {0xff}} {
		if c := content(&envoy.Resource{Body: broken}); c != nil {
			t.Errorf("content of %x: %x", broken, c)
		}
	}
}
