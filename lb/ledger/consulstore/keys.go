package consulstore

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"

	"github.com/roostmesh/roost/lb/ledger"
)

const (
	formatKey     = "format"
	generationKey = "generation"
	restoringKey  = "restoring"
	addresses     = "addresses/"
	owners        = "owners/"
	services      = "services/"
	marks         = "marks/"
	replicas      = "replicas/"

	format = "roost-ledger-1"
)

// head is the value of the generation key. The counts tell a ledger of which a
// part was deleted from a whole one.
type head struct {
	Generation uint64 `json:"generation"`
	Records    int    `json:"records"`
	Objects    int    `json:"objects"`
	Marks      int    `json:"marks"`
}

// entry is a key that was read or written.
type entry struct {
	index uint64
	value []byte
	item  any // the decoded value of a record, an object or a mark
}

func addressKey(r ledger.Record) string { return addresses + r.Address.String() }

func ownerKey(r ledger.Record) string {
	key := owners + escape(r.Owner.Tenant, r.Owner.Service, r.Kind)
	if r.Address.Is6() {
		key += "/6"
	}
	return key
}

func serviceKey(o ledger.Owner) string { return services + escape(o.Tenant, o.Service) }

func markKey(k ledger.MarkKey) string { return marks + escape(k.Kind, k.Name) }

func replicaKey(name string) string { return replicas + escape(name) }

func escape(names ...string) string {
	for n := range names {
		names[n] = url.PathEscape(names[n])
	}
	return strings.Join(names, "/")
}

// decode reads the value of a key; other keys than those of records, objects and
// marks have none.
func decode(key string, value []byte) (any, error) {
	switch {
	case strings.HasPrefix(key, addresses):
		return as(key, value, addressKey)
	case strings.HasPrefix(key, services):
		return as(key, value, func(o ledger.Object) string { return serviceKey(o.Owner) })
	case strings.HasPrefix(key, marks):
		return as(key, value, func(m ledger.Mark) string { return markKey(m.Key()) })
	}
	return nil, nil
}

// as reads a value and checks that it stands where it belongs.
func as[T any](key string, value []byte, place func(T) string) (any, error) {
	var t T
	if err := json.Unmarshal(value, &t); err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	if want := place(t); want != key {
		return nil, fmt.Errorf("it is damaged: its value belongs to key %s", want)
	}
	return t, nil
}
