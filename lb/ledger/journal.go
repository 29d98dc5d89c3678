package ledger

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Journal is a Store beside another one, in a file of its own that lists what was
// written there. When the other one comes back older than it was (a backup was
// put in its place) or is gone, the journal brings it forwards again: a
// generation never goes backwards, and no address that was told is forgotten.
//
// The first line is a whole State, each further line a Batch. It is not flushed
// to the disk by itself: after a power failure the other store knows more, and
// the journal begins anew from it.
type Journal struct {
	Store
	path    string
	file    *os.File
	lines   int // behind the first
	records int // about as many as the state has
	healed  string
}

const (
	journalFormat = "roost-journal-1"
	// journalSlack is how many batches a journal may have beyond twice its
	// records before it begins anew.
	journalSlack = 1000
)

type journalHead struct {
	Format string `json:"format"`
	State  State  `json:"state"`
}

// NewJournal puts a journal at path beside a store. A file there that is no
// journal is refused and left as it is.
func NewJournal(store Store, path string) (*Journal, error) {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("journal %s: it is no file: move it away", path)
	}
	return &Journal{Store: store, path: path}, nil
}

// Healed says what the last Load mended; "" is nothing.
func (j *Journal) Healed() string { return j.healed }

// Load implements Store.
func (j *Journal) Load(ctx context.Context) (State, error) {
	state, err := j.Store.Load(ctx)
	if err != nil {
		return State{}, err
	}
	kept, err := readJournal(j.path)
	if err != nil {
		return State{}, err
	}
	j.healed = ""
	if kept.Generation() > state.Generation {
		if err := j.Store.Apply(ctx, difference(state, kept)); err != nil {
			return State{}, fmt.Errorf("journal %s: the ledger is older than it and cannot be brought forwards: %w", j.path, err)
		}
		j.healed = fmt.Sprintf("it was at generation %d, its journal at %d: what came after was written again", state.Generation, kept.Generation())
		if state, err = j.Store.Load(ctx); err != nil {
			return State{}, err
		}
	}
	j.restart(state)
	return state, nil
}

// restart makes the journal anew. Without room for it the store goes on alone; a
// journal that knows less than the store changes nothing.
func (j *Journal) restart(s State) {
	if err := j.begin(s); err != nil {
		j.file = nil
	}
}

// Apply implements Store: the other store decides, the journal follows. One that
// cannot be written is given up until the next start: it then knows less.
func (j *Journal) Apply(ctx context.Context, b Batch) error {
	if err := j.Store.Apply(ctx, b); err != nil {
		return err
	}
	j.records += len(b.Put) - len(b.Delete)
	if j.file == nil {
		return nil
	}
	if !j.append(b) {
		_ = j.file.Close()
		_ = os.Remove(j.path) // half a line, or one missing in between, is worse than none
		j.file = nil
	} else if j.lines++; j.lines > 2*j.records+journalSlack {
		if state, err := j.Store.Load(ctx); err == nil {
			j.restart(state)
		}
	}
	return nil
}

func (j *Journal) append(b Batch) (written bool) {
	data, err := json.Marshal(b)
	if err == nil {
		_, err = j.file.Write(append(data, '\n'))
	}
	return err == nil
}

// Close implements Store.
func (j *Journal) Close() error {
	var err error
	if j.file != nil {
		err = j.file.Close()
	}
	return errors.Join(err, j.Store.Close())
}

// begin makes a journal that has a state and nothing else, in one step.
func (j *Journal) begin(s State) error {
	if j.file != nil {
		_ = j.file.Close()
		j.file = nil
	}
	data, err := json.Marshal(journalHead{journalFormat, s})
	if err != nil {
		return err
	}
	next, err := os.CreateTemp(filepath.Dir(j.path), ".journal-")
	if err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	_, err = next.Write(append(data, '\n'))
	if err == nil {
		err = os.Rename(next.Name(), j.path)
	}
	if err != nil {
		_ = next.Close()
		_ = os.Remove(next.Name())
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	j.file, j.lines, j.records = next, 0, len(s.Records)
	return nil
}

// readJournal returns the newest of what a journal knows; without a file that is
// nothing. A torn end is what a crash leaves.
func readJournal(path string) (*Ledger, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(data) == 0 {
		return replayed(State{})
	}
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	begin := []byte(`{"format":"` + journalFormat + `"`)
	// What follows the last line end is torn.
	lines := bytes.Split(data, []byte("\n"))
	lines = lines[:len(lines)-1]
	if len(lines) == 0 && (bytes.HasPrefix(data, begin) || bytes.HasPrefix(begin, data)) {
		return replayed(State{})
	}
	var head journalHead
	if len(lines) == 0 || json.Unmarshal(lines[0], &head) != nil || head.Format != journalFormat {
		return nil, fmt.Errorf("journal %s: it is not a journal of roost's ledger: move it away", path)
	}
	l, err := replayed(head.State)
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w: move it away", path, err)
	}
	for _, line := range lines[1:] {
		b := batchOf(line)
		if b == nil || b.After != l.Generation() {
			break
		}
		l.keep(*b)
	}
	return l, nil
}

// batchOf reads a line; nil is none.
func batchOf(line []byte) *Batch {
	var b Batch
	if json.Unmarshal(line, &b) != nil {
		return nil
	}
	return &b
}

// replayed is a Ledger without a store, which only takes over what was written.
func replayed(s State) (*Ledger, error) {
	l := &Ledger{}
	return l, l.take(s)
}

// difference is the batch that makes a state into what a Ledger knows.
func difference(from State, to *Ledger) Batch {
	want := to.State()
	b := Batch{After: from.Generation, Generation: want.Generation, Put: want.Records, PutObjects: want.Objects, PutMarks: want.Marks}
	for _, r := range from.Records {
		if to.byAddress[r.Address] == nil {
			b.Delete = append(b.Delete, r.Address)
		}
	}
	for _, o := range from.Objects {
		if _, ok := to.objects[o.Owner]; !ok {
			b.DelObjects = append(b.DelObjects, o.Owner)
		}
	}
	for _, m := range from.Marks {
		if _, ok := to.Mark(m.Key()); !ok {
			b.DelMarks = append(b.DelMarks, m.Key())
		}
	}
	return b
}
