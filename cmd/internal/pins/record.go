package pins

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// maxBody bounds a compressed body: with its mark it fits into one write of a
	// shared store.
	maxBody = 128 << 10
	// maxContent bounds what a compressed body may become.
	maxContent = 32 << 20
	// maxMessage bounds what is kept of Envoy's text.
	maxMessage = 2 << 10
	// maxBy bounds the proxies that are named.
	maxBy = 5
	// MaxRecords bounds how many there are: beyond it something else is wrong.
	MaxRecords = 100
)

// Record is a Verdict as the ledger keeps it. It is in force when several proxies,
// of whatever replica, refuse the version; before that it waits for a second one.
type Record struct {
	Type    string    `json:"type"`
	Name    string    `json:"name"`
	Refused string    `json:"refused"`
	Good    string    `json:"good,omitempty"` // version; empty: the resource is left out
	Body    []byte    `json:"body,omitempty"` // of the good version, compressed
	Refs    []Ref     `json:"refs,omitempty"` // of the good version
	Message string    `json:"message"`
	By      []string  `json:"by"` // some of the proxies that refuse the version, in order
	Since   time.Time `json:"-"`
}

// Ref is a resource that another one names.
type Ref struct {
	Type string `json:"type"`
	Name string `json:"name"`
}

// Key is the mark that a record of a version is kept under.
func Key(n envoy.Name, refused string) ledger.MarkKey {
	return ledger.MarkKey{Kind: ledger.MarkPin, Name: n.Type.String() + " " + n.Name + " " + refused}
}

// RecordOf writes down a Verdict that is not denied.
func RecordOf(v Verdict) (Record, error) {
	r := Record{Type: v.Name.Type.String(), Name: v.Name.Name, Refused: v.Refused, Message: strings.ToValidUTF8(v.Message[:min(len(v.Message), maxMessage)], "")}
	r.By = slices.Clone(v.By[:min(len(v.By), maxBy)])
	if v.Good == nil {
		return r, nil
	}
	body, err := pack(v.Good.Body)
	if err != nil {
		return r, err
	}
	r.Good, r.Body = v.Good.Version, body
	for _, n := range v.Good.Refs {
		r.Refs = append(r.Refs, Ref{n.Type.String(), n.Name})
	}
	return r, nil
}

// join adds proxies that refuse the version, and says whether that is news.
func (r *Record) join(by []string) bool {
	if r.InForce() {
		return false
	}
	before := len(r.By)
	for _, id := range by {
		if len(r.By) < maxBy && !slices.Contains(r.By, id) {
			r.By = append(r.By, id)
		}
	}
	slices.Sort(r.By)
	return len(r.By) > before
}

// Merge adds what another replica knows, and says whether that is news.
func (r *Record) Merge(o Record) bool {
	news := !r.InForce() && r.Good == "" && o.Good != ""
	if news {
		r.Good, r.Body, r.Refs = o.Good, o.Body, o.Refs
	}
	return r.join(o.By) || news
}

// Join adds proxies that refuse the version although nothing can be pinned where
// they are known, and says whether that is news.
func (r *Record) Join(by []string) bool { return r.join(by) }

// InForce says that every proxy is to have the good version.
func (r *Record) InForce() bool { return len(r.By) >= Several }

// Mark is the record as the ledger takes it.
func (r *Record) Mark() (ledger.Mark, error) {
	t, ok := envoy.TypeNamed(r.Type)
	if !ok {
		return ledger.Mark{}, fmt.Errorf("pin of an unknown type %q", r.Type)
	}
	data, err := json.Marshal(r)
	key := Key(envoy.Name{Type: t, Name: r.Name}, r.Refused)
	return ledger.Mark{Kind: key.Kind, Name: key.Name, Data: data, Since: r.Since}, err
}

// Read reads a record from its mark.
func Read(m ledger.Mark) (r Record, err error) {
	err = json.Unmarshal(m.Data, &r)
	r.Since = m.Since
	return r, err
}

// Of is the resource that the record is about.
func (r *Record) Of() (envoy.Name, error) {
	t, ok := envoy.TypeNamed(r.Type)
	if !ok || !Pinnable(t) || r.Name == "" || r.Refused == "" {
		return envoy.Name{}, fmt.Errorf("pin of %s %q is not understood", r.Type, r.Name)
	}
	return envoy.Name{Type: t, Name: r.Name}, nil
}

// Pin is what the record lays over a World.
func (r *Record) Pin() (*envoy.Pin, error) {
	name, err := r.Of()
	if err != nil || r.Good == "" {
		return &envoy.Pin{Name: name, Refused: r.Refused}, err
	}
	good := &envoy.Resource{Name: name, Version: r.Good}
	for _, ref := range r.Refs {
		t, ok := envoy.TypeNamed(ref.Type)
		if !ok {
			return nil, fmt.Errorf("pin of %s %s: unknown type %q", r.Type, r.Name, ref.Type)
		}
		good.Refs = append(good.Refs, envoy.Name{Type: t, Name: ref.Name})
	}
	if good.Body, err = unpack(r.Body); err != nil {
		return nil, fmt.Errorf("pin of %s %s: %w", r.Type, r.Name, err)
	}
	return envoy.NewPin(name, r.Refused, good)
}

func pack(body []byte) ([]byte, error) {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(body); err != nil {
		return nil, err
	}
	err := w.Close()
	return out.Bytes(), err
}

func unpack(data []byte) (body []byte, err error) {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	body, err = io.ReadAll(io.LimitReader(r, maxContent))
	if err == nil && len(body) == maxContent {
		err = errors.New("the body is too large")
	}
	return body, err
}
