package discovery

import (
	"encoding/json"
	"fmt"
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

func (m *merge) path(source string) string {
	return filepath.Join(m.config.Dir, source+".json")
}

// load reads what earlier runs kept. It counts as the source's first answer
// and is stale until the source confirms it.
func (m *merge) load() {
	if m.config.Dir == "" {
		return
	}
	for _, name := range m.config.Remember {
		s := m.source(name)
		kept, err := readLastGood(m.path(name))
		if err != nil {
			if !os.IsNotExist(err) {
				m.config.Log.Warn("last good catalog cannot be read, waiting for the source", "source", name, "error", err)
			}
			continue
		}
		s.scopes = kept.Scopes
		s.status.Ready, s.status.Stale, s.status.Since = true, true, m.now()
		s.status.LastError = "not asked yet since the start"
		m.markStale(s, true)
		for _, scope := range s.scopes {
			for _, i := range scope.Instances {
				m.touch(i.Key, touched{})
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

// save writes the sources that changed since the last save, and tells whether
// there were any. A failure is logged and tried again.
func (m *merge) save() (tried bool) {
	if m.config.Dir == "" {
		return false
	}
	for _, name := range m.config.Remember {
		s := m.sources[name]
		if !s.unsaved || !s.complete {
			continue
		}
		tried = true
		if err := m.write(name, s); err != nil {
			m.config.Log.Warn("last good catalog was not kept; a restart without the source would miss the newest changes", "source", name, "error", err)
			continue
		}
		s.unsaved = false
	}
	return tried
}

func (m *merge) write(name string, s *sourceState) error {
	data, err := json.Marshal(lastGood{Format: lastGoodFormat, Source: name, Scopes: s.scopes})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.config.Dir, 0o700); err != nil {
		return err
	}
	temp, err := os.CreateTemp(m.config.Dir, "."+name+"-*")
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
	return os.Rename(temp.Name(), m.path(name))
}
