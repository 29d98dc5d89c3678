// Package strict decodes YAML (and so JSON) into structs and refuses whatever
// it does not know, naming the place. A document goes in; filled structs and
// every mistake in it, not only the first, come out. It starts no goroutine and
// reads no file.
//
// A struct's fields carry the tag `yaml:"key"`. A struct that embeds [Place]
// learns where it stands. A type whose pointer implements [Decoder] decodes
// itself.
package strict

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Error is one mistake: what is wrong, and where.
type Error struct {
	Place   string // FILE:LINE:COL
	Path    string // services[0].ports[1].port
	Message string // with the way out
}

func (e Error) Error() string {
	if e.Path == "" {
		return e.Place + ": " + e.Message
	}
	return e.Place + ": " + e.Path + ": " + e.Message
}

// Errors are all the mistakes of a document.
type Errors []Error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Place is where a struct stands in its document; embed it to learn that.
type Place struct {
	Path string // services[0]

	file      string
	line, col int
	keys      map[string]*yaml.Node
}

func (p *Place) place(pl Place) { *p = pl }

type placed interface{ place(Place) }

// String is FILE:LINE:COL, or "" for a struct that no document holds.
func (p Place) String() string {
	if p.line == 0 {
		return p.file
	}
	return fmt.Sprintf("%s:%d:%d", p.file, p.line, p.col)
}

// Has tells whether the document writes this key.
func (p Place) Has(key string) bool { return p.keys[key] != nil }

// Errorf makes an Error at the value of key, or at the struct where key is ""
// or absent.
func (p Place) Errorf(key, format string, args ...any) Error {
	e := Error{Place: p.String(), Path: p.Path, Message: fmt.Sprintf(format, args...)}
	if key == "" {
		return e
	}
	e.Path = strings.TrimPrefix(p.Path+"."+key, ".")
	if n := p.keys[key]; n != nil {
		e.Place = fmt.Sprintf("%s:%d:%d", p.file, n.Line, n.Column)
	}
	return e
}

// Decoder is implemented by types that decode themselves.
type Decoder interface {
	DecodeYAML(d *Decoding, n *yaml.Node, path string)
}

// Decoding is one document being decoded.
type Decoding struct {
	File string
	// Expand replaces ${...} in strings; nil leaves them.
	Expand func(string) (string, error)
	Errors Errors
}

// syntax is how the YAML library names the place of a syntax error.
var syntax = regexp.MustCompile(`^go-yaml load error.* at (?:L\d+\.C\d+-)?L(\d+)\.C(\d+): (.*)$`)

// Decode parses data, the content of file, and decodes it into v, a pointer to
// a struct. An empty document leaves v as it is.
func (d *Decoding) Decode(data []byte, v any) {
	var doc yaml.Node
	if err := yaml.Load(data, &doc); err != nil {
		if len(strings.TrimSpace(string(data))) == 0 {
			return
		}
		e := Error{Place: d.File, Message: "is not YAML: " + strings.Join(strings.Fields(err.Error()), " ")}
		if m := syntax.FindStringSubmatch(strings.Join(strings.Fields(err.Error()), " ")); m != nil {
			e = Error{Place: d.File + ":" + m[1] + ":" + m[2], Message: "is not YAML: " + m[3]}
		}
		d.Errors = append(d.Errors, e)
		return
	}
	n := &doc
	if n.Kind == yaml.DocumentNode {
		if len(n.Content) == 0 {
			return
		}
		n = n.Content[0]
	}
	if n.Kind == 0 || n.Tag == "!!null" && n.Kind == yaml.ScalarNode {
		return
	}
	d.value(n, reflect.ValueOf(v).Elem(), "")
	slices.SortStableFunc(d.Errors, func(a, b Error) int { return comparePlaces(a.Place, b.Place) })
}

func comparePlaces(a, b string) int {
	x, y := strings.Split(a, ":"), strings.Split(b, ":")
	for i := range min(len(x), len(y)) {
		m, err1 := strconv.Atoi(x[i])
		n, err2 := strconv.Atoi(y[i])
		if err1 == nil && err2 == nil && m != n {
			return m - n
		}
		if c := strings.Compare(x[i], y[i]); (err1 != nil || err2 != nil) && c != 0 {
			return c
		}
	}
	return len(x) - len(y)
}

// Errorf notes a mistake at n.
func (d *Decoding) Errorf(n *yaml.Node, path, format string, args ...any) {
	d.Errors = append(d.Errors, Error{Place: fmt.Sprintf("%s:%d:%d", d.File, n.Line, n.Column), Path: path, Message: fmt.Sprintf(format, args...)})
}

// Into decodes n into v, a pointer; for types that decode themselves.
func (d *Decoding) Into(n *yaml.Node, v any, path string) {
	d.value(n, reflect.ValueOf(v).Elem(), path)
}

// Place is the place of a node for a struct that decodes itself.
func (d *Decoding) Place(n *yaml.Node, path string) Place {
	return Place{Path: path, file: d.File, line: n.Line, col: n.Column}
}

func (d *Decoding) value(n *yaml.Node, v reflect.Value, path string) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if v.CanAddr() {
		if self, ok := v.Addr().Interface().(Decoder); ok {
			self.DecodeYAML(d, n, path)
			return
		}
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		if p, ok := v.Addr().Interface().(placed); ok {
			p.place(d.Place(n, path)) // it stands somewhere, with nothing in it
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem(), path)
	case reflect.Slice:
		d.list(n, v, path)
	case reflect.Map:
		d.dictionary(n, v, path)
	case reflect.Struct:
		if t, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
			d.text(n, t, path)
			return
		}
		d.structure(n, v, path)
	default:
		d.scalar(n, v, path)
	}
}

func (d *Decoding) list(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		d.Errorf(n, path, "is %s; a list is wanted: write it as [ ... ] or with a leading -", describe(n))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		d.value(item, out.Index(i), fmt.Sprintf("%s[%d]", path, i))
	}
	v.Set(out)
}

func (d *Decoding) dictionary(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.Errorf(n, path, "is %s; a mapping (key: value) is wanted", describe(n))
		return
	}
	out := reflect.MakeMap(v.Type())
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if out.MapIndex(reflect.ValueOf(key.Value)).IsValid() {
			d.Errorf(key, join(path, key.Value), "is written twice; keep one")
			continue
		}
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(n.Content[i+1], item, join(path, key.Value))
		out.SetMapIndex(reflect.ValueOf(key.Value), item)
	}
	v.Set(out)
}

func (d *Decoding) structure(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.Errorf(n, path, "is %s; a mapping with the keys %s is wanted", describe(n), strings.Join(Keys(v.Type()), ", "))
		if p, ok := v.Addr().Interface().(placed); ok {
			p.place(d.Place(n, path))
		}
		return
	}
	seen := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, item := n.Content[i], n.Content[i+1]
		field, ok := fieldOf(v, key.Value)
		switch {
		case !ok:
			d.Errorf(key, join(path, key.Value), "is not a known key%s", Nearest(key.Value, Keys(v.Type())))
		case seen[key.Value] != nil:
			d.Errorf(key, join(path, key.Value), "is written twice (first at line %d); keep one", seen[key.Value].Line)
		default:
			seen[key.Value] = item
			d.value(item, field, join(path, key.Value))
		}
	}
	if p, ok := v.Addr().Interface().(placed); ok {
		p.place(Place{Path: path, file: d.File, line: n.Line, col: n.Column, keys: seen})
	}
}

func fieldOf(v reflect.Value, key string) (reflect.Value, bool) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Anonymous && f.Type.Kind() == reflect.Struct && f.Type != reflect.TypeFor[Place]() {
			if inner, ok := fieldOf(v.Field(i), key); ok {
				return inner, true
			}
		}
		if f.Tag.Get("yaml") == key && key != "" {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// Keys lists the keys of a struct type in the order of its fields.
func Keys(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous && f.Type.Kind() == reflect.Struct && f.Type != reflect.TypeFor[Place]() {
			keys = append(keys, Keys(f.Type)...)
		}
		if k := f.Tag.Get("yaml"); k != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

func (d *Decoding) text(n *yaml.Node, t encoding.TextUnmarshaler, path string) {
	s, ok := d.stringOf(n, path)
	if !ok {
		return
	}
	if err := t.UnmarshalText([]byte(s)); err != nil {
		d.Errorf(n, path, "%q: %v", s, err)
	}
}

func (d *Decoding) stringOf(n *yaml.Node, path string) (string, bool) {
	if n.Kind != yaml.ScalarNode {
		d.Errorf(n, path, "is %s; one value is wanted", describe(n))
		return "", false
	}
	if d.Expand == nil || !strings.Contains(n.Value, "${") {
		return n.Value, true
	}
	s, err := d.Expand(n.Value)
	if err != nil {
		d.Errorf(n, path, "%v", err)
		return "", false
	}
	return s, true
}

func (d *Decoding) scalar(n *yaml.Node, v reflect.Value, path string) {
	s, ok := d.stringOf(n, path)
	if !ok {
		return
	}
	var err error
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		var t time.Duration
		if t, err = time.ParseDuration(s); err != nil {
			err = fmt.Errorf("%q is not a duration; write it like 5s, 1m30s or 250ms", s)
		} else if t < 0 {
			err = fmt.Errorf("%q is negative", s)
		}
		v.SetInt(int64(t))
	case v.Kind() == reflect.String:
		v.SetString(s)
	case v.Kind() == reflect.Bool:
		switch s {
		case "true":
			v.SetBool(true)
		case "false":
			v.SetBool(false)
		default:
			err = fmt.Errorf("%q is neither true nor false", s)
		}
	case v.CanUint():
		var u uint64
		limit := uint64(1)<<v.Type().Bits() - 1
		if u, err = strconv.ParseUint(s, 10, 64); err != nil || v.OverflowUint(u) {
			err = fmt.Errorf("%q is not a whole number from 0 to %d", s, limit)
		} else {
			v.SetUint(u)
		}
	case v.CanInt():
		var i int64
		if i, err = strconv.ParseInt(s, 10, 64); err != nil || v.OverflowInt(i) {
			err = fmt.Errorf("%q is not a whole number", s)
		} else {
			v.SetInt(i)
		}
	default:
		err = errors.New("cannot be decoded")
	}
	if err != nil {
		d.Errorf(n, path, "%v", err)
	}
}

func join(path, key string) string { return strings.TrimPrefix(path+"."+key, ".") }

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.Value == "" {
		return "empty"
	}
	return fmt.Sprintf("%q", n.Value)
}

// Nearest returns ` (did you mean "x"?)`, or the list of what is known.
func Nearest(key string, known []string) string {
	best, at := "", len(key)/2+2
	for _, k := range known {
		if dist := distance(key, k); dist < at {
			best, at = k, dist
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return "; known keys are " + strings.Join(known, ", ")
}

func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
