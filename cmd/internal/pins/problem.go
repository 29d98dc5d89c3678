package pins

import (
	"fmt"
	"slices"
	"strings"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// Codes of the problems.
const (
	CodePinned   = "resource_pinned"
	CodeUnpinned = "resource_not_pinned"
)

// Problem says that a record is in force, what that means and what caused it.
func (r *Record) Problem(s *lb.Snapshot) lb.Problem {
	name, _ := r.Of() // it was understood when it was applied
	p := problem(s, name, r.Message)
	p.Code, p.Since = CodePinned, r.Since
	p.Message = fmt.Sprintf("several proxies (%s) refuse %s %s as it is now (version %s): %s; ", strings.Join(r.By, ", "), r.Type, r.Name, r.Refused, strings.TrimSpace(r.Message))
	if r.Good == "" {
		p.Message += "none has taken an earlier version, so it is left out for every proxy; all else goes on"
	} else {
		p.Message += fmt.Sprintf("every proxy is kept at its last good version, %s: later changes of it do not arrive, all else does", r.Good)
	}
	p.Fix = "mend what the text names" + at(p.Place) + "; the pin ends by itself with the next change of this " + r.Type
	return p
}

// Problem says that nothing can be pinned although several proxies refuse a
// version.
func (v *Verdict) Problem(s *lb.Snapshot) lb.Problem {
	p := problem(s, v.Name, v.Message)
	p.Code = CodeUnpinned
	p.Message = fmt.Sprintf("%d proxies refuse %s %s as it is now (version %s): %s; it cannot be pinned at an earlier version, so each goes on with what it has, and one that starts has none: %s",
		len(v.By), v.Name.Type, v.Name.Name, v.Refused, strings.TrimSpace(v.Message), v.Denied)
	p.Fix = "mend what the text names" + at(p.Place)
	return p
}

func at(place string) string {
	if place == "" {
		return ""
	}
	return " at " + place
}

// problem finds the object and the place of what a resource is made from.
func problem(s *lb.Snapshot, n envoy.Name, message string) lb.Problem {
	p := lb.Problem{Severity: lb.SeverityError, Object: n.Type.String() + " " + n.Name}
	var routes []*lb.Route
	if svc := s.Services.Get(envoy.ServiceOf(n.Name)); svc != nil {
		p.Object, p.Place = svc.Key.String(), svc.Spec.Origin
		routes = s.Mesh[svc.Key]
	}
	for _, l := range s.Listeners {
		if l.Spec.Name == n.Name {
			p.Object, p.Place, routes = "listener "+n.Name, l.Spec.Origin, s.Routes[n.Name]
		}
	}
	if n.Type != envoy.Route {
		return p
	}
	cause := slices.IndexFunc(routes, func(r *lb.Route) bool { return named(r, message) })
	if cause < 0 && len(routes) == 1 {
		cause = 0
	}
	if cause >= 0 {
		p.Object, p.Place = "route "+routes[cause].Name, routes[cause].Origin
	}
	return p
}

// shortest is how long a text of a route must be to be looked for in a message.
const shortest = 3

// named says that Envoy's text quotes a route: a pattern, a path, a header or a
// host of it.
func named(r *lb.Route, message string) bool {
	texts := append([]string{r.Match.PathRegex, r.Match.Path, r.Match.PathPrefix}, r.Hosts...)
	for _, v := range slices.Concat(r.Match.Headers, r.Match.Query) {
		texts = append(texts, v.Name, v.Regex, v.Exact, v.Prefix)
	}
	return slices.ContainsFunc(texts, func(t string) bool { return len(t) >= shortest && strings.Contains(message, t) })
}
