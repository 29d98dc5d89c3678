package binaries

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestGRPCIOIsInstalledOnce: what the cache has is taken; else pip installs it,
// and only what can be imported is kept.
func TestGRPCIOIsInstalledOnce(t *testing.T) {
	const pip = `if [ "$2" = pip ]; then
  while [ "$1" != --target ]; do shift; done
  echo x >> "$RUNS"; [ -z "$PIP_FAILS" ] || { echo "$PIP_FAILS" >&2; exit 1; }
  mkdir -p "$2" && echo "$GIVES" > "$2/version"; exit
fi
cat "$PYTHONPATH/version"`
	for _, c := range []struct{ name, cached, gives, fails, wants, says, runs string }{
		{name: "the cache", cached: GRPCIOVersion},
		{name: "installed", gives: GRPCIOVersion, says: "installing grpcio " + GRPCIOVersion, runs: "x"},
		{name: "one of another Python is replaced", cached: "broken", gives: GRPCIOVersion, says: "installing", runs: "x"},
		{name: "another version", gives: "1.0", wants: "imports 1.0, not " + GRPCIOVersion, says: "installing", runs: "x"},
		{name: "no pip", fails: "No module named pip", wants: "install pip", says: "installing", runs: "x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			runs := filepath.Join(dir, "runs")
			script(t, filepath.Join(dir, "bin", "python3"), pip)
			t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
			t.Setenv("RUNS", runs)
			t.Setenv("PIP_FAILS", c.fails)
			t.Setenv("GIVES", c.gives)
			modules := filepath.Join(dir, "grpcio-"+GRPCIOVersion)
			if c.cached != "" {
				if err := os.Mkdir(modules, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(modules, "version"), []byte(c.cached), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				var talk strings.Builder
				p, err := FindGRPCIO(t.Context(), GRPCIOOptions{CacheDir: dir, Talk: &talk})
				if c.wants != "" {
					if err == nil || !strings.Contains(err.Error(), c.wants) {
						t.Fatalf("error %v, want %q", err, c.wants)
					}
					break
				}
				if err != nil || p.Modules != modules || !strings.Contains(talk.String(), c.says) {
					t.Fatalf("%+v %v; it said %q", p, err, talk.String())
				}
				c.says = ""
			}
			ran, _ := os.ReadFile(runs)
			if got := strings.TrimSpace(string(ran)); got != c.runs {
				t.Errorf("pip ran %q, want %q", got, c.runs)
			}
		})
	}
}
