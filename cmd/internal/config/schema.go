package config

import (
	"encoding/json"
	"reflect"
	"slices"
	"time"

	"github.com/roostmesh/roost/discovery/file"
	"github.com/roostmesh/roost/discovery/strict"
)

// Schema is the JSON Schema (draft 2020-12) of roost.yaml, made from the types
// that read it, so that the two cannot disagree about keys.
func Schema() []byte {
	s := schemaOf(documentType)
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "roost.yaml"
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		panic(err) // maps of strings always marshal
	}
	return append(data, '\n')
}

// shorthand are types that may also be written as one string.
var shorthand = map[reflect.Type]bool{
	reflect.TypeFor[dnsAddressDoc](): true, reflect.TypeFor[forwardDoc](): true, reflect.TypeFor[clientDoc](): true, reflect.TypeFor[stringList](): true,
}

var enums = map[reflect.Type]map[string][]string{
	reflect.TypeFor[portDoc]():      {"protocol": portProtocols},
	reflect.TypeFor[listenerDoc]():  {"protocol": listenerProtocols},
	reflect.TypeFor[balancingDoc](): {"policy": policies},
	reflect.TypeFor[logDoc]():       {"level": {"debug", "info", "warn", "error"}, "format": {"text", "json"}},
	reflect.TypeFor[accessLogDoc](): {"format": {"json", "text", "none"}, "proxies": {"gateway", "all"}, "errors": {"all", "none"}},
	reflect.TypeFor[captureDoc]():   {"node": {"bind", "tproxy", "nft"}, "sidecar": {"bind", "nft"}},
	reflect.TypeFor[file.Row]():     {"health": {"passing", "warning", "critical", "maintenance"}},
}

// numbers are texts that are naturally written as numbers; the loader takes both.
var numbers = map[reflect.Type][]string{
	reflect.TypeFor[retryDoc](): {"on"}, reflect.TypeFor[targetDoc](): {"version"}, reflect.TypeFor[file.Row](): {"version"}, reflect.TypeFor[valueDoc](): {"exact", "prefix"},
}

func schemaOf(t reflect.Type) map[string]any {
	s := plain(t)
	if shorthand[t] {
		return map[string]any{"anyOf": []any{map[string]any{"type": "string"}, s}}
	}
	return s
}

func plain(t reflect.Type) map[string]any {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return map[string]any{"type": "string", "description": "duration like 5s, 1m30s or 250ms"}
	case t.Kind() == reflect.Pointer:
		return schemaOf(t.Elem())
	case t.Kind() == reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem())}
	case t.Kind() == reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": schemaOf(t.Elem())}
	case t.Kind() == reflect.Struct:
		properties := map[string]any{}
		fields(t, t, properties)
		return map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
	case t.Kind() == reflect.Bool:
		return map[string]any{"type": "boolean"}
	case t.Kind() == reflect.String:
		return map[string]any{"type": "string"}
	}
	s := map[string]any{"type": "integer", "minimum": 0}
	if t.Kind() == reflect.Uint16 {
		s["maximum"] = 65535
	}
	return s
}

func fields(owner, t reflect.Type, out map[string]any) {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous && f.Type != reflect.TypeFor[strict.Place]() {
			fields(owner, f.Type, out)
			continue
		}
		key := f.Tag.Get("yaml")
		if key == "" {
			continue
		}
		s := schemaOf(f.Type)
		if values := enums[owner][key]; values != nil {
			s["enum"] = values
		}
		if slices.Contains(numbers[owner], key) {
			orNumber(s)
		}
		out[key] = s
	}
}

func orNumber(s map[string]any) {
	if items, ok := s["items"].(map[string]any); ok {
		s = items
	}
	s["type"] = []string{"string", "number"}
}
