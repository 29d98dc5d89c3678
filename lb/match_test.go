package lb

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestNormalIsEnvoys: what Envoy 1.40 was seen to make of these paths with
// normalize_path and merge_slashes. The e2e tests ask the real one for more.
func TestNormalIsEnvoys(t *testing.T) {
	for raw, want := range map[string]string{
		"": "/", "/": "/", "//": "//", "///a//": "/a/", "/a//b": "/a/b",
		"/a/./b": "/a/b", "/a/.": "/a/", "/.": "/", "/a/b/..": "/a/", "/a/b/../": "/a/", "/a/..": "/", "/..": "/", "/../a": "/a", "/a/...": "/a/...",
		"/a//../b": "/a/b", "/a//./b": "/a/b", // dots first, then slashes
		"/a/%2e%2e/b": "/b", "/a/.%2e/b": "/b", "/a/%2E/b": "/a/b", "/a/..;x/b": "/b", "/a/.;": "/a/", "/a/%2e;/b": "/a/.;/b", "/a;x/../b": "/b",
		"/%61bc": "/abc", "/a~b%7eb": "/a~b~b", "/a%2Fb": "/a%2Fb", "/a%2f..%2fb": "/a%2f..%2fb", "/%252e": "/%252e", "/a%": "/a%", "/a%zz": "/a%zz",
		`/a\b`: "/a/b", `/a/..\b`: "/b", "/a%5cb": "/a%5cb", `/a"b`: "/a%22b", "/a|b^c`": "/a%7Cb%5Ec%60", "/<{x}>": "/%3C%7Bx%7D%3E", "/a'b": "/a'b",
	} {
		if got := normal(raw); got != want {
			t.Errorf("%q is %q, want %q", raw, got, want)
		}
	}
}

// TestConditions: one condition at a time, and what is said when it fails.
func TestConditions(t *testing.T) {
	for _, test := range []struct {
		name    string
		match   Match
		url     string
		headers map[string]string
		want    string
	}{
		{"any", Match{}, "http://h/x", nil, ""},
		{"path", Match{Path: "/x"}, "http://h/x?y", nil, ""},
		{"another path", Match{Path: "/x"}, "http://h/x/", nil, "path /x/ is not /x"},
		{"prefix of letters", Match{PathPrefix: "/api"}, "http://h/apix", nil, ""},
		{"prefix", Match{PathPrefix: "/api"}, "http://h/ap", nil, "path /ap does not begin with /api"},
		{"the whole path", Match{PathRegex: "/r[0-9]+"}, "http://h/r12x", nil, "path /r12x does not match /r[0-9]+"},
		{"one of two", Match{PathRegex: "/a|/b"}, "http://h/bc", nil, "path /bc does not match /a|/b"},
		{"method", Match{Methods: []string{"POST", "PUT"}}, "http://h/", nil, "method GET is none of POST, PUT"},
		{"header", Match{Headers: []ValueMatch{{Name: "x", Exact: "1"}}}, "http://h/", map[string]string{"x": "1"}, ""},
		{"another header", Match{Headers: []ValueMatch{{Name: "x", Exact: "1"}}}, "http://h/", map[string]string{"x": "2"}, `header x = 1 is wanted and is "2"`},
		{"no header", Match{Headers: []ValueMatch{{Name: "x", Prefix: "a"}}}, "http://h/", nil, "header x beginning with a is wanted and is absent"},
		{"header there", Match{Headers: []ValueMatch{{Name: "x"}}}, "http://h/", nil, "header x is wanted and is absent"},
		{"header not there", Match{Headers: []ValueMatch{{Name: "x", Invert: true}}}, "http://h/", map[string]string{"x": ""}, "header x is there and must not match"},
		{"inverted", Match{Headers: []ValueMatch{{Name: "x", Exact: "1", Invert: true}}}, "http://h/", nil, ""},
		{"inverted and empty", Match{Headers: []ValueMatch{{Name: "x", Regex: "(b)?", Invert: true}}}, "http://h/", nil, "header x is absent, which counts as empty and must not match"},
		{"host is a header", Match{Headers: []ValueMatch{{Name: "host", Exact: "h:81"}}}, "http://h:81/", nil, ""},
		{"query", Match{Query: []ValueMatch{{Name: "q", Exact: "a%20b"}}}, "http://h/?q=a%20b", nil, ""},
		{"query as sent", Match{Query: []ValueMatch{{Name: "q", Exact: "a b"}}}, "http://h/?q=a%20b", nil, `query parameter q = a b is wanted and is "a%20b"`},
		{"the first of two", Match{Query: []ValueMatch{{Name: "q", Exact: "2"}}}, "http://h/?q=1&q=2", nil, `query parameter q = 2 is wanted and is "1"`},
		{"semicolon", Match{Query: []ValueMatch{{Name: "q", Exact: "1;r=2"}}}, "http://h/?q=1;r=2", nil, ""},
		{"query without value", Match{Query: []ValueMatch{{Name: "q"}}}, "http://h/?q", nil, ""},
		{"query by case", Match{Query: []ValueMatch{{Name: "q"}}}, "http://h/?Q=1", nil, "query parameter q is wanted and is absent"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &Snapshot{Config: &Config{Domain: "roost"}, Routing: &Routing{Listeners: []*Listener{{Spec: &ListenerSpec{Name: "web", Protocol: HTTP}}},
				Routes: map[string][]*Route{"web": {{Name: "r", Match: test.match}}}}}
			e, err := s.Explain(Question{URL: test.url, Headers: test.headers, Listener: "web"})
			if err != nil {
				t.Fatal(err)
			}
			if got := e.Considered[0]; got.Matched != (test.want == "") || !got.Matched && got.Reason != test.want {
				t.Errorf("matched %v: %q, want %q", got.Matched, got.Reason, test.want)
			}
		})
	}
}

// TestTheMostSpecificRouteWins: the route that Explain takes, walking virtual
// hosts as Envoy does, is the most specific one of all that match.
func TestTheMostSpecificRouteWins(t *testing.T) {
	hosts := []string{"", "*", "a.x", "b.x", "*.x", "*.a.x", "y", "x"}
	paths := []string{"/", "/a", "/a/b", "/a/bc", "/c"}
	rapid.Check(t, func(rt *rapid.T) {
		var routes []*Route
		for n := range rapid.IntRange(1, 7).Draw(rt, "routes") {
			r := &Route{Name: fmt.Sprint("r", n)}
			for range rapid.IntRange(0, 2).Draw(rt, "hosts") {
				if h := rapid.SampledFrom(hosts).Draw(rt, "host"); h != "" {
					r.Hosts = append(r.Hosts, h)
				}
			}
			p := rapid.SampledFrom(paths).Draw(rt, "path")
			switch rapid.IntRange(0, 3).Draw(rt, "kind") {
			case 0:
				r.Match.Path = p
			case 1:
				r.Match.PathPrefix = p
			case 2:
				r.Match.PathRegex = p + ".?"
			}
			if rapid.Bool().Draw(rt, "header") {
				r.Match.Headers = []ValueMatch{{Name: "x", Exact: "1"}}
			}
			routes = append(routes, r)
		}
		sortRoutes(routes)
		s := &Snapshot{Config: &Config{Domain: "roost"}, Routing: &Routing{Listeners: []*Listener{{Spec: &ListenerSpec{Name: "web", Protocol: HTTP}}}, Routes: map[string][]*Route{"web": routes}}}
		host, path := rapid.SampledFrom([]string{"a.x", "b.x", "c.a.x", "c.x", "x", "y", "z"}).Draw(rt, "asked"), rapid.SampledFrom(paths).Draw(rt, "asked path")
		headers := map[string]string{"x": rapid.SampledFrom([]string{"1", "2"}).Draw(rt, "value")}
		e, err := s.Explain(Question{URL: "http://" + host + path, Headers: headers, Listener: "web"})
		if err != nil {
			rt.Fatal(err)
		}
		best, known := "", false
		var of *Route
		for _, r := range routes {
			by := r.covering(host)
			if by == "" {
				continue
			}
			known = true
			if r.Match.mismatch(Question{Headers: headers}, path, nil) != "" {
				continue
			}
			if of == nil || cmp.Or(compareHosts(by, best), compareRoutes(r, of)) < 0 {
				best, of = by, r
			}
		}
		want := map[bool]string{true: NoRoute, false: NoHost}[known]
		if of != nil {
			want = of.Name
		}
		got := e.Outcome
		if e.Route != nil {
			got = *e.Route
		}
		if got != want {
			rt.Fatalf("%s%s goes to %s, want %s; %s", host, path, got, want, list(routes))
		}
		// Each route that was looked at is told once, the taken one last of its host.
		if len(e.Considered) > len(routes) || of != nil && !e.Considered[len(e.Considered)-1].Matched {
			rt.Fatalf("considered %+v", e.Considered)
		}
	})
}

func list(routes []*Route) string {
	var out []string
	for _, r := range routes {
		out = append(out, fmt.Sprintf("%s %v %+v", r.Name, r.Hosts, r.Match))
	}
	return strings.Join(out, "\n")
}

// TestVirtualHostsOrder: the patterns from narrow to wide, and in each the
// routes of wider patterns last.
func TestVirtualHostsOrder(t *testing.T) {
	routes := []*Route{
		{Name: "any"}, {Name: "wild", Hosts: []string{"*.example.com"}}, {Name: "deep", Hosts: []string{"*.shop.example.com", "shop.example.com"}},
		{Name: "exact", Hosts: []string{"shop.example.com"}, Match: Match{Path: "/a"}}, {Name: "long", Hosts: []string{"shop.example.com"}, Match: Match{PathPrefix: "/aa"}},
	}
	var got []string
	for _, v := range VirtualHosts(routes) {
		line := v.Domain + ":"
		for _, r := range v.Routes {
			line += " " + r.Name
		}
		got = append(got, line)
	}
	want := []string{"shop.example.com: exact long deep wild any", "*.shop.example.com: deep wild any", "*.example.com: wild any", "*: any"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}
