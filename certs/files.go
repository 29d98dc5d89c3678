// Package certs has one job: a valid key pair for each wanted name. Today the
// pairs come from files that the operator names; they are watched, and a pair
// that cannot be read, does not fit together or has expired leaves the last
// good one in place and is a Problem.
//
// In go the files that are wanted; out come immutable Pairs, published by
// pointer. Files.Run owns the package's one goroutine and the watcher's.
package certs

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// reread is how often the files are looked at without an event: a network
	// file system has none, and a certificate expires without one.
	reread = 10 * time.Second
	settle = 50 * time.Millisecond
	// expirySoon is when an expiry becomes a Problem before it happens.
	expirySoon = 7 * 24 * time.Hour
)

// File names a certificate chain and its key, both PEM.
type File struct{ CertFile, KeyFile string }

// Pair is a certificate chain with its key. It is immutable.
type Pair struct {
	Chain, Key []byte // PEM
	Leaf       *x509.Certificate
	Names      []string // server names it is for, lower case, *.example.com for wildcards; ordered
}

// Pairs are the last good pairs, by file. A published map is never written to.
type Pairs map[File]*Pair

// Problem is what is wrong with one wanted file.
type Problem struct {
	File    File
	Origin  string // where the operator has named it
	Expired bool
	Err     error
	Since   time.Time
}

// Want asks for a file.
type Want struct {
	File
	Origin string
}

type published struct {
	pairs    Pairs
	problems []Problem
}

// Files keeps the pairs of wanted files.
type Files struct {
	log     *slog.Logger
	now     func() time.Time
	changed chan struct{}
	out     atomic.Pointer[published]

	mu   sync.Mutex
	want []Want // guarded by mu
	poke chan struct{}
}

// NewFiles returns a Files that wants nothing. now is the clock; nil is
// time.Now.
func NewFiles(log *slog.Logger, now func() time.Time) *Files {
	if now == nil {
		now = time.Now
	}
	f := &Files{log: log, now: now, changed: make(chan struct{}, 1), poke: make(chan struct{}, 1)}
	f.out.Store(&published{pairs: Pairs{}})
	return f
}

// Want replaces what is wanted and reads files that are new at once, so that
// Pairs has them when it returns.
func (f *Files) Want(want []Want) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.want = want
	f.refresh()
	select {
	case f.poke <- struct{}{}:
	default:
	}
}

// Pairs are the pairs of now.
func (f *Files) Pairs() Pairs { return f.out.Load().pairs }

// Problems are what is wrong now, ordered by file.
func (f *Files) Problems() []Problem { return f.out.Load().problems }

// Changed is poked after Pairs or Problems changed.
func (f *Files) Changed() <-chan struct{} { return f.changed }

// Run watches the wanted files until ctx ends.
func (f *Files) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch certificates: %w", err)
	}
	defer func() { _ = w.Close() }()
	tick := time.NewTicker(reread)
	defer tick.Stop()
	settled := time.NewTimer(reread)
	defer settled.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.poke:
			f.watch(w)
			f.reload() // for what changed before it was watched
		case <-w.Events:
			settled.Reset(settle)
		case err := <-w.Errors:
			f.log.Debug("certificate watcher lost events, reading all", "error", err)
			settled.Reset(settle)
		case <-settled.C:
			f.reload()
		case <-tick.C:
			f.watch(w)
			f.reload()
		}
	}
}

func (f *Files) reload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refresh()
}

func (f *Files) watch(w *fsnotify.Watcher) {
	f.mu.Lock()
	defer f.mu.Unlock()
	have := w.WatchList()
	for _, want := range f.want {
		for _, p := range []string{want.CertFile, want.KeyFile} {
			if dir := filepath.Dir(p); !slices.Contains(have, dir) {
				if err := w.Add(dir); err != nil {
					f.log.Debug("directory of a certificate cannot be watched, it is read every few seconds", "path", dir, "error", err)
				}
				have = append(have, dir)
			}
		}
	}
}

// refresh reads all wanted files; mu is held.
func (f *Files) refresh() {
	before := f.out.Load()
	next := &published{pairs: Pairs{}}
	seen := map[File]bool{}
	for _, want := range f.want {
		if seen[want.File] {
			continue
		}
		seen[want.File] = true
		last := before.pairs[want.File]
		pair, expired, err := f.read(want.File, last)
		if err != nil {
			next.problems = append(next.problems, Problem{File: want.File, Origin: want.Origin, Expired: expired, Err: err, Since: since(before, want.File, f.now())})
		}
		if pair != nil {
			next.pairs[want.File] = pair
		}
	}
	slices.SortFunc(next.problems, func(a, b Problem) int { return cmp.Compare(a.File.CertFile, b.File.CertFile) })
	if maps.Equal(before.pairs, next.pairs) && slices.EqualFunc(before.problems, next.problems, sameProblem) {
		return
	}
	for _, p := range next.problems {
		f.log.Warn("certificate has a problem; the last good one stays", "cert_file", p.File.CertFile, "error", p.Err)
	}
	f.out.Store(next)
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

func since(before *published, file File, now time.Time) time.Time {
	for _, p := range before.problems {
		if p.File == file {
			return p.Since
		}
	}
	return now
}

func sameProblem(a, b Problem) bool {
	return a.File == b.File && a.Expired == b.Expired && a.Err.Error() == b.Err.Error() && a.Origin == b.Origin
}

// read returns the pair to serve: a good new one, or last. A new pair that has
// expired is served only where there is no last one.
func (f *Files) read(file File, last *Pair) (pair *Pair, expired bool, err error) {
	fresh, err := Load(file)
	if err != nil {
		return last, false, err
	}
	if last != nil && bytes.Equal(last.Chain, fresh.Chain) && bytes.Equal(last.Key, fresh.Key) {
		fresh = last
	}
	now := f.now()
	switch {
	case now.After(fresh.Leaf.NotAfter):
		err = fmt.Errorf("%s: it has expired on %s", file.CertFile, fresh.Leaf.NotAfter.UTC().Format(time.RFC3339))
		if last != nil && last.Leaf.NotAfter.After(fresh.Leaf.NotAfter) {
			fresh = last
		}
		return fresh, true, err
	case now.Before(fresh.Leaf.NotBefore):
		err = fmt.Errorf("%s: it is not valid before %s", file.CertFile, fresh.Leaf.NotBefore.UTC().Format(time.RFC3339))
		return cmp.Or(last, fresh), false, err
	case now.Add(expirySoon).After(fresh.Leaf.NotAfter):
		return fresh, false, fmt.Errorf("%s: it expires on %s", file.CertFile, fresh.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return fresh, false, nil
}

// Load reads one pair and checks that chain and key fit together.
func Load(file File) (*Pair, error) {
	chain, err := os.ReadFile(file.CertFile)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	key, err := os.ReadFile(file.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", file.CertFile, err)
	}
	if block, _ := pem.Decode(chain); block == nil {
		return nil, fmt.Errorf("%s: no PEM block in it", file.CertFile)
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", file.CertFile, file.KeyFile, err)
	}
	if pair.Leaf == nil {
		return nil, errors.New(file.CertFile + ": no certificate in it")
	}
	out := &Pair{Chain: chain, Key: key, Leaf: pair.Leaf}
	for _, n := range pair.Leaf.DNSNames {
		out.Names = append(out.Names, strings.ToLower(n))
	}
	if len(out.Names) == 0 && len(pair.Leaf.IPAddresses) == 0 && pair.Leaf.Subject.CommonName != "" {
		out.Names = append(out.Names, strings.ToLower(pair.Leaf.Subject.CommonName))
	}
	slices.Sort(out.Names)
	out.Names = slices.Compact(out.Names)
	return out, nil
}
