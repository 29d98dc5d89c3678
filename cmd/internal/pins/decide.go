// Package pins decides when a resource that proxies refuse is kept at its last
// good version for all of them, and writes that down.
//
// How proxies stand to a resource goes in ([Decide]), a [Verdict] comes out; a
// [Record] is a verdict as a mark of the ledger, which every replica applies, and
// [Record.Pin] what it lays over a World. The package is pure: it starts no
// goroutine and does no I/O.
package pins

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// Several is how many proxies have to refuse a version for it to be pinned: one
// alone may be at fault itself.
const Several = 2

// Pinnable says whether resources of a type may be pinned. An old assignment
// would send traffic to what is somebody else's by now, a rule differs from node
// to node, and a secret does not belong into the store.
func Pinnable(t envoy.Type) bool {
	return t == envoy.Cluster || t == envoy.Listener || t == envoy.Route
}

// Verdict is what is to be done about one version that proxies refuse.
type Verdict struct {
	Name    envoy.Name
	Refused string   // the version
	By      []string // ids of the proxies that refuse it, in order
	Message string   // of Envoy
	Good    *envoy.Resource
	// Denied says why nothing can be pinned; each proxy then goes on with what it
	// has. Without it and without a Good version the resource is left out.
	Denied string
}

// Decide judges the versions of one resource that proxies refuse, in their order.
// built finds a version among what is built now. settled says that every proxy has
// had time to say what it holds.
func Decide(name envoy.Name, stands []xds.Stand, built func(version string) *envoy.Resource, settled bool) (out []Verdict) {
	var versions []string
	for _, s := range stands {
		if s.Refused != "" && !slices.Contains(versions, s.Refused) {
			versions = append(versions, s.Refused)
		}
	}
	slices.Sort(versions)
	for _, version := range versions {
		out = append(out, decide(name, version, stands, built(version), settled))
	}
	return out
}

func decide(name envoy.Name, version string, stands []xds.Stand, built *envoy.Resource, settled bool) Verdict {
	v := Verdict{Name: name, Refused: version}
	var roles []lb.Role
	for _, s := range stands {
		if s.Refused == version {
			v.By, v.Message = append(v.By, s.ID), cmp.Or(v.Message, s.Message)
			roles = append(roles, s.Role)
		}
	}
	slices.Sort(v.By)
	taken, unknown := false, false
	var earlier []xds.Stand
	for _, s := range stands {
		switch {
		case s.Held == nil || !slices.Contains(roles, s.Role): // proxies of another role have another resource of this name
		case s.Held.Version == version:
			taken = true
		case s.Held.Body == nil:
			unknown = true
		default:
			earlier = append(earlier, s)
		}
	}
	v.Good = lastGood(version, earlier)
	switch {
	case !Pinnable(name.Type):
		v.Denied = fmt.Sprintf("a %s is not pinned", name.Type)
	case built == nil:
		v.Denied = "it is built otherwise by now"
	case v.Good != nil:
		v.Denied = unfit(v.Good, built)
	case unknown:
		v.Denied = "the content of the earlier version is not known any more"
	case taken:
		v.Denied = "there is no earlier version, and other proxies have taken this one"
	case !settled:
		v.Denied = "roost has just started, and not every proxy may have said yet what it has"
	}
	if v.Denied != "" {
		v.Good = nil
	}
	return v
}

func unfit(good, built *envoy.Resource) string {
	if why := envoy.Replaces(good, built); why != "" {
		return why
	}
	if data, err := pack(good.Body); err != nil || len(data) > maxBody {
		return fmt.Sprintf("its earlier version has more than %d KB", maxBody>>10)
	}
	return ""
}

// lastGood is the version that most of those hold that refuse the newer one; of
// several, or of none, the one that most others hold, and of these those that have
// gone count least; of several still the first by its name, so that replicas agree.
func lastGood(refused string, list []xds.Stand) (good *envoy.Resource) {
	type votes struct{ refusing, connected, gone int }
	count := map[string]votes{}
	for _, s := range list {
		n := count[s.Held.Version]
		switch {
		case s.Refused == refused:
			n.refusing++
		case s.Connected:
			n.connected++
		default:
			n.gone++
		}
		count[s.Held.Version] = n
	}
	better := func(a, b *envoy.Resource) int {
		x, y := count[a.Version], count[b.Version]
		return cmp.Or(cmp.Compare(y.refusing, x.refusing), cmp.Compare(y.connected, x.connected), cmp.Compare(y.gone, x.gone), cmp.Compare(a.Version, b.Version))
	}
	for _, s := range list {
		if good == nil || better(s.Held, good) < 0 {
			good = s.Held
		}
	}
	return good
}
