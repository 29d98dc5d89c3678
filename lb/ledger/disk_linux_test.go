package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// inNamespace runs a helper with mounts of its own. ok is false where the
// machine does not allow that.
func inNamespace(t *testing.T, name, path string) (ok bool) {
	t.Helper()
	cmd := helper(t, name, path)
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
	if id := os.Geteuid(); id != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: id, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}} // a file needs both
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || strings.Contains(string(out), errNoMounts.Error()) {
		t.Logf("mounts are not allowed here: %v %s", err, out)
		return false
	}
	if err != nil {
		t.Errorf("%s: %v: %s", name, err, out)
	}
	return true
}

var errNoMounts = errors.New("no mounts here")

// mount changes this process's own view of the file system.
func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("%w: %w", errNoMounts, err)
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("%w: %s: %w", errNoMounts, target, err)
	}
	return nil
}

// TestAFullDiskStopsChangesOnly: a change that finds no room fails and leaves
// what was committed; with room again the next one works.
func TestAFullDiskStopsChangesOnly(t *testing.T) {
	dir := t.TempDir()
	if out, err := helper(t, "limit", filepath.Join(dir, "limit.db")).CombinedOutput(); err != nil {
		t.Errorf("with a file size limit: %v: %s", err, out)
	}
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	inNamespace(t, "full", filepath.Join(dir, "mnt", "ledger.db"))
}

// fullDisk has a small disk of its own.
func fullDisk(path string) error {
	dir := filepath.Dir(path)
	if err := mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		return err
	}
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 600<<10), 0o600); err != nil {
		return err
	}
	return untilFull(path, syscall.ENOSPC, func() error { return os.Remove(filler) })
}

// fileLimit may write files up to a size only.
func fileLimit(path string) error {
	signal.Ignore(syscall.SIGXFSZ) // writes then fail with EFBIG
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	small := old
	small.Cur = 300 << 10
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &small); err != nil {
		return err
	}
	return untilFull(path, syscall.EFBIG, func() error { return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old) })
}

func untilFull(path string, want syscall.Errno, makeRoom func() error) error {
	ctx := context.Background()
	b, err := OpenBolt(path)
	if err != nil {
		return err
	}
	l, err := Open(ctx, b, nil)
	if err != nil {
		return err
	}
	n, refused := 1, 0
	for ; refused < 2; n++ { // a file system finds a last page, now and then
		if n > 10000 {
			return errors.New("the disk is never full")
		}
		if _, err = change2(ctx, l, n); err == nil {
			refused = 0
			continue
		}
		refused++
		n-- // the same once more
	}
	// bbolt does not wrap what it meets when it makes the file larger.
	if !strings.Contains(err.Error(), want.Error()) || !strings.Contains(err.Error(), path) {
		return fmt.Errorf("change %d: %w, want %w with the path", n, err, want)
	}
	check := func(when string, s Store, changes int) error {
		state, err := s.Load(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", when, err)
		}
		slices.SortFunc(state.Records, byAddress)
		if !slices.EqualFunc(state.Records, l.Records(), func(a, b Record) bool {
			return a.Address == b.Address && a.Owner == b.Owner && a.Generation == b.Generation
		}) || state.Generation != uint64(changes) || len(state.Records) != changes {
			return fmt.Errorf("%s: generation %d with %d records, want %d", when, state.Generation, len(state.Records), changes)
		}
		return nil
	}
	if err := check("when full", b, n-1); err != nil {
		return err
	}
	// A start needs no room.
	if err := b.Close(); err != nil {
		return err
	}
	if b, err = OpenBolt(path); err != nil {
		return fmt.Errorf("open when full: %w", err)
	}
	if err := check("when full, opened again", b, n-1); err != nil {
		return err
	}
	if l, err = Open(ctx, b, nil); err != nil {
		return err
	}
	if err := makeRoom(); err != nil {
		return err
	}
	if _, err := change2(ctx, l, n); err != nil {
		return fmt.Errorf("with room again: %w", err)
	}
	return errors.Join(check("with room again", b, n), b.Close())
}

// change2 binds one service more, with an object of a page.
func change2(ctx context.Context, l *Ledger, n int) ([]Record, error) {
	var bound []Record
	err := l.Update(ctx, func(tx *Tx) error {
		bound, _ = tx.Bind([]Wish{{crashName(n), pool("127.130.0.0/16")}}, "test")
		tx.PutObject(Object{Owner: crashName(n), Spec: make([]byte, 3000)})
		return nil
	})
	return bound, err
}

// TestAReadOnlyPlaceIsAnError names the path and the reason.
func TestAReadOnlyPlaceIsAnError(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger.db")
	fill(t, path, 3)
	if inNamespace(t, "readonly", path) {
		return
	}
	if os.Geteuid() == 0 {
		t.Fatal("root must be able to mount")
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(path); !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), path) {
		t.Errorf("a file that is read-only: %v", err)
	}
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(filepath.Join(dir, "new.db")); !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "new.db") {
		t.Errorf("a directory that is read-only: %v", err)
	}
	_ = os.Chmod(dir, 0o700)
}

func readOnly(path string) error {
	dir := filepath.Dir(path)
	if err := mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	for _, p := range []string{path, filepath.Join(dir, "new.db"), filepath.Join(dir, "sub", "new.db")} {
		if _, err := OpenBolt(p); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), p) {
			return fmt.Errorf("%s: %w, want %w", p, err, syscall.EROFS)
		}
	}
	return nil
}

// TestWhatIsNoLedgerIsRefusedAndKept.
func TestWhatIsNoLedgerIsRefusedAndKept(t *testing.T) {
	dir := t.TempDir()
	foreign, other := filepath.Join(dir, "foreign.db"), filepath.Join(dir, "newer.db")
	for path, name := range map[string]string{foreign: "things", other: "meta"} {
		db, err := bolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucket([]byte(name))
			if err != nil {
				return err
			}
			return b.Put(formatKey, []byte("roost-ledger-7"))
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	text, folder := filepath.Join(dir, "text.db"), filepath.Join(dir, "folder.db")
	if err := os.WriteFile(text, []byte(strings.Repeat("not a ledger ", 5000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{foreign: "another program", other: "roost-ledger-7", text: "not a ledger", folder: "not a file"} {
		before, _ := os.ReadFile(path)
		_, err := OpenBolt(path)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
		if after, _ := os.ReadFile(path); string(after) != string(before) {
			t.Errorf("%s was changed", path)
		}
	}
}

// TestAnOldBackupOpens: with what it holds; the same services get the same
// addresses again.
func TestAnOldBackupOpens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	fill(t, path, 3)
	backup, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l, b := open(t, path)
	late := bindOne(t, l, Owner{"acme", "late"}, pool("127.130.0.0/16"))
	_ = b.Close()
	if err := os.WriteFile(path, backup, 0o600); err != nil {
		t.Fatal(err)
	}
	old, b := open(t, path)
	defer func() { _ = b.Close() }()
	if old.Generation() >= l.Generation() || len(old.Records()) != 3 {
		t.Fatalf("generation %d with %d records", old.Generation(), len(old.Records()))
	}
	if again := bindOne(t, old, late.Owner, pool("127.130.0.0/16")); again.Address != late.Address {
		t.Errorf("%s, was %s", again.Address, late.Address)
	}
}

// TestNoHalfFileAtTheFirstStart: nothing but a whole ledger is ever at the path.
func TestNoHalfFileAtTheFirstStart(t *testing.T) {
	dir := t.TempDir()
	_, b := open(t, filepath.Join(dir, "ledger.db"))
	defer func() { _ = b.Close() }()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Errorf("%v %v", files, err)
	}
}
