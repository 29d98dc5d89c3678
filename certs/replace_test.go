package certs

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// await waits until the served serial is want, with or without a problem.
func await(ctx context.Context, t *testing.T, files *Files, f File, want int64, problems int) {
	t.Helper()
	for {
		if p := files.Pairs()[f]; p != nil && p.Leaf.SerialNumber.Int64() == want && len(files.Problems()) == problems {
			return
		}
		select {
		case <-files.Changed():
		case <-ctx.Done():
			t.Fatalf("certificate %d with %d problems: %v, %v", want, problems, files.Pairs()[f].Leaf.SerialNumber, files.Problems())
		}
	}
}

// TestRenewalBySymlink: the files are links into a directory that is itself
// replaced by moving a link, as volumes of containers do it: both change at once.
func TestRenewalBySymlink(t *testing.T) {
	now, dir := time.Now(), t.TempDir()
	issue := func(version string, serial int64, fits bool) {
		at := filepath.Join(dir, version)
		if err := os.Mkdir(at, 0o700); err != nil {
			t.Fatal(err)
		}
		pair(t, at, serial, now.Add(-time.Hour), now.Add(90*24*time.Hour), !fits)
		if err := os.Symlink(version, filepath.Join(dir, "next")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "next"), filepath.Join(dir, "data")); err != nil {
			t.Fatal(err)
		}
	}
	issue("v1", 1, true)
	f := File{filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
	for link, to := range map[string]string{f.CertFile: "data/a.crt", f.KeyFile: "data/a.key"} {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	files := NewFiles(slog.New(slog.DiscardHandler), nil)
	files.Want([]Want{{File: f}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	done := make(chan error, 1)
	go func() { done <- files.Run(ctx) }()
	issue("v2", 2, true)
	await(ctx, t, files, f, 2, 0)
	issue("v3", 3, false) // its key is another's
	await(ctx, t, files, f, 2, 1)
	issue("v4", 4, true)
	await(ctx, t, files, f, 4, 0)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestExpiryIsNoticed: nothing changes but the time; the pair stays, since one
// that has expired is better than none, and it is said once.
func TestExpiryIsNoticed(t *testing.T) {
	now := time.Now()
	files := NewFiles(slog.New(slog.DiscardHandler), func() time.Time { return now })
	f := pair(t, t.TempDir(), 1, now.Add(-time.Hour), now.Add(90*24*time.Hour), false)
	files.Want([]Want{{File: f, Origin: "here"}, {File: f, Origin: "and here"}})
	served := files.Pairs()[f]
	<-files.Changed()
	for _, step := range []struct {
		later   time.Duration
		changed bool
		expired bool
		total   int
	}{{time.Hour, false, false, 0}, {89 * 24 * time.Hour, true, false, 1}, {2 * 24 * time.Hour, true, true, 1}, {time.Hour, false, true, 1}} {
		now = now.Add(step.later)
		files.reload()
		changed := false
		select {
		case <-files.Changed():
			changed = true
		default:
		}
		problems := files.Problems()
		if changed != step.changed || len(problems) != step.total || step.total > 0 && problems[0].Expired != step.expired {
			t.Errorf("%s later: changed %v, problems %+v", step.later, changed, problems)
		}
	}
	if files.Pairs()[f] != served {
		t.Error("the pair was taken away or read again as another")
	}
	// What nobody wants any more is neither served nor complained of.
	files.Want(nil)
	if len(files.Pairs()) != 0 || len(files.Problems()) != 0 {
		t.Errorf("%v %v", files.Pairs(), files.Problems())
	}
}

// TestOneBadFileSpoilsNoOther: each pair stands for itself.
func TestOneBadFileSpoilsNoOther(t *testing.T) {
	now := time.Now()
	files := NewFiles(slog.New(slog.DiscardHandler), nil)
	good := pair(t, t.TempDir(), 1, now.Add(-time.Hour), now.Add(90*24*time.Hour), false)
	bad := File{filepath.Join(t.TempDir(), "none.crt"), "none.key"}
	files.Want([]Want{{File: bad, Origin: "b"}, {File: good, Origin: "g"}})
	if files.Pairs()[good] == nil || files.Pairs()[bad] != nil || len(files.Problems()) != 1 || files.Problems()[0].Origin != "b" {
		t.Errorf("pairs %v, problems %v", files.Pairs(), files.Problems())
	}
}
