package xds

import (
	"iter"
	"testing"

	"github.com/roostmesh/roost/xds/envoy"
)

// onDemandCases are about what a client asks for by name that there is not. A
// placeholder has the version "none".
var onDemandCases = []struct{ name, script string }{
	{"an unknown cluster is a placeholder with no endpoints, until it exists, and when it has gone", `
		world
		sub cluster *
		> 1 cluster:
		ack 1
		sub cluster x
		> 2 cluster: x@none
		sub endpoint x
		> 3 endpoint: x@none
		ack 3
		ack 2
		world cluster/x@1,endpoint/x endpoint/x@1
		> 4 cluster: x@1
		> 5 endpoint: x@1
		ack 5
		ack 4
		world -cluster/x -endpoint/x
		> 6 cluster: x@none
		> 7 endpoint: x@none
		ack 7
		ack 6
		world cluster/y@1
		> 8 cluster: y@1`},
	{"a hidden cluster is as an unknown one", `
		world cluster/x@1,endpoint/x endpoint/x@1
		sub cluster x
		> 1 cluster: x@1
		sub endpoint x
		> 2 endpoint: x@1
		ack 2
		ack 1
		views -cluster/x -endpoint/x
		> 3 cluster: x@none
		> 4 endpoint: x@none`},
	{"what only the wildcard covers is removed", `
		world cluster/a@1,endpoint/a cluster/b@1,endpoint/b endpoint/a@1 endpoint/b@1
		sub cluster *
		> 1 cluster: a@1 b@1
		ack 1
		sub cluster b
		> 2 cluster: b@1
		ack 2
		sub endpoint a b
		> 3 endpoint: a@1 b@1
		ack 3
		world -cluster/a -endpoint/a -cluster/b -endpoint/b
		> 4 cluster: b@none
		> 5 endpoint: b@none
		ack 5
		ack 4
		> 6 cluster: -a
		ack 6
		> 7 endpoint: -a`},
	{"a name that is let go loses its placeholder", `
		world
		sub cluster x
		> 1 cluster: x@none
		ack 1
		sub endpoint x
		> 2 endpoint: x@none
		ack 2
		unsub cluster x
		> 3 endpoint: -x
		ack 3`},
	{"a name that is let go under the wildcard is removed", `
		world
		sub cluster * x
		> 1 cluster: x@none
		ack 1
		> 2 cluster:
		ack 2
		unsub cluster x
		> 3 cluster: x@none
		ack 3
		> 4 cluster: -x`},
	{"endpoints without a cluster of that name are removed; named later, they are not", `
		world
		sub endpoint x
		> 1 endpoint: -x
		ack 1
		sub cluster x
		> 2 cluster: x@none
		> 3 endpoint: x@none`},
	{"a cluster in the place of its placeholder comes before what leads to it", `
		world
		sub cluster x
		> 1 cluster: x@none
		ack 1
		sub route r
		> 2 route: -r
		ack 2
		world cluster/x@1 route/r@1,cluster/x
		> 3 cluster: x@1
		ack 3
		> 4 route: r@1`},
	{"resume: a placeholder is known again", `
		world cluster/a@1,endpoint/a endpoint/a@1
		resume cluster a=1 x=none y=none +* +x +y
		resume endpoint a=1 x=none y=none
		world cluster/x@1,endpoint/x endpoint/x@1
		> 1 cluster: x@1
		> 2 endpoint: x@1`},
	{"resume: endpoints that come before their cluster is named", `
		world
		resume endpoint x=none
		resume cluster x=none +* +x`},
	{"resume: endpoints that were answered before their cluster is named", `
		world
		sub endpoint x
		> 1 endpoint: -x
		ack 1
		resume cluster x=none +* +x
		> 2 endpoint: x@none`},
	{"a name whose real cluster is refused has endpoints", `
		world cluster/x@1
		sub endpoint x
		> 1 endpoint: -x
		ack 1
		sub cluster *
		> 2 cluster: x@1
		nack 2 bad
		! cluster x@1
		sub cluster x
		> 3 cluster: -x
		> 4 endpoint: x@none`},
	{"resume: what has come meanwhile", `
		world cluster/x@1,endpoint/x endpoint/x@1
		resume cluster x=none +* +x
		> 1 cluster: x@1
		resume endpoint x=none
		> 2 endpoint: x@1`},
	{"resume: what has gone meanwhile", `
		world
		resume cluster x=1 +* +x
		> 1 cluster: x@none
		resume endpoint x=1
		> 2 endpoint: x@none`},
	{"a virtual host changes with its route, and is never removed", `
		world route/r@1
		sub virtual_host
		sub virtual_host r/a r/b q/a
		> 1 virtual_host: q/a@none r/a@1 r/b@1
		ack 1
		unsub virtual_host r/b
		world route/r@2
		> 2 virtual_host: r/a@2
		ack 2
		world route/q@1
		> 3 virtual_host: q/a@1
		ack 3
		world -route/r -route/q
		> 4 virtual_host: q/a@none r/a@none
		ack 4
		views route/r@1
		> 5 virtual_host: r/a@1
		ack 5`},
	{"a virtual host waits for its new cluster", `
		world
		sub cluster *
		> 1 cluster:
		ack 1
		sub virtual_host r/a
		> 2 virtual_host: r/a@none
		ack 2
		world cluster/c@1 route/r@1,cluster/c
		> 3 cluster: c@1
		ack 3
		> 4 virtual_host: r/a@1
		ack 4
		world -cluster/c route/r@2
		> 5 virtual_host: r/a@2
		ack 5
		> 6 cluster: -c`},
	{"resume: virtual hosts", `
		world route/r@1
		resume virtual_host r/a=1 r/b=0 x/a=none
		> 1 virtual_host: r/b@1`},
}

func TestOnDemand(t *testing.T) {
	for _, c := range onDemandCases {
		t.Run(c.name, func(t *testing.T) {
			x := &script{t: t, sent: map[string]*response{}}
			x.run(c.script)
		})
	}
}

// all lists every name there may be.
func (m *envoyModel) all() iter.Seq[envoy.Name] {
	return func(yield func(envoy.Name) bool) {
		for t := range envoy.Types {
			for _, name := range modelNames {
				if !yield(modelName(t, name)) {
					return
				}
			}
		}
	}
}
