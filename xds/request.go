package xds

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Bounds on what one request may hold.
const (
	maxRequest = 32 << 20 // a reconnect names every version that the proxy has
	maxNode    = 64 << 10
	maxNames   = 100_000 // of one request, and subscribed to of one type
)

// Field numbers of envoy.service.discovery.v3.DeltaDiscoveryRequest, of its map's
// entries and of google.rpc.Status.
const (
	fieldNode            = 1
	fieldRequestType     = 2
	fieldSubscribe       = 3
	fieldUnsubscribe     = 4
	fieldVersions        = 5
	fieldResponseNonce   = 6
	fieldErrorDetail     = 7
	fieldKey, fieldValue = 1, 2
	fieldStatusMessage   = 2
)

var errNotUTF8 = errors.New("a text of the request is not UTF-8")

// request is a DeltaDiscoveryRequest. Its strings share the memory of the whole
// message: who keeps one for long clones it.
type request struct {
	node        string // marshalled
	typeURL     string
	subscribe   []string
	unsubscribe []string
	versions    []holding
	nonce       string
	refused     bool // it has an error_detail
	message     string
}

// holding is a version of a resource that a client says it has.
type holding struct{ name, version string }

// decode reads a message. Nothing of it is built before its bounds are known.
func (q *request) decode(b []byte) error {
	subscribed, versions, err := count(b)
	if err != nil {
		return err
	}
	*q = request{subscribe: make([]string, 0, subscribed), versions: make([]holding, 0, versions)}
	text := string(b)
	for at := 0; at < len(b); {
		num, typ, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			return protowire.ParseError(n)
		}
		at += n
		if typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, b[at:]); n < 0 {
				return protowire.ParseError(n)
			}
			at += n
			continue
		}
		v, n := protowire.ConsumeBytes(b[at:])
		if n < 0 {
			return protowire.ParseError(n)
		}
		s := text[at+n-len(v) : at+n]
		at += n
		if err := q.field(num, v, s); err != nil {
			return err
		}
	}
	return nil
}

// count looks at how much a message holds before any of it is kept.
func count(b []byte) (subscribed, versions int, err error) {
	names := 0
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return 0, 0, protowire.ParseError(n)
		}
		end := protowire.ConsumeFieldValue(num, typ, b[n:])
		if end < 0 {
			return 0, 0, protowire.ParseError(end)
		}
		b = b[n+end:]
		switch {
		case num == fieldSubscribe:
			subscribed++
		case num == fieldVersions:
			versions++
		case num != fieldUnsubscribe:
			continue
		}
		if names++; names > maxNames {
			return 0, 0, fmt.Errorf("a request names more than %d resources", maxNames)
		}
	}
	return subscribed, versions, nil
}

// field takes one field, whose value is v and, as text, s.
func (q *request) field(num protowire.Number, v []byte, s string) error {
	switch num {
	case fieldRequestType, fieldSubscribe, fieldUnsubscribe, fieldResponseNonce:
		if !utf8.ValidString(s) {
			return errNotUTF8
		}
	}
	switch num {
	case fieldNode:
		if len(v) > maxNode {
			return fmt.Errorf("the node has %d bytes, more than %d", len(v), maxNode)
		}
		q.node = s
	case fieldRequestType:
		q.typeURL = s
	case fieldSubscribe:
		q.subscribe = append(q.subscribe, s)
	case fieldUnsubscribe:
		q.unsubscribe = append(q.unsubscribe, s)
	case fieldVersions:
		key, value, err := pair(v, s, fieldKey, fieldValue)
		if err != nil {
			return err
		}
		q.versions = append(q.versions, holding{key, value})
	case fieldResponseNonce:
		q.nonce = s
	case fieldErrorDetail:
		_, message, err := pair(v, s, 0, fieldStatusMessage)
		if err != nil {
			return err
		}
		q.refused, q.message = true, strings.Clone(message)
	}
	return nil
}

// pair reads two text fields of a message, which is b and, as text, s.
func pair(b []byte, s string, first, second protowire.Number) (one, two string, err error) {
	for at := 0; at < len(b); {
		num, typ, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			return "", "", protowire.ParseError(n)
		}
		at += n
		end := protowire.ConsumeFieldValue(num, typ, b[at:])
		if end < 0 {
			return "", "", protowire.ParseError(end)
		}
		if typ == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(b[at:])
			text := s[at+end-len(v) : at+end]
			if (num == first || num == second) && !utf8.ValidString(text) {
				return "", "", errNotUTF8
			}
			switch num {
			case first:
				one = text
			case second:
				two = text
			}
		}
		at += end
	}
	return one, two, nil
}
