// Package file is the Source of instances that YAML files list: one file, or
// every *.yaml and *.yml of a directory, watched. A file that cannot be read or
// has a mistake keeps what it last said, marked stale, with the place of each
// mistake; a row that is wrong leaves the other rows alone.
//
// Run owns the one goroutine of the package, and the watcher's.
package file

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/discovery/strict"
)

const (
	// settle lets a burst of writes end before the files are read: a rename
	// needs none of it, an editor's write in place some.
	settle = 3 * time.Millisecond
	// rescan catches what a watcher cannot see (a network file system, a mount).
	rescan = 5 * time.Second
	// maxFileSize bounds what is read: about 300,000 instances.
	maxFileSize = 64 << 20
)

// Config is what a Source needs.
type Config struct {
	Name string // of the source
	Path string // a file or a directory; it may come and go
	Node string // the node of instances that name none; "" is no node
	Log  *slog.Logger
}

// Source reads instances from files.
type Source struct{ config Config }

// New returns a Source; nothing is read before Run.
func New(c Config) *Source {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Source{c}
}

// Name is the source's name.
func (s *Source) Name() string { return s.config.Name }

// known is what was last read of one file.
type known struct {
	modified time.Time
	size     int64
	failed   bool
}

// Run emits an Update for each file now and whenever it changes.
func (s *Source) Run(ctx context.Context, emit func(discovery.Update)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", s.config.Path, err)
	}
	defer func() { _ = watcher.Close() }()
	tick := time.NewTicker(rescan)
	defer tick.Stop()
	files := map[string]known{}
	for first := true; ; first = false {
		s.watch(watcher)
		s.scan(files, first, emit)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		case <-watcher.Events:
			if !drain(ctx, watcher.Events) {
				return ctx.Err()
			}
		case err := <-watcher.Errors:
			s.config.Log.Warn("file watcher lost events, reading everything again", "path", s.config.Path, "error", err)
		}
	}
}

// drain waits until no event has come for the settle time.
func drain(ctx context.Context, events <-chan fsnotify.Event) bool {
	timer := time.NewTimer(settle)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-events:
			timer.Reset(settle)
		case <-timer.C:
			return true
		}
	}
}

// watch watches the path and the directory around it, so that a path that
// appears later is noticed.
func (s *Source) watch(w *fsnotify.Watcher) {
	have := w.WatchList()
	for _, dir := range []string{s.config.Path, filepath.Dir(s.config.Path)} {
		if info, err := os.Stat(dir); err == nil && info.IsDir() && !slices.Contains(have, dir) {
			if err := w.Add(dir); err != nil {
				s.config.Log.Warn("directory cannot be watched, it is read every few seconds", "path", dir, "error", err)
			}
		}
	}
}

func (s *Source) scan(files map[string]known, first bool, emit func(discovery.Update)) {
	paths, err := s.list()
	if err != nil {
		emit(discovery.Update{Source: s.config.Name, Err: err})
		if first && len(files) == 0 && errors.Is(err, os.ErrNotExist) {
			emit(discovery.Update{Source: s.config.Name, Complete: true, Problems: nil})
			emit(discovery.Update{Source: s.config.Name, Err: err})
		}
		return
	}
	changed := first
	for _, path := range paths {
		changed = s.read(path, files, emit) || changed
	}
	for path := range files {
		if !slices.Contains(paths, path) {
			delete(files, path)
			changed = true
		}
	}
	if changed {
		emit(discovery.Update{Source: s.config.Name, Complete: true, Scopes: paths, Seen: time.Now()})
	}
}

func (s *Source) list() ([]string, error) {
	info, err := os.Stat(s.config.Path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{s.config.Path}, nil
	}
	entries, err := os.ReadDir(s.config.Path)
	if err != nil {
		return nil, err
	}
	paths := []string{}
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if !e.IsDir() && !strings.HasPrefix(e.Name(), ".") && (ext == ".yaml" || ext == ".yml" || ext == ".json") {
			paths = append(paths, filepath.Join(s.config.Path, e.Name()))
		}
	}
	return paths, nil
}

// read emits what one file says, if it has changed, and tells whether it did.
func (s *Source) read(path string, files map[string]known, emit func(discovery.Update)) bool {
	seen := time.Now()
	info, err := os.Stat(path)
	if err == nil {
		was, ok := files[path]
		if ok && !was.failed && was.modified.Equal(info.ModTime()) && was.size == info.Size() {
			return false
		}
		if info.Size() > maxFileSize {
			err = fmt.Errorf("%s: %d bytes are more than the %d that are read; split it", path, info.Size(), maxFileSize)
		}
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path)
	}
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return false // gone between the listing and now: the next scan sees it
		}
		files[path] = known{failed: true}
		emit(discovery.Update{Source: s.config.Name, Scope: path, Err: err})
		return false
	}
	files[path] = known{modified: info.ModTime(), size: info.Size()}
	instances, problems, errs := Parse(path, data, s.config.Node)
	if errs != nil {
		emit(discovery.Update{Source: s.config.Name, Scope: path, Err: errs})
		return false
	}
	emit(discovery.Update{Source: s.config.Name, Scope: path, Instances: instances, Problems: problems, Seen: seen})
	return true
}

// document is what a file holds.
type document struct {
	Instances []Row `yaml:"instances"`
}

// Parse reads the instances of one file. A file that is not YAML of the right
// shape is an error as a whole; a row that cannot be used is a Problem.
func Parse(path string, data []byte, node string) ([]discovery.Instance, []discovery.Problem, error) {
	d := strict.Decoding{File: path}
	var doc document
	d.Decode(data, &doc)
	if len(d.Errors) > 0 {
		return nil, nil, d.Errors
	}
	var out []discovery.Instance
	var problems []discovery.Problem
	seen := map[string]string{}
	for _, row := range doc.Instances {
		i, errs := row.Instance(discovery.Key{Tenant: row.Tenant, Service: row.Service}, node)
		if first, twice := seen[i.QualifiedName()]; twice && len(errs) == 0 {
			errs = append(errs, row.Errorf("id", "instance %s is listed twice (first at %s); keep one", i.QualifiedName(), first))
		}
		for _, e := range errs {
			problems = append(problems, discovery.Problem{Code: "instance_invalid", Severity: discovery.SeverityError, Object: row.Tenant + "/" + row.Service + "/" + row.ID,
				Place: e.Place, Message: e.Path + ": " + e.Message + "; this instance is left out", Fix: "mend the row; the others are served"})
		}
		if len(errs) == 0 {
			seen[i.QualifiedName()] = row.String()
			out = append(out, i)
		}
	}
	return out, problems, nil
}
