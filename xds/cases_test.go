package xds

var stateCases = []struct{ name, script string }{
	{"old wildcard", `
		world cluster/a@1 cluster/b@1
		sub cluster
		> 1 cluster: a@1 b@1
		ack 1`},
	{"an empty world answers a wildcard", `
		world
		sub cluster *
		> 1 cluster:
		sub listener *
		> 2 listener:
		ack 1
		ack 2`},
	{"named clusters only, without a wildcard", `
		world cluster/a@1 cluster/b@1
		sub cluster a
		> 1 cluster: a@1
		ack 1
		world cluster/a@2 cluster/b@2
		> 2 cluster: a@2
		ack 2`},
	{"named next to the wildcard", `
		world cluster/a@1
		sub cluster *
		> 1 cluster: a@1
		sub cluster a x
		> 2 cluster: a@1 x@none
		ack 1
		ack 2
		world cluster/x@1
		> 3 cluster: x@1
		ack 3
		unsub cluster a
		> 4 cluster: a@1
		ack 4
		unsub cluster *
		world cluster/a@2 cluster/x@2
		> 5 cluster: x@2`},
	{"named types are sent by name, again when asked again, and once they exist", `
		world endpoint/a@1 endpoint/b@1
		sub endpoint a z
		> 1 endpoint: a@1 -z
		ack 1
		sub endpoint a
		> 2 endpoint: a@1
		ack 2
		world endpoint/z@1 endpoint/b@2
		> 3 endpoint: z@1
		ack 3
		unsub endpoint a
		world endpoint/a@2`},
	{"one response of a type at a time, but answers", `
		world cluster/a@1 endpoint/a@1 endpoint/b@1
		sub endpoint a
		> 1 endpoint: a@1
		world endpoint/a@2
		sub endpoint b
		> 2 endpoint: b@1
		world endpoint/a@3
		ack 1
		ack 2
		> 3 endpoint: a@3`},
	{"a cluster takes its endpoints along, changed or not", `
		world cluster/a@1,endpoint/a endpoint/a@1 cluster/b@1,endpoint/bb endpoint/bb@1
		sub cluster *
		> 1 cluster: a@1 b@1
		sub endpoint a bb
		> 2 endpoint: a@1 bb@1
		ack 2
		ack 1
		world cluster/a@2,endpoint/a cluster/b@2,endpoint/bb
		> 3 cluster: a@2 b@2
		> 4 endpoint: a@1 bb@1
		ack 4
		ack 3
		world endpoint/a@2
		> 5 endpoint: a@2`},
	{"a cluster sent while endpoints are on their way", `
		world cluster/a@1 endpoint/a@1
		sub cluster *
		> 1 cluster: a@1
		ack 1
		sub endpoint a
		> 2 endpoint: a@1
		world cluster/a@2
		> 3 cluster: a@2
		ack 2
		> 4 endpoint: a@1
		ack 4
		ack 3`},
	{"a changed listener takes its routes along", `
		world listener/l@1,route/r route/r@1
		sub listener *
		> 1 listener: l@1
		sub route r
		> 2 route: r@1
		ack 1
		ack 2
		world listener/l@2,route/r
		> 3 listener: l@2
		> 4 route: r@1`},
	{"a new listener waits for its new cluster, through its route", `
		world cluster/a@1
		sub cluster *
		> 1 cluster: a@1
		sub listener *
		> 2 listener:
		ack 2
		ack 1
		world cluster/b@1 listener/l@1,route/r route/r@1,cluster/b listener/m@1,cluster/a
		> 3 cluster: b@1
		> 4 listener: m@1
		ack 4
		ack 3
		> 5 listener: l@1
		sub route r
		> 6 route: r@1`},
	{"the first listeners wait for all of them", `
		world cluster/a@1 listener/l@1,cluster/a listener/m@1
		sub cluster *
		> 1 cluster: a@1
		sub listener *
		ack 1
		> 2 listener: l@1 m@1`},
	{"a route waits for its new cluster, others do not", `
		world cluster/a@1 route/r@1,cluster/a route/q@1,cluster/a endpoint/a@1
		sub cluster *
		> 1 cluster: a@1
		ack 1
		sub route r q
		> 2 route: q@1 r@1
		sub endpoint a
		> 3 endpoint: a@1
		ack 3
		ack 2
		world cluster/b@1 route/r@2,cluster/a,cluster/b route/q@2,cluster/a endpoint/a@2
		> 4 route: q@2
		> 5 cluster: b@1
		> 6 endpoint: a@2
		ack 4
		nack 5 Error adding/updating cluster(s) b: bad
		! cluster b@1
		> 7 route: r@2`},
	{"a removal waits for what refers to it", `
		world cluster/a@1 cluster/b@1 listener/l@1,route/r route/r@1,cluster/a endpoint/a@1
		sub cluster *
		> 1 cluster: a@1 b@1
		ack 1
		sub endpoint a
		> 2 endpoint: a@1
		ack 2
		sub listener *
		> 3 listener: l@1
		ack 3
		sub route r
		> 4 route: r@1
		ack 4
		world -cluster/a -endpoint/a route/r@2,cluster/b
		> 5 route: r@2
		ack 5
		> 6 cluster: -a
		ack 6
		> 7 endpoint: -a
		ack 7
		world -listener/l -route/r -cluster/b
		> 8 listener: -l
		ack 8
		> 9 route: -r
		ack 9
		> 10 cluster: -b
		ack 10`},
	{"removals go last", `
		world cluster/a@1 listener/m@1
		sub cluster *
		> 1 cluster: a@1
		ack 1
		sub listener *
		> 2 listener: m@1
		ack 2
		world cluster/b@1 listener/l@1,cluster/b -listener/m -cluster/a
		> 3 cluster: b@1
		ack 3
		> 4 listener: l@1
		> 5 cluster: -a
		ack 4
		> 6 listener: -m`},
	{"a suspect waits for its new cluster, too", `
		world listener/l@1,cluster/x listener/m@1
		sub cluster *
		> 1 cluster:
		ack 1
		sub listener *
		> 2 listener: l@1 m@1
		world cluster/x@1
		> 3 cluster: x@1
		nack 2 something is wrong
		> 4 listener: m@1
		ack 4
		ack 3
		> 5 listener: l@1`},
	{"a refused parent keeps its old child", `
		world cluster/a@1 cluster/b@1 listener/l@1,cluster/a
		sub cluster *
		> 1 cluster: a@1 b@1
		ack 1
		sub listener *
		> 2 listener: l@1
		ack 2
		world listener/l@2,cluster/b -cluster/a
		> 3 listener: l@2
		nack 3 Error adding/updating listener(s) l: bad
		! listener l@2
		world listener/l@3,cluster/b
		> 4 listener: l@3
		ack 4
		> 5 cluster: -a`},
	{"an Envoy list names the refused; the rest counts", `
		world listener/l@1 listener/m@1 listener/n@1
		sub listener *
		> 1 listener: l@1 m@1 n@1
		nack 1 Error adding/updating listener(s) l: cannot bind\nn: bad\n
		! listener l@1
		! listener n@1
		world listener/l@2 listener/m@2
		> 2 listener: l@2 m@2
		ack 2
		views listener/n@1`},
	{"a refusal without a name is narrowed down", `
		world cluster/a@1 cluster/b@1 cluster/c@1
		sub cluster *
		> 1 cluster: a@1 b@1 c@1
		nack 1 something is wrong
		> 2 cluster: a@1
		world cluster/c@2 cluster/d@1
		ack 2
		> 3 cluster: b@1
		nack 3 something is wrong
		! cluster b@1
		> 4 cluster: c@2 d@1
		ack 4
		world cluster/b@2
		> 5 cluster: b@2`},
	{"a listener waits while its cluster is a suspect", `
		world cluster/a@1 cluster/b@1 listener/l@1,cluster/b
		sub cluster *
		> 1 cluster: a@1 b@1
		sub listener *
		nack 1 something is wrong
		> 2 cluster: a@1
		ack 2
		> 3 cluster: b@1
		ack 3
		> 4 listener: l@1`},
	{"a named refusal of a type that stops at the first fault", `
		world endpoint/a@1 endpoint/b@1 endpoint/c@1
		sub endpoint a b c
		> 1 endpoint: a@1 b@1 c@1
		nack 1 malformed endpoint in b: oops
		! endpoint b@1
		> 2 endpoint: a@1 c@1
		ack 2`},
	{"a spoiled repetition is repeated", `
		world cluster/a@1 cluster/b@1 endpoint/a@1 endpoint/b@1
		sub cluster *
		> 1 cluster: a@1 b@1
		sub endpoint a b
		> 2 endpoint: a@1 b@1
		ack 2
		ack 1
		world cluster/a@2 endpoint/b@2
		> 3 cluster: a@2
		> 4 endpoint: a@1 b@2
		nack 4 broken
		> 5 endpoint: a@1
		ack 5
		> 6 endpoint: b@2
		nack 6 broken
		! endpoint b@2
		ack 3
		world cluster/b@2
		> 7 cluster: b@2
		> 8 endpoint: b@1`},
	{"a refused subscription is answered without that version", `
		world route/r@1
		sub route r
		> 1 route: r@1
		nack 1 bad
		! route r@1
		sub route r
		> 2 route: -r
		ack 2
		world route/r@2
		> 3 route: r@2
		ack 3
		world route/r@3
		> 4 route: r@3
		nack 4 bad
		! route r@3
		sub route r
		> 5 route: r@2`},
	{"a refusal outlives the stream, until the version changes", `
		world cluster/a@1 cluster/b@1
		sub cluster *
		> 1 cluster: a@1 b@1
		nack 1 Error adding/updating cluster(s) b: bad
		! cluster b@1
		reconnect
		sub cluster *
		> 1 cluster: a@1
		ack 1
		world cluster/b@2
		> 2 cluster: b@2`},
	{"retry sends the same bytes again; a second refusal is no news", `
		world listener/l@1 listener/m@1
		sub listener *
		> 1 listener: l@1 m@1
		nack 1 Error adding/updating listener(s) l: cannot bind '127.0.0.1:80': Address already in use\nm: bad
		! listener l@1
		! listener m@1
		retry
		> 2 listener: l@1
		nack 2 Error adding/updating listener(s) l: cannot bind '127.0.0.1:80': Address already in use
		retry
		> 3 listener: l@1
		ack 3
		retry`},
	{"an address that moves to another listener", `
		world listener/l@1
		sub listener *
		> 1 listener: l@1
		ack 1
		world -listener/l listener/m@1
		> 2 listener: m@1
		nack 2 Error adding/updating listener(s) m: error adding listener: 'm' has duplicate address '127.0.0.1:80' as existing listener
		! listener m@1
		> 3 listener: -l
		ack 3
		> 4 listener: m@1
		ack 4`},
	{"resume: only what differs is sent", `
		world cluster/a@1 cluster/b@2 endpoint/a@1 endpoint/b@1 listener/l@1,cluster/a
		resume cluster a=1 b=1 +*
		> 1 cluster: b@2
		resume endpoint a=1 b=1
		> 2 endpoint: b@1
		resume listener l=1
		ack 2
		ack 1
		sub endpoint a
		> 3 endpoint: a@1`},
	{"resume: an unknown version keeps what it may refer to", `
		world cluster/a@1 cluster/b@1 listener/l@2,cluster/b endpoint/b@1
		resume cluster old=1 a=1
		> 1 cluster: b@1
		resume endpoint old=1
		resume listener l=1
		ack 1
		> 2 listener: l@2
		ack 2
		> 3 cluster: -old
		ack 3
		> 4 endpoint: -old
		ack 4`},
	{"resume: what the last stream held is known", `
		world cluster/a@1 cluster/b@1 listener/l@1,cluster/a
		sub cluster *
		> 1 cluster: a@1 b@1
		ack 1
		sub listener *
		> 2 listener: l@1
		ack 2
		world -cluster/b listener/l@2,cluster/a
		> 3 listener: l@2
		> 4 cluster: -b
		reconnect
		resume cluster a=1 b=1
		resume listener l=1
		> 1 listener: l@2
		> 2 cluster: -b`},
	{"resume: a removal waits for types that may refer to it", `
		world cluster/a@1 cluster/b@1 listener/l@1,route/r route/r@2,cluster/b
		resume cluster old=1 a=1 b=1
		resume listener l=1
		resume route r=1
		> 1 route: r@2
		ack 1
		> 2 cluster: -old`},
	{"resume: no route is waited for where no listener has one", `
		world cluster/a@1 listener/l@1,cluster/a
		resume cluster old=1 a=1
		resume listener l=1
		> 1 cluster: -old`},
	{"a named cluster that comes, goes and comes", `
		world cluster/a@1
		sub cluster a
		> 1 cluster: a@1
		world -cluster/a
		ack 1
		> 2 cluster: a@none
		world cluster/a@1
		ack 2
		> 3 cluster: a@1
		ack 3`},
	{"a version that comes back", `
		world cluster/a@1
		sub cluster *
		> 1 cluster: a@1
		world cluster/a@2
		world cluster/a@1
		ack 1
		world cluster/a@2
		> 2 cluster: a@2
		world cluster/a@1
		ack 2
		> 3 cluster: a@1`},
	{"who sees what has changed", `
		world cluster/a@1 endpoint/a@1
		sub cluster *
		> 1 cluster: a@1
		ack 1
		sub endpoint a
		> 2 endpoint: a@1
		ack 2
		views cluster/b@1 -cluster/a -endpoint/a
		> 3 cluster: b@1
		ack 3
		> 4 cluster: -a
		ack 4
		> 5 endpoint: -a`},
	{"answers to what nobody was asked", `
		world cluster/a@1
		sub cluster *
		> 1 cluster: a@1
		ack 1
		nack 1 late
		unsub endpoint q
		unsub cluster q
		sub endpoint *`},
}
