package lb

import (
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
)

// normal is a path as a gateway sees it: slashes merged, dot segments resolved.
func normal(p string) string {
	if p == "" {
		return "/"
	}
	clean := path.Clean(p)
	if strings.HasSuffix(p, "/") && clean != "/" || strings.HasSuffix(p, "/.") && clean != "/" {
		clean += "/"
	}
	return clean
}

// mismatch says why a request is not matched; "" is a match.
func (m Match) mismatch(q Question, path string, query url.Values) string {
	switch {
	case m.Path != "" && path != m.Path:
		return fmt.Sprintf("path %s is not %s", path, m.Path)
	case m.PathPrefix != "" && !strings.HasPrefix(path, m.PathPrefix):
		return fmt.Sprintf("path %s does not begin with %s", path, m.PathPrefix)
	case m.PathRegex != "" && !full(m.PathRegex, path):
		return fmt.Sprintf("path %s does not match %s", path, m.PathRegex)
	case len(m.Methods) > 0 && !slices.Contains(m.Methods, q.Method):
		return fmt.Sprintf("method %s is none of %s", q.Method, strings.Join(m.Methods, ", "))
	}
	for _, h := range m.Headers {
		value, present := q.Headers[h.Name]
		if why := h.mismatch("header", value, present); why != "" {
			return why
		}
	}
	for _, p := range m.Query {
		if why := p.mismatch("query parameter", query.Get(p.Name), query.Has(p.Name)); why != "" {
			return why
		}
	}
	return ""
}

func (v ValueMatch) mismatch(what, value string, present bool) string {
	ok := present
	wanted := "is wanted"
	switch {
	case v.Exact != "":
		ok, wanted = present && value == v.Exact, "= "+v.Exact+" is wanted"
	case v.Prefix != "":
		ok, wanted = present && strings.HasPrefix(value, v.Prefix), "beginning with "+v.Prefix+" is wanted"
	case v.Regex != "":
		ok, wanted = present && full(v.Regex, value), "matching "+v.Regex+" is wanted"
	}
	if ok != v.Invert {
		return ""
	}
	if v.Invert {
		return fmt.Sprintf("%s %s is there and must not match", what, v.Name)
	}
	if !present {
		return fmt.Sprintf("%s %s %s and is absent", what, v.Name, wanted)
	}
	return fmt.Sprintf("%s %s %s and is %q", what, v.Name, wanted, value)
}

// full matches the whole text, as Envoy does.
func full(expr, s string) bool {
	re, err := regexp.Compile("^(?:" + expr + ")$")
	return err == nil && re.MatchString(s)
}
