package strict

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
)

// policy decodes itself: a word, or a mapping.
type policy struct{ Name string }

func (p *policy) DecodeYAML(d *Decoding, n *yaml.Node, path string) {
	if n.Kind != yaml.ScalarNode {
		d.Errorf(n, path, "is no word")
		return
	}
	p.Name = "policy " + n.Value
}

type common struct {
	Zone string `yaml:"zone"`
}

type port struct {
	Place

	Name   string `yaml:"name"`
	Number uint16 `yaml:"number"`
}

type document struct {
	Place
	common

	Name    string            `yaml:"name"`
	Wait    time.Duration     `yaml:"wait"`
	Strict  bool              `yaml:"strict"`
	Count   int               `yaml:"count"`
	Ports   []port            `yaml:"ports"`
	Main    *port             `yaml:"main"`
	Numbers map[string]uint16 `yaml:"numbers"`
	Prefix  netip.Prefix      `yaml:"prefix"`
	Policy  policy            `yaml:"policy"`
}

func decode(text string) (document, Errors) {
	var v document
	d := Decoding{File: "f.yaml", Expand: func(s string) (string, error) {
		if strings.Contains(s, "${MISSING}") {
			return "", errors.New("$MISSING is not set")
		}
		return strings.ReplaceAll(s, "${ZONE}", "b"), nil
	}}
	d.Decode([]byte(text), &v)
	return v, d.Errors
}

func TestDecode(t *testing.T) {
	v, errs := decode(`
name: &n shop
zone: ${ZONE}
wait: 1m30s
strict: true
count: -3
ports: [{name: http, number: 80}, {name: *n, number: 65535}]
main:
  name: grpc
numbers: {a: 1, b: 2}
prefix: 10.0.0.0/8
policy: random
`)
	if errs != nil {
		t.Fatal(errs)
	}
	var got []string
	for _, p := range append(v.Ports, *v.Main) {
		got = append(got, p.Name+" "+p.String()+" "+p.Path)
	}
	want := []string{"http f.yaml:7:9 ports[0]", "shop f.yaml:7:35 ports[1]", "grpc f.yaml:9:3 main"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if v.Name != "shop" || v.Zone != "b" || v.Wait != 90*time.Second || !v.Strict || v.Count != -3 || v.Ports[1].Number != 65535 ||
		v.Numbers["b"] != 2 || v.Prefix.String() != "10.0.0.0/8" || v.Policy.Name != "policy random" {
		t.Errorf("%+v", v)
	}
	if !v.Has("wait") || v.Has("waits") || v.Main.Has("number") {
		t.Error("it does not know which keys are written")
	}
	if e := v.Errorf("wait", "is long"); e.Error() != "f.yaml:4:7: wait: is long" {
		t.Error(e)
	}
	if e := v.Main.Errorf("number", "is missing"); e.Error() != "f.yaml:9:3: main.number: is missing" {
		t.Error(e)
	}
}

// TestMistakes: each is named at its line and column, all at once and in order.
func TestMistakes(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"nothing", "", nil},
		{"null", "# only a comment\n~", nil},
		{"a null value", "ports: ~\nmain:", nil},
		{"an unknown key", "name: a\nwaits: 1s", []string{`f.yaml:2:1: waits: is not a known key; did you mean "wait"?`}},
		{"one like no other", "ports: [{xylophone: 1}]", []string{`f.yaml:1:10: ports[0].xylophone: is not a known key; known keys are name, number`}},
		{"a key twice", "name: a\nname: b", []string{`f.yaml:2:1: name: is written twice (first at line 1); keep one`}},
		{"a key of a map twice", "numbers: {a: 1, a: 2}", []string{`f.yaml:1:17: numbers.a: is written twice; keep one`}},
		{"a word for a list", "ports: http", []string{`f.yaml:1:8: ports: is "http"; a list is wanted: write it as [ ... ] or with a leading -`}},
		{"a list for a mapping", "main: [1]", []string{`f.yaml:1:7: main: is a list; a mapping with the keys name, number is wanted`}},
		{"a word for a map", "numbers: 1", []string{`f.yaml:1:10: numbers: is "1"; a mapping (key: value) is wanted`}},
		{"a mapping for a word", "name: {a: b}", []string{`f.yaml:1:7: name: is a mapping; one value is wanted`}},
		{"a document that is a list", "- name: a", []string{`f.yaml:1:1: is a list; a mapping with the keys zone, name, wait, strict, count, ports, main, numbers, prefix, policy is wanted`}},
		{"numbers", "ports: [{number: 65536}, {number: -1}, {number: 1.5}]\ncount: 9223372036854775808", []string{
			`f.yaml:1:18: ports[0].number: "65536" is not a whole number from 0 to 65535`,
			`f.yaml:1:35: ports[1].number: "-1" is not a whole number from 0 to 65535`,
			`f.yaml:1:49: ports[2].number: "1.5" is not a whole number from 0 to 65535`,
			`f.yaml:2:8: count: "9223372036854775808" is not a whole number`}},
		{"durations", "wait: 5", []string{`f.yaml:1:7: wait: "5" is not a duration; write it like 5s, 1m30s or 250ms`}},
		{"a negative duration", "wait: -5s", []string{`f.yaml:1:7: wait: "-5s" is negative`}},
		{"truth", "strict: yes", []string{`f.yaml:1:9: strict: "yes" is neither true nor false`}},
		{"text", "prefix: 10.0.0.0", []string{`f.yaml:1:9: prefix: "10.0.0.0": netip.ParsePrefix("10.0.0.0"): no '/'`}},
		{"a type that decodes itself", "policy: [a]", []string{`f.yaml:1:9: policy: is no word`}},
		{"a variable", "ports:\n  - name: ${MISSING}", []string{`f.yaml:2:11: ports[0].name: $MISSING is not set`}},
		{"all at once, by line and column", "wait: 5\nports:\n  - {number: x, name: [1]}\nzones: a", []string{
			`f.yaml:1:7: wait: "5" is not a duration; write it like 5s, 1m30s or 250ms`,
			`f.yaml:3:14: ports[0].number: "x" is not a whole number from 0 to 65535`,
			`f.yaml:3:23: ports[0].name: is a list; one value is wanted`,
			`f.yaml:4:1: zones: is not a known key; did you mean "zone"?`}},
	} {
		_, errs := decode(c.text)
		var got []string
		for _, e := range errs {
			got = append(got, e.Error())
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", c.name, diff)
		}
	}
}

// TestSyntax: what is no YAML is one mistake, at its line.
func TestSyntax(t *testing.T) {
	for text, place := range map[string]string{
		"name: [":              "f.yaml:2:",
		"name: a\n\tzone: b":   "f.yaml:2:",
		"name: a\n zone: b":    "f.yaml:2:",
		"name: \"a\nzone: b\n": "f.yaml:",
		"name: *nowhere":       "f.yaml:1:",
	} {
		_, errs := decode(text)
		if len(errs) != 1 || !strings.HasPrefix(errs[0].Place, place) || !strings.HasPrefix(errs[0].Message, "is not YAML: ") {
			t.Errorf("%q: %v, want it at %s", text, errs, place)
		}
	}
}

// FuzzDecode: any text is decoded or refused, without a panic, and each mistake
// has a place.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{"name: a", "ports: [{number: 80}]", "a: &a [*a]", "{", "main: {name: [", "? {a: b}\n: c", "<<: {name: a}", "- - -"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		_, errs := decode(text)
		for _, e := range errs {
			if !strings.HasPrefix(e.Place, "f.yaml") || e.Message == "" {
				t.Errorf("%+v", e)
			}
		}
	})
}
