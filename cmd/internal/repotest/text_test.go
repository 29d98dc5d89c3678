package repotest

import (
	"bytes"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// tracked are the files of the repository, without sums, which are hashes of
// other people's.
func tracked(t *testing.T) []string {
	t.Helper()
	return slices.DeleteFunc(run(t, "git", "ls-files"), func(path string) bool { return filepath.Base(path) == "go.sum" })
}

// private are words that belong to the machine or the tool on which a file was
// written, not into the repository. They are put together here so that this
// file does not hold them.
func private(t *testing.T) *regexp.Regexp {
	t.Helper()
	var words []string
	for _, dir := range []string{"work", "root", "home", "Users"} {
		words = append(words, `(^|[^a-zA-Z0-9_.$}])/`+dir+`/`)
	}
	for _, name := range []string{"cl" + "aude", "anth" + "ropic", "chat" + "gpt", "open" + "ai", "co" + "pilot"} {
		words = append(words, `(?i:`+name+`)`)
	}
	// The places from which this machine takes its modules, where they are its own.
	for _, proxy := range strings.FieldsFunc(run(t, "go", "env", "GOPROXY")[0]+","+os.Getenv("PIP_INDEX_URL")+","+os.Getenv("HTTPS_PROXY"), func(r rune) bool { return r == ',' || r == '|' }) {
		u, err := url.Parse(proxy)
		if err == nil && u.Hostname() != "" && !slices.Contains([]string{"proxy.golang.org", "pypi.org", "localhost", "127.0.0.1"}, u.Hostname()) {
			words = append(words, regexp.QuoteMeta(u.Hostname()))
		}
	}
	return regexp.MustCompile(strings.Join(words, "|"))
}

// TestNothingOfThisMachine: no path, host or tool of the machine on which the
// repository was written stands in it.
func TestNothingOfThisMachine(t *testing.T) {
	words := private(t)
	for _, sample := range []string{"cd /wo" + "rk/main", "\"/ro" + "ot/.cache\"", "Cl" + "aude"} {
		if !words.MatchString(sample) {
			t.Errorf("%q would not be found", sample)
		}
	}
	dir := root(t)
	for _, path := range tracked(t) {
		data, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil || bytes.IndexByte(data, 0) >= 0 {
			continue // deleted but not committed yet, or no text
		}
		for n, line := range strings.Split(string(data), "\n") {
			if found := words.FindString(line); found != "" {
				t.Errorf("%s:%d holds %q", path, n+1, found)
			}
		}
	}
}

// TestImportsOfTests: a test imports what its package may import, the packages
// below its own top-level name, and cmd/binaries; nothing else of cmd or bench.
func TestImportsOfTests(t *testing.T) {
	for _, line := range run(t, "go", "list", "-f", `{{.ImportPath}} {{join .TestImports " "}} {{join .XTestImports " "}}`, "./...") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(fields[0], module)
		from, _, _ := strings.Cut(pkg, "/")
		for _, f := range fields[1:] {
			imported, ours := strings.CutPrefix(f, module)
			to, _, _ := strings.Cut(imported, "/")
			if ours && from != "cmd" && to != from && (to == "cmd" || to == "bench") && imported != "cmd/binaries" {
				t.Errorf("a test of %s imports %s", pkg, imported)
			}
		}
	}
}

// TestStrictIsForReadersOfFiles: who decodes strictly reads what a person has
// written; the others never see YAML.
func TestStrictIsForReadersOfFiles(t *testing.T) {
	may := []string{"discovery/file", "cmd/internal/config", "cmd/internal/admin", "cmd/internal/daemon", "cmd/roost"}
	for pkg, list := range imports(t) {
		if slices.Contains(list, "discovery/strict") && !slices.Contains(may, pkg) {
			t.Errorf("%s imports discovery/strict", pkg)
		}
	}
}

// TestLeakCheck: a package that starts goroutines and has tests looks for leaked
// ones in them.
func TestLeakCheck(t *testing.T) {
	starts := regexp.MustCompile(`(?m)^\s*go (func\(|[a-zA-Z_.]+\()|\.Go\(func`)
	started, tested, checked := map[string]string{}, map[string]bool{}, map[string]bool{}
	top := root(t)
	for _, path := range run(t, "git", "ls-files", "--cached", "--others", "--exclude-standard", "*.go") {
		data, err := os.ReadFile(filepath.Join(top, path))
		if err != nil {
			continue // deleted but not committed yet
		}
		dir := filepath.Dir(path)
		test := strings.HasSuffix(path, "_test.go")
		tested[dir] = tested[dir] || test
		switch {
		case test && bytes.Contains(data, []byte("goleak.Verify")):
			checked[dir] = true
		case !test && !strings.HasPrefix(dir, "bench") && starts.Match(data):
			started[dir] = fmt.Sprintf("%s: %s", path, bytes.TrimSpace(starts.Find(data)))
		}
	}
	for dir, where := range started {
		if tested[dir] && !checked[dir] {
			t.Errorf("%s starts goroutines (%s) and its tests do not look for leaks", dir, where)
		}
	}
}
