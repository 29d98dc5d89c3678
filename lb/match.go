package lb

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// unreserved are the characters that mean the same with and without an escape,
// beside letters and digits; escaped are those that Envoy escapes by itself.
const (
	unreserved = "-._~"
	escaped    = "\"<>^`{|}"
)

// normal is a path as a gateway's Envoy sees it: characters in their one
// spelling, then dot segments resolved, then slashes merged. An empty segment
// counts while dots are resolved (/a//../b is /a/b), and a dot segment may carry
// parameters (/a/..;x/b is /b).
func normal(raw string) string {
	segments := strings.Split(raw, "/")
	for i, s := range segments {
		if name, _, _ := strings.Cut(s, ";"); name == "." || name == ".." {
			segments[i] = name
		}
	}
	var out []string
	segments = strings.Split(strings.TrimPrefix(spelled(strings.Join(segments, "/")), "/"), "/")
	for i, s := range segments {
		switch s {
		case "..":
			out = out[:max(0, len(out)-1)]
		case ".":
		default:
			out = append(out, s)
			continue
		}
		if i == len(segments)-1 {
			out = append(out, "")
		}
	}
	p := "/" + strings.Join(out, "/")
	if !strings.Contains(p, "//") {
		return p
	}
	merged := "/" + strings.Join(slices.DeleteFunc(out, func(s string) bool { return s == "" }), "/")
	if strings.HasSuffix(p, "/") {
		merged += "/" // also where nothing but slashes is left: Envoy keeps two
	}
	return merged
}

// spelled gives each character of a path its one spelling.
func spelled(raw string) string {
	var b strings.Builder
	for i := 0; i < len(raw); i++ {
		c := raw[i]
		if c == '%' && i+2 < len(raw) {
			if v, err := strconv.ParseUint(raw[i+1:i+3], 16, 8); err == nil && isUnreserved(byte(v)) {
				b.WriteByte(byte(v))
				i += 2
				continue
			}
		}
		switch {
		case c == '\\':
			b.WriteByte('/')
		case c <= ' ' || c > '~' || strings.IndexByte(escaped, c) >= 0:
			fmt.Fprintf(&b, "%%%02X", c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

func isUnreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(unreserved, c) >= 0
}

// parameters are the query parameters as Envoy compares them: the first of each
// name, with its escapes as they were sent.
func parameters(raw string) map[string]string {
	out := map[string]string{}
	for part := range strings.SplitSeq(raw, "&") {
		name, value, _ := strings.Cut(part, "=")
		if _, twice := out[name]; !twice && part != "" {
			out[name] = value
		}
	}
	return out
}

// mismatch says why a request is not matched; "" is a match.
func (m Match) mismatch(q Question, path string, query map[string]string) string {
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
		value, present := query[p.Name]
		if why := p.mismatch("query parameter", value, present); why != "" {
			return why
		}
	}
	return ""
}

func (v ValueMatch) mismatch(what, value string, present bool) string {
	ok := present
	wanted := "is wanted"
	compared := present || v.Invert // what must not match is empty where it is absent
	switch {
	case v.Exact != "":
		ok, wanted = compared && value == v.Exact, "= "+v.Exact+" is wanted"
	case v.Prefix != "":
		ok, wanted = compared && strings.HasPrefix(value, v.Prefix), "beginning with "+v.Prefix+" is wanted"
	case v.Regex != "":
		ok, wanted = compared && full(v.Regex, value), "matching "+v.Regex+" is wanted"
	}
	if ok != v.Invert {
		return ""
	}
	if v.Invert && !present {
		return fmt.Sprintf("%s %s is absent, which counts as empty and must not match", what, v.Name)
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
