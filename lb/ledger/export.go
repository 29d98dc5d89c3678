package ledger

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
)

const exportFormat = "roost-ledger-export-1"

// document is an export.
type document struct {
	Format     string           `json:"format"`
	Generation uint64           `json:"generation"`
	Records    []Record         `json:"records"`
	Objects    []documentObject `json:"objects"`
	Marks      []Mark           `json:"marks"`
}

// documentObject is an Object whose Spec can be read: it is JSON, or else in
// base64.
type documentObject struct {
	Owner      Owner           `json:"owner"`
	Origin     string          `json:"origin"`
	Generation uint64          `json:"generation,omitempty"`
	Spec       json.RawMessage `json:"spec,omitempty"`
	Base64     []byte          `json:"spec_base64,omitempty"`
}

// Export writes a State as one JSON document. Equal states give equal bytes.
func Export(s State) ([]byte, error) {
	d := document{Format: exportFormat, Generation: s.Generation, Records: append([]Record{}, s.Records...), Objects: make([]documentObject, 0, len(s.Objects)), Marks: append([]Mark{}, s.Marks...)}
	slices.SortFunc(d.Records, byAddress)
	slices.SortFunc(d.Marks, func(a, b Mark) int { return a.Key().compare(b.Key()) })
	for _, o := range s.Objects {
		out := documentObject{Owner: o.Owner, Origin: o.Origin, Generation: o.Generation}
		// What is indented here must be the same bytes after an import.
		var compact bytes.Buffer
		if json.Compact(&compact, o.Spec) == nil && bytes.Equal(compact.Bytes(), o.Spec) {
			out.Spec = o.Spec
		} else {
			out.Base64 = o.Spec
		}
		d.Objects = append(d.Objects, out)
	}
	slices.SortFunc(d.Objects, func(a, b documentObject) int { return a.Owner.compare(b.Owner) })
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false) // a spec's bytes stay
	enc.SetIndent("", "  ")
	if err := enc.Encode(d); err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	return out.Bytes(), nil
}

// Import reads what Export wrote, strictly: what it does not know, or what
// contradicts itself, is an error that says where.
func Import(data []byte) (State, error) {
	var d document
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return State{}, fmt.Errorf("import: %s%w", place(data, dec, err), err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return State{}, fmt.Errorf("import: %sthere is more after the end of the document", position(data, dec.InputOffset()))
	}
	if d.Format != exportFormat {
		return State{}, fmt.Errorf("import: format is %q, this roost reads %q", d.Format, exportFormat)
	}
	s := State{Generation: d.Generation, Records: d.Records, Marks: d.Marks}
	for n, m := range s.Marks {
		// Data was indented with the rest.
		var compact bytes.Buffer
		if len(m.Data) > 0 && json.Compact(&compact, m.Data) == nil {
			s.Marks[n].Data = compact.Bytes()
		}
	}
	for n, o := range d.Objects {
		if len(o.Spec) > 0 && len(o.Base64) > 0 {
			return State{}, fmt.Errorf("import: objects[%d] of %s has both spec and spec_base64", n, o.Owner)
		}
		spec := o.Base64
		if len(o.Spec) > 0 {
			var compact bytes.Buffer
			if err := json.Compact(&compact, o.Spec); err != nil {
				return State{}, fmt.Errorf("import: objects[%d] of %s: %w", n, o.Owner, err)
			}
			spec = compact.Bytes()
		}
		s.Objects = append(s.Objects, Object{Owner: o.Owner, Origin: o.Origin, Spec: spec, Generation: o.Generation})
	}
	if err := s.check(); err != nil {
		return State{}, fmt.Errorf("import: %w", err)
	}
	return s, nil
}

func place(data []byte, dec *json.Decoder, err error) string {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return position(data, syntax.Offset)
	case errors.As(err, &kind):
		return position(data, kind.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return position(data, int64(len(data)))
	}
	return position(data, dec.InputOffset())
}

func position(data []byte, offset int64) string {
	if offset <= 0 || offset > int64(len(data)) {
		return ""
	}
	before := data[:offset]
	return fmt.Sprintf("line %d, column %d: ", bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n')-1)
}

// check finds what no ledger can hold.
func (s State) check() error {
	addresses, slots, objects, marks := map[netip.Addr]Owner{}, map[slot]netip.Addr{}, map[Owner]bool{}, map[MarkKey]bool{}
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for n, r := range s.Records {
		switch {
		case !r.Address.IsValid():
			wrong("records[%d] has no address", n)
			continue
		case r.Owner.Tenant == "" || r.Owner.Service == "":
			wrong("records[%d]: %s has no owner", n, r.Address)
		case r.Kind != Internal && r.Kind != Dedicated:
			wrong("records[%d]: %s: kind is %q, not %q or %q", n, r.Address, r.Kind, Internal, Dedicated)
		case r.State != Bound && r.State != Quarantined:
			wrong("records[%d]: %s: state is %q, not %q or %q", n, r.Address, r.State, Bound, Quarantined)
		}
		if other, ok := addresses[r.Address]; ok {
			wrong("records[%d]: %s belongs to %s and to %s", n, r.Address, other, r.Owner)
		}
		if other, ok := slots[slotOf(r)]; ok {
			wrong("records[%d]: %s has two %s addresses, %s and %s", n, r.Owner, r.Kind, other, r.Address)
		}
		addresses[r.Address], slots[slotOf(r)] = r.Owner, r.Address
	}
	for n, o := range s.Objects {
		if o.Owner.Tenant == "" || o.Owner.Service == "" || objects[o.Owner] {
			wrong("objects[%d]: owner %q is incomplete or there twice", n, o.Owner)
		}
		objects[o.Owner] = true
	}
	for n, m := range s.Marks {
		if m.Kind == "" || m.Name == "" || marks[m.Key()] {
			wrong("marks[%d]: %q is incomplete or there twice", n, m.Kind+"/"+m.Name)
		}
		marks[m.Key()] = true
	}
	return errors.Join(errs...)
}

// Import adds what the ledger does not have and returns how many records,
// objects and marks that were. What is there stays as it is. When an address has
// another owner here, or an owner another address, nothing is added and the error
// lists all of them. The generation is higher than both afterwards.
func (l *Ledger) Import(ctx context.Context, s State) (added int, err error) {
	if err := s.check(); err != nil {
		return 0, fmt.Errorf("import: %w", err)
	}
	err = l.update(ctx, s.Generation, func(tx *Tx) error {
		var conflicts []error
		for _, r := range s.Records {
			if old := tx.l.byAddress[r.Address]; old != nil && slotOf(*old) != slotOf(r) {
				conflicts = append(conflicts, fmt.Errorf("%s is the %s address of %s here, of %s (%s) in the import", r.Address, old.Kind, old.Owner, r.Owner, r.Kind))
			} else if old := tx.l.bySlot[slotOf(r)]; old != nil && old.Address != r.Address {
				conflicts = append(conflicts, fmt.Errorf("%s has %s here, %s in the import", r.Owner, old.Address, r.Address))
			} else if old == nil {
				tx.put(r)
			}
		}
		if len(conflicts) > 0 {
			return fmt.Errorf("import: nothing was added, because an address never changes: %w", errors.Join(conflicts...))
		}
		for _, o := range s.Objects {
			if _, ok := tx.Object(o.Owner); !ok {
				tx.PutObject(o)
			}
		}
		for _, m := range s.Marks {
			if _, ok := tx.Mark(m.Key()); !ok {
				tx.PutMark(m)
			}
		}
		added = len(tx.records) + len(tx.objects) + len(tx.marks)
		return nil
	})
	if err != nil {
		return 0, err
	}
	return added, nil
}
