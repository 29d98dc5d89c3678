package repotest

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/roostmesh/roost/"

// root is the repository's root.
func root(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// run runs a command in the root and returns its lines.
func run(t *testing.T, name string, args ...string) []string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v", name, args, err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// imports are the packages of ours that each package imports, without tests.
func imports(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for _, line := range run(t, "go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...") {
		fields := strings.Fields(line)
		own := []string{}
		for _, f := range fields[1:] {
			if rest, ok := strings.CutPrefix(f, module); ok {
				own = append(own, rest)
			}
		}
		out[strings.TrimPrefix(fields[0], module)] = own
	}
	return out
}

var row = regexp.MustCompile("^\\| `([a-z0-9/]+)` \\| .* \\| (.*) \\|$")

// TestArchitectureIsTrue holds the map's package list and its arrows against
// the tree.
func TestArchitectureIsTrue(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root(t), "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string][]string{}
	for line := range strings.SplitSeq(string(data), "\n") {
		if m := row.FindStringSubmatch(line); m != nil {
			allowed[m[1]] = strings.Fields(strings.ReplaceAll(m[2], "`", ""))
		}
	}
	tree := imports(t)
	for pkg, list := range tree {
		may, ok := allowed[pkg]
		if !ok {
			t.Errorf("ARCHITECTURE.md does not name package %s", pkg)
			continue
		}
		for _, imported := range list {
			if slices.Contains(may, "all") || slices.Contains(may, imported) {
				continue
			}
			t.Errorf("%s imports %s; ARCHITECTURE.md allows it %v", pkg, imported, may)
		}
	}
	for pkg := range allowed {
		if _, ok := tree[pkg]; !ok {
			t.Errorf("ARCHITECTURE.md names package %s, which is not there", pkg)
		}
	}
}

// TestArrows: between the top-level names only lb -> discovery, dns -> lb,
// xds -> lb and xds -> certs; cmd and bench see everything, nobody sees them.
func TestArrows(t *testing.T) {
	legal := map[string][]string{"lb": {"discovery"}, "dns": {"lb"}, "xds": {"lb", "certs"}}
	for pkg, list := range imports(t) {
		from, _, _ := strings.Cut(pkg, "/")
		for _, imported := range list {
			to, _, _ := strings.Cut(imported, "/")
			switch {
			case from == to, from == "cmd" && to != "bench", slices.Contains(legal[from], to):
			case from == "bench" && (to != "cmd" || imported == "cmd/binaries"):
			default:
				t.Errorf("%s imports %s", pkg, imported)
			}
		}
	}
}

// TestTopLevel: the top level is fixed.
func TestTopLevel(t *testing.T) {
	fixed := []string{"xds", "dns", "lb", "discovery", "certs", "cmd", "bench", "docs", "go.mod", "go.sum", "Makefile", "LICENSE"}
	for _, path := range run(t, "git", "ls-files") {
		top, _, _ := strings.Cut(path, "/")
		if !slices.Contains(fixed, top) && !strings.HasPrefix(top, ".") && filepath.Ext(top) != ".md" {
			t.Errorf("%s does not belong at the top level", path)
		}
	}
}

const (
	maxLines    = 500
	maxFunction = 60
)

// TestSizes: a file has one job, a function fits on a screen, a package says
// once what it is for, and nothing happens at import.
func TestSizes(t *testing.T) {
	docs := map[string]int{}
	fset, dir := token.NewFileSet(), root(t)
	for _, path := range run(t, "git", "ls-files", "*.go") {
		full := filepath.Join(dir, path)
		f, err := parser.ParseFile(fset, full, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		test := strings.HasSuffix(path, "_test.go")
		if f.Doc != nil && !test {
			docs[filepath.Dir(path)]++
		} else if !test {
			docs[filepath.Dir(path)] += 0
		}
		if n := fset.File(f.Pos()).LineCount(); n > maxLines && !test {
			t.Errorf("%s has %d lines, more than %d: is it one job?", path, n, maxLines)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if fn.Name.Name == "init" && fn.Recv == nil {
				t.Errorf("%s: init() runs at import", fset.Position(fn.Pos()))
			}
			if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line; n > maxFunction && !test {
				t.Errorf("%s: %s has %d lines, more than %d", fset.Position(fn.Pos()), fn.Name.Name, n, maxFunction)
			}
		}
	}
	for dir, n := range docs {
		if n != 1 {
			t.Errorf("package %s has %d doc comments, want one", dir, n)
		}
	}
}

// TestNoWaitingBySleep: tests wait for the event itself.
func TestNoWaitingBySleep(t *testing.T) {
	dir := root(t)
	for _, path := range run(t, "git", "ls-files", "*_test.go") {
		data, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte("time."+"Sleep(")) {
			t.Errorf("%s waits by sleep", path)
		}
	}
}

// TestReadmeShowsItsTwoCommands: the first screen has the two commands that do
// all the set-up.
func TestReadmeShowsItsTwoCommands(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root(t), "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(data), "\n")
	first := strings.Join(lines[:min(40, len(lines))], "\n")
	for _, want := range []string{"make demo", "make test"} {
		if !strings.Contains(first, want) {
			t.Errorf("the first screen of README.md does not show %q", want)
		}
	}
}
