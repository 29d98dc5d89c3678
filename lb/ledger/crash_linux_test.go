package ledger

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	boundFor = 5 // changes after which makeChanges releases a service
	freeFrom = 9 // and frees its address
)

// change is one change of makeChanges: number n touches records, objects and
// marks at once.
func change(ctx context.Context, l *Ledger, n int) (netip.Addr, error) {
	var at netip.Addr
	err := l.Update(ctx, func(tx *Tx) error {
		bound, refused := tx.Bind([]Wish{{crashName(n), pool("127.130.0.0/16")}}, "test")
		if len(bound) != 1 || len(refused) > 0 {
			return fmt.Errorf("change %d: bound %v, refused %v", n, bound, refused)
		}
		at = bound[0].Address
		tx.PutObject(Object{Owner: crashName(n), Origin: "api", Spec: bytes.Repeat([]byte{byte(n)}, 1+n%3000)})
		tx.Release(crashName(n-boundFor), "test")
		tx.DeleteObject(crashName(n - boundFor))
		if r, ok := tx.Lookup(crashName(n-freeFrom), Internal, false); ok && !tx.Free(r.Address) {
			return fmt.Errorf("%s is not free after change %d", r.Address, n)
		}
		tx.PutMark(Mark{Kind: MarkDrain, Name: "last", Data: json.RawMessage(fmt.Sprint(n))})
		return nil
	})
	return at, err
}

func lastChange(l *Ledger) (int, error) {
	m := l.Marks()
	if len(m) == 0 {
		return 0, nil
	}
	n := 0
	err := json.Unmarshal(m[0].Data, &n)
	return n, err
}

// makeChanges changes a ledger until it is killed, and prints each change after
// it was acknowledged.
func makeChanges(path string) error {
	b, err := OpenBolt(path)
	if err != nil {
		return err
	}
	l, err := Open(context.Background(), b, nil)
	if err != nil {
		return err
	}
	n, err := lastChange(l)
	if err != nil {
		return err
	}
	for {
		n++
		at, err := change(context.Background(), l, n)
		if err != nil {
			return err
		}
		fmt.Println(n, l.Generation(), at)
	}
}

func helper(t testing.TB, name, path string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, path)
	cmd.Env = append(os.Environ(), helperEnv+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// TestKilledAnywhereNothingIsLost kills a writer at random moments: what it had
// acknowledged is there after the next start, all of it or, of the change it was
// in, nothing.
func TestKilledAnywhereNothingIsLost(t *testing.T) {
	rounds, files := 300, 4
	if testing.Short() {
		rounds = 20
	}
	var g errgroup.Group
	for f := range files {
		path := filepath.Join(t.TempDir(), fmt.Sprint("f", f), "ledger.db")
		g.Go(func() error {
			var acked acknowledged
			for round := range rounds / files {
				if err := acked.round(t, path, round); err != nil {
					return fmt.Errorf("file %d, kill %d: %w", f, round, err)
				}
			}
			t.Logf("file %d: %d changes were acknowledged", f, acked.n)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

type acknowledged struct {
	n          int
	generation uint64
	addresses  map[Owner]netip.Addr
}

func (a *acknowledged) round(t *testing.T, path string, round int) error {
	cmd := helper(t, "changes", path)
	var out, problem bytes.Buffer
	started := make(chan struct{}, 1)
	cmd.Stdout = writerFunc(func(p []byte) (int, error) {
		select {
		case started <- struct{}{}:
		default:
		}
		return out.Write(p)
	})
	cmd.Stderr = &problem
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if round%5 > 0 { // every fifth is killed at its start or in its first change
		select {
		case <-started:
		case err := <-ended:
			return fmt.Errorf("the writer ended: %w: %s", err, problem.String())
		}
	}
	<-time.After(rand.N(60 * time.Millisecond))
	_ = cmd.Process.Kill()
	<-ended
	if problem.Len() > 0 {
		return errors.New(problem.String())
	}
	if err := a.read(&out); err != nil {
		return err
	}
	return a.verify(path)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (a *acknowledged) read(out *bytes.Buffer) error {
	if a.addresses == nil {
		a.addresses = map[Owner]netip.Addr{}
	}
	for s := bufio.NewReader(out); ; {
		line, err := s.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil // what is left may be half a line
		}
		var at string
		if _, err := fmt.Sscan(line, &a.n, &a.generation, &at); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		a.addresses[crashName(a.n)] = netip.MustParseAddr(at)
	}
}

// verify opens the file as the next start would.
func (a *acknowledged) verify(path string) error {
	b, err := OpenBolt(path)
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }()
	l, err := Open(context.Background(), b, nil)
	if err != nil {
		return err
	}
	n, err := lastChange(l)
	if err != nil {
		return err
	}
	if n != a.n && n != a.n+1 || l.Generation() != a.generation && l.Generation() != a.generation+1 || uint64(n) != l.Generation() {
		return fmt.Errorf("change %d of generation %d was acknowledged, %d of %d is there", a.n, a.generation, n, l.Generation())
	}
	for i := max(1, n-freeFrom-3); i <= n; i++ {
		r, ok := l.Lookup(crashName(i), Internal, false)
		state := Bound
		if i <= n-boundFor {
			state = Quarantined
		}
		if want, told := a.addresses[crashName(i)]; ok != (i > n-freeFrom) || ok && (r.State != state || told && r.Address != want) {
			return fmt.Errorf("after change %d, s%d: %v %+v, told %v", n, i, ok, r, want)
		}
	}
	if got, want := len(l.Records()), min(n, freeFrom); got != want {
		return fmt.Errorf("after change %d: %d records, want %d", n, got, want)
	}
	objects := l.Objects()
	for _, o := range objects {
		var i int
		if _, err := fmt.Sscanf(o.Owner.Service, "s%d", &i); err != nil || i <= n-boundFor || i > n || !bytes.Equal(o.Spec, bytes.Repeat([]byte{byte(i)}, 1+i%3000)) {
			return fmt.Errorf("after change %d: object %s: %w", n, o.Owner, errors.Join(err, errors.New("not as it was written")))
		}
	}
	if len(objects) != min(n, boundFor) {
		return fmt.Errorf("after change %d: %d objects", n, len(objects))
	}
	a.n, a.generation = n, l.Generation()
	return nil
}

// fill makes a ledger of many pages and returns what it holds.
func fill(t *testing.T, path string, services int) State {
	t.Helper()
	l, b := open(t, path)
	var wishes []Wish
	for n := range services {
		wishes = append(wishes, Wish{crashName(n), pool("127.130.0.0/16")})
	}
	if _, refused, err := l.Bind(t.Context(), wishes, "test"); err != nil || len(refused) > 0 {
		t.Fatal(err, refused)
	}
	if _, err := l.Release(t.Context(), crashName(0), "test"); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	return l.State()
}

// reads opens a file and compares; an error says that it was refused.
func reads(path string, want State) error {
	b, err := OpenBolt(path)
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }()
	l, err := Open(context.Background(), b, nil)
	if err != nil {
		return err
	}
	if got := l.State(); got.Generation != want.Generation || len(got.Records) != len(want.Records) {
		panic(fmt.Sprintf("opens with generation %d and %d records, want %d and %d", got.Generation, len(got.Records), want.Generation, len(want.Records)))
	}
	return nil
}

// TestACutOffFileIsAnError: and never a crash, nor an empty ledger.
func TestACutOffFileIsAnError(t *testing.T) {
	dir := t.TempDir()
	whole := filepath.Join(dir, "whole.db")
	want := fill(t, whole, 2000)
	data, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	cuts := []int{0, 1, 15, 16, 80, page / 2, page - 1, page, page + 80, page * 3 / 2, 2 * page, 3*page - 1, 4 * page, 5*page + 1, 20 * page}
	for range 60 {
		cuts = append(cuts, rand.IntN(len(data)))
	}
	refused := 0
	for _, cut := range append(cuts, len(data)) {
		path := filepath.Join(dir, "cut.db")
		if err := os.WriteFile(path, data[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		err := reads(path, want)
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "restore it from a backup") {
				t.Errorf("cut at %d: %v", cut, err)
			}
		}
		if now, _ := os.ReadFile(path); err != nil && !bytes.Equal(now, data[:cut]) {
			t.Errorf("cut at %d: the file was changed", cut)
		}
		if err != nil && cut == len(data) {
			t.Errorf("the whole file: %v", err)
		}
	}
	if refused < 15 {
		t.Errorf("only %d were refused", refused)
	}
}

// TestADamagedPageIsAnError: a page of zeros or of junk is found when it is
// read; bbolt itself would panic. The first two pages are another matter: one that
// is damaged cannot be told from one that a crash has torn, and the other is taken.
func TestADamagedPageIsAnError(t *testing.T) {
	dir := t.TempDir()
	whole := filepath.Join(dir, "whole.db")
	want := fill(t, whole, 500)
	data, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	page, refused := os.Getpagesize(), 0
	for n := 2; n < min(len(data)/page, 60); n++ {
		damaged := bytes.Clone(data)
		for i := range damaged[n*page : (n+1)*page] {
			damaged[n*page+i] = byte(n % 2 * 0xA5)
		}
		path := filepath.Join(dir, fmt.Sprint(n, ".db"))
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := reads(path, want); err != nil {
			refused++
		}
		_ = os.Remove(path)
	}
	if refused == 0 {
		t.Error("none was refused")
	}
}
