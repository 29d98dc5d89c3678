package discovery

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
)

// A source's last good state is one JSON file, replaced by rename, so that a
// Roost that starts while its source is down goes on with what it knew.

const lastGoodFormat = 1

type lastGood struct {
	Format int                    `json:"format"`
	Source string                 `json:"source"`
	Scopes map[string]*scopeState `json:"scopes"`
}

func (c Config) path(source string) string {
	return filepath.Join(c.Dir, source+".json")
}

// load reads what earlier runs kept. It counts as the source's first answer
// and is stale until the source confirms it.
func (m *merge) load() {
	if m.config.Dir == "" {
		return
	}
	for _, name := range m.config.Remember {
		s := m.source(name)
		kept, err := readLastGood(m.config.path(name))
		if err != nil {
			if !os.IsNotExist(err) {
				m.config.Log.Warn("last good catalog cannot be read, waiting for the source", "source", name, "error", err)
			}
			continue
		}
		for name, scope := range kept.Scopes {
			m.set(s, name, scope)
			s.top = max(s.top, scope.Index)
			for _, i := range scope.Instances {
				if i.Held {
					s.held[idOf(i)] = &heldInstance{instance: i, scope: name}
					s.status.HeldSince, s.status.HeldWhy = m.now(), "held since before the restart"
				}
			}
		}
		m.tally(s)
		s.status.Ready, s.status.Stale, s.status.Since = true, true, m.now()
		s.status.LastError = "not asked yet since the start"
		m.markStale(s, true)
		for _, scope := range s.scopes {
			for _, i := range scope.Instances {
				m.touch(i.Key, touched{source: name, index: scope.Index})
			}
		}
	}
}

func readLastGood(path string) (*lastGood, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var kept lastGood
	if err := json.Unmarshal(data, &kept); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if kept.Format != lastGoodFormat {
		return nil, fmt.Errorf("%s: format %d is not %d", path, kept.Format, lastGoodFormat)
	}
	for _, scope := range kept.Scopes {
		if scope == nil {
			return nil, fmt.Errorf("%s: an empty scope", path)
		}
	}
	return &kept, nil
}

// kept is a source's state as it was when it fell due.
type kept struct {
	source string
	scopes map[string]*scopeState
}

// due takes the sources that have changed since they were last taken.
func (m *merge) due() []kept {
	if m.config.Dir == "" {
		return nil
	}
	var list []kept
	for _, name := range m.config.Remember {
		if s := m.sources[name]; s.unsaved && s.complete {
			s.unsaved = false
			list = append(list, kept{name, maps.Clone(s.scopes)})
		}
	}
	return list
}

// again makes sources due that could not be kept.
func (m *merge) again(failed []string) {
	for _, name := range failed {
		m.sources[name].unsaved = true
	}
}

// keep writes what was due, in any goroutine, and returns what could not be
// kept.
func (c Config) keep(list []kept) (failed []string) {
	for _, k := range list {
		if err := c.write(k); err != nil {
			c.Log.Warn("last good catalog was not kept; a restart without the source would miss the newest changes", "source", k.source, "error", err)
			failed = append(failed, k.source)
		}
	}
	return failed
}

func (c Config) write(k kept) error {
	data, err := json.Marshal(lastGood{Format: lastGoodFormat, Source: k.source, Scopes: k.scopes})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	temp, err := os.CreateTemp(c.Dir, "."+k.source+"-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	if _, err := temp.Write(data); err != nil {
		_ = temp.Close()
		return err
	}
	if err := temp.Sync(); err != nil {
		_ = temp.Close()
		return err
	}
	if err := temp.Close(); err != nil {
		return err
	}
	return os.Rename(temp.Name(), c.path(k.source))
}
