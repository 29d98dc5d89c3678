package xds

import (
	"regexp"
	"strings"
)

// What gRPC's libraries say of the resources that they refuse; they take all
// others of the same response (gRFC A46).
var (
	// grpc-go: error parsing "Cluster" response: resource "NAME": TEXT;\nresource ...
	textOfGo = regexp.MustCompile(`^error parsing "[^"]*" response: `)
	itemOfGo = regexp.MustCompile(`(?:^|;\n)resource "([^"]*)": `)
	// C-core (C++, Python, Ruby, PHP, C#) and Node: xDS response validation
	// errors: [resource index N: NAME: TEXT; resource index ...]
	textOfCore = regexp.MustCompile(`xDS response validation errors: \[`)
	itemOfCore = regexp.MustCompile(`(?:^|; )resource index \d+: (\S+): `)
)

// saidByGRPC finds what such a text says of each resource that it names; it is
// empty for a text of somebody else, and for one that blames something without a
// name.
func saidByGRPC(text string) map[string]string {
	if at := textOfGo.FindStringIndex(text); at != nil {
		return items(text[at[1]:], itemOfGo)
	}
	if at := textOfCore.FindStringIndex(text); at != nil {
		return items(strings.TrimSuffix(text[at[1]:], "]"), itemOfCore)
	}
	return nil
}

func items(list string, item *regexp.Regexp) map[string]string {
	starts := item.FindAllStringSubmatchIndex(list, -1)
	if len(starts) == 0 || starts[0][0] != 0 {
		return nil
	}
	said := map[string]string{}
	for i, at := range starts {
		end := len(list)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		said[list[at[2]:at[3]]] = orUnsaid(list[at[1]:end])
	}
	return said
}
