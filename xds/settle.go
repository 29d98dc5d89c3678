package xds

import (
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/xds/envoy"
)

// What Envoy says when it cannot bind a listener, and when another listener has
// its address (ListenerManagerImpl).
const (
	textInUse        = "Address already in use"
	textNoPermission = "Permission denied"
	textDuplicate    = "duplicate address"
)

// retryable says that a refusal is about the host, not about the resource, so
// that the same bytes may be taken later.
func retryable(t envoy.Type, text string) bool {
	return t == envoy.Listener && (strings.Contains(text, textInUse) || strings.Contains(text, textNoPermission) || strings.Contains(text, textDuplicate))
}

// settle takes what a request says about a response: ACK or NACK. A nonce that
// is not on its way says nothing.
func (s *state) settle(t envoy.Type, q *request, now time.Time) []rejection {
	ts := &s.types[t]
	var r *response
	for i, o := range ts.out {
		if o.nonce == q.nonce {
			r = o
			ts.out = slices.Delete(ts.out, i, i+1)
			break
		}
	}
	if r == nil {
		return nil
	}
	s.unpruned = true
	if q.refused {
		return s.nack(r, q.message, now)
	}
	s.accept(t, r.resources, r.world == s.version)
	if t == envoy.Endpoint && len(r.resources) > 0 {
		s.taken.version, s.taken.clusters = r.world, slices.Grow(s.taken.clusters, len(r.resources))
		for _, res := range r.resources {
			s.taken.clusters = append(s.taken.clusters, res.Name.Name)
		}
	}
	if len(r.removed) > 0 {
		s.letGo(t, r.removed)
		if t == envoy.Listener {
			s.release(textDuplicate)
		}
	}
	return nil
}

// accept notes that the client has taken versions. same says that the view is the
// one that they were sent from.
func (s *state) accept(t envoy.Type, list []*envoy.Resource, same bool) {
	ts := &s.types[t]
	wanted, unwanted := list, func(r *envoy.Resource) bool { return !s.wants(t, r.Name.Name) }
	if slices.ContainsFunc(list, unwanted) { // its name was let go meanwhile
		wanted = slices.DeleteFunc(slices.Clone(list), unwanted)
	}
	s.hold(t, wanted...)
	if !same || ts.refused.len() > 0 {
		for _, r := range wanted {
			if !s.current(r) {
				ts.owe(r.Name.Name, s.version) // the name was let go and taken again since
			}
		}
	}
	if ts.suspects.len()+ts.refused.len() == 0 {
		return
	}
	for _, r := range list {
		name := r.Name.Name
		if sus, ok := ts.suspects.m[name]; ok && sus.version == r.Version {
			ts.suspects.del(name)
		}
		if f := ts.refused.get(name); f != nil && f.version == r.Version {
			ts.refused.del(name)
			ts.calm()
		}
	}
}

// nack takes the refusal of a response. Envoy's listener and cluster managers
// name what they refuse and apply the rest. Other handlers stop at the first
// fault, so the rest is sent again; when the text names nothing, one by one.
func (s *state) nack(r *response, text string, now time.Time) (rejected []rejection) {
	ts := &s.types[r.Type]
	if len(r.resources) == 0 {
		return nil // Nothing more to try: what it has not removed it keeps.
	}
	ts.lastError = text
	guilty, applied := blame(r, text)
	var taken []*envoy.Resource
	for _, res := range r.resources {
		name := res.Name.Name
		later, _ := ts.onItsWay(name)
		switch {
		case applied && guilty[name] == "":
			taken = append(taken, res)
		case !s.wants(r.Type, name):
		case !s.current(res):
			ts.owe(name, r.since)
		case guilty[name] != "":
			rejected = s.refuse(res, guilty[name], now, rejected)
		case later != nil && later.Version == res.Version: // sent again since: that answer decides
		case len(guilty) > 0:
			s.again(res, r.since)
		default:
			ts.suspects.set(name, suspect{res.Version, r.since})
		}
	}
	s.accept(r.Type, taken, false)
	return rejected
}

// again has a resource sent once more that was spoiled by others.
func (s *state) again(r *envoy.Resource, since uint64) {
	ts := &s.types[r.Type]
	if h := ts.held.get(r.Name.Name); h != nil && h.Version == r.Version {
		ts.again.set(r.Name.Name, struct{}{})
	}
	ts.owe(r.Name.Name, since)
}

// refuse remembers a NACKed version; a repeated refusal is no news.
func (s *state) refuse(r *envoy.Resource, text string, now time.Time, rejected []rejection) []rejection {
	ts := &s.types[r.Type]
	name := r.Name.Name
	ts.suspects.del(name)
	if f := ts.refused.get(name); f != nil && f.version == r.Version {
		f.message, f.retry = text, false
		return rejected
	}
	ts.refused.set(name, &refusal{version: r.Version, message: text, since: now})
	return append(rejected, rejection{r.Name, r.Version, text})
}

// blame finds the resources of a refused response that its text names, with
// what it says of each. applied says that the client has taken all others.
func blame(r *response, text string) (guilty map[string]string, applied bool) {
	guilty = map[string]string{}
	if said := saidByGRPC(text); len(said) > 0 {
		for _, res := range r.resources {
			if about, ok := said[res.Name.Name]; ok {
				guilty[res.Name.Name] = about
			}
		}
		return guilty, true
	}
	_, list, listed := strings.Cut(text, "Error adding/updating listener(s) ")
	if !listed {
		_, list, listed = strings.Cut(text, "Error adding/updating cluster(s) ")
	}
	if listed {
		for _, res := range r.resources {
			if said, ok := saidOf(list, res.Name.Name); ok {
				guilty[res.Name.Name] = said
			}
		}
		if len(guilty) > 0 {
			return guilty, true
		}
	}
	if len(r.resources) == 1 {
		return map[string]string{r.resources[0].Name.Name: orUnsaid(text)}, false
	}
	for _, res := range r.resources {
		if mentions(text, res.Name.Name) {
			guilty[res.Name.Name] = orUnsaid(text)
		}
	}
	return guilty, false
}

func orUnsaid(text string) string {
	if text == "" {
		return "refused without a reason"
	}
	return text
}

// saidOf finds "NAME: TEXT" in Envoy's list, whose items end with a line or ", ".
func saidOf(list, name string) (string, bool) {
	at := -1
	for from := 0; at < 0; {
		i := strings.Index(list[from:], name+": ")
		if i < 0 {
			return "", false
		}
		i += from
		if i == 0 || list[i-1] == '\n' || strings.HasSuffix(list[:i], ", ") {
			at = i
		}
		from = i + 1
	}
	said, _, _ := strings.Cut(list[at:], "\n")
	return said, true
}

// mentions says whether a text holds a name as a word of its own.
func mentions(text, name string) bool {
	for from := 0; ; {
		i := strings.Index(text[from:], name)
		if i < 0 || name == "" {
			return false
		}
		i += from
		end := i + len(name)
		if (i == 0 || !nameByte(text[i-1])) && (end == len(text) || !nameByte(text[end]) || strings.HasPrefix(text[end:], ": ")) {
			return true
		}
		from = i + 1
	}
}

func nameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._~/:%@-", c) >= 0
}

// retry releases the refused listeners that the host, not their content, kept
// from being taken: the same bytes are sent once more.
func (s *state) retry() {
	for _, text := range []string{textInUse, textNoPermission, textDuplicate} {
		s.release(text)
	}
}

func (s *state) release(text string) {
	ts := &s.types[envoy.Listener]
	for name, f := range ts.refused.m {
		if !f.retry && strings.Contains(f.message, text) {
			f.retry = true
			ts.owe(name, s.version)
		}
	}
}

// waiting says that the client owes an answer to a response.
func (s *state) waiting() bool {
	for t := range envoy.Types {
		if len(s.types[t].out) > 0 {
			return true
		}
	}
	return false
}

// excuse lets what cannot go on, a removal under a refused parent, owe nothing.
func (s *state) excuse() {
	for t := range envoy.Types {
		for name := range s.types[t].dirty.m {
			s.types[t].dirty.set(name, 0)
		}
	}
}

// progress returns the newest World version of which everything was sent, and
// the newest of which everything is settled as well.
func (s *state) progress() position {
	pushed, acked := s.version, s.version
	before := func(v *uint64, since uint64) {
		if since > 0 && since-1 < *v {
			*v = since - 1
		}
	}
	for t := range envoy.Types {
		ts := &s.types[t]
		before(&pushed, ts.owed)
		for _, since := range ts.dirty.m {
			before(&pushed, since)
		}
		for _, since := range ts.answers.m {
			before(&pushed, since)
		}
		for _, sus := range ts.suspects.m {
			before(&pushed, sus.since)
		}
		for _, r := range ts.out {
			before(&acked, r.since)
		}
	}
	return position{pushed, min(pushed, acked)}
}
