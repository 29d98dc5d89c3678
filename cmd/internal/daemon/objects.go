package daemon

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/roostmesh/roost/cmd/internal/changes"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
)

// object is a service that no file declares: seen in Consul, or made through
// the API. It is written down in the ledger's store.
type object struct {
	raw    []byte // as the store has it; nil has to be parsed again
	record serviceRecord
	origin string
	spec   *lb.ServiceSpec
}

// serviceRecord is what the store keeps: the body of the API, and which ports
// were guessed.
type serviceRecord struct {
	Body    json.RawMessage `json:"body"`
	Guessed []string        `json:"guessed,omitempty"`
}

type recordedPort struct {
	Name     string `json:"name"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
}

// newObject parses a record. One that no longer fits (its dedicated pool is
// gone) keeps its ports.
func newObject(key lb.Key, r serviceRecord, origin string, pools []lb.DedicatedPool) (*object, error) {
	spec, err := config.ParseService(key, r.Body, pools)
	if err != nil {
		var ports struct {
			Ports json.RawMessage `json:"ports"`
		}
		if json.Unmarshal(r.Body, &ports) != nil {
			return nil, err
		}
		body, merr := json.Marshal(ports)
		if merr != nil {
			return nil, err
		}
		var again error
		if spec, again = config.ParseService(key, body, pools); again != nil {
			return nil, err
		}
	}
	spec.Origin = origin
	for i := range spec.Ports {
		spec.Ports[i].Guessed = slices.Contains(r.Guessed, spec.Ports[i].Name)
	}
	return &object{record: r, origin: origin, spec: spec}, nil
}

// parse reads the recorded services; those that have not changed keep their
// pointer.
func (r *reconciler) parse(recorded []ledger.Object) map[lb.Key]*object {
	objects := make(map[lb.Key]*object, len(recorded))
	r.unread = map[lb.Key]bool{}
	for _, o := range recorded {
		key := keyOf(o.Owner)
		if old := r.objects[key]; old != nil && old.origin == o.Origin && bytes.Equal(old.raw, o.Spec) {
			objects[key] = old
			continue
		}
		var rec serviceRecord
		err := json.Unmarshal(o.Spec, &rec)
		var obj *object
		if err == nil {
			obj, err = newObject(key, rec, o.Origin, r.config.Model.DedicatedPools)
		}
		if err != nil {
			r.d.log.Error("a recorded service cannot be read; its address stays reserved", "service", key, "error", err)
			r.unread[key] = true
			continue
		}
		obj.raw = o.Spec
		objects[key] = obj
	}
	return objects
}

// object is what is recorded of a service, or is about to be: several commands
// share one write, and each has to see what those before it did.
func (r *reconciler) object(key lb.Key) *object {
	if o, staged := r.put[key]; staged {
		return o
	}
	return r.objects[key]
}

// record stages services that a source shows for the first time, and explicit
// ports that replace guessed ones.
func (r *reconciler) record(catalog *discovery.Catalog) []events.Event {
	var told []events.Event
	seen := r.groups
	r.groups = catalog.Groups
	for key := range catalog.Groups.Differs(seen) {
		group := catalog.Groups.Get(key)
		if group == nil || r.declared[key] != nil {
			continue
		}
		old := r.object(key)
		obj := r.wanted(key, group, old)
		if obj == nil {
			continue
		}
		stored, err := obj.stored(key)
		if err != nil {
			r.problem("service_invalid", key.String(), obj.origin, "cannot be recorded: "+err.Error(), "mend the registration's meta")
			continue
		}
		r.stage(func(tx *ledger.Tx) {
			// Another replica may have recorded it first: what it said stays.
			if _, there := tx.Object(stored.Owner); !there || old != nil {
				tx.PutObject(stored)
			}
		})
		if old != nil {
			told = append(told, events.Change(events.ServiceChanged, key.Tenant, key.Service, "", "its ports are now "+changes.PortsText(obj.spec.Ports), group.Seen, 0))
		}
	}
	return told
}

// stored is what the store keeps of an object.
func (o *object) stored(key lb.Key) (ledger.Object, error) {
	spec, err := json.Marshal(o.record)
	return ledger.Object{Owner: ownerOf(key), Origin: o.origin, Spec: spec}, err
}

// etag is a short hash of what an object says, equal on every replica.
func (o *object) etag() string {
	sum := sha256.Sum256(append([]byte(o.origin+"\x00"), o.raw...))
	return hex.EncodeToString(sum[:8])
}

// wanted returns the object that a group's registrations ask for, or nil where
// nothing is to be recorded.
func (r *reconciler) wanted(key lb.Key, group *discovery.Group, old *object) *object {
	var ports []recordedPort
	var guessed []string
	origin := ""
	if old != nil {
		origin = old.origin
		for _, p := range old.spec.Ports {
			ports = append(ports, recordedPort{p.Name, p.Port, p.Protocol})
			if p.Guessed {
				guessed = append(guessed, p.Name)
			}
		}
	}
	changed := false
	for _, i := range group.Instances {
		for _, w := range i.Wants {
			if origin == "" {
				origin = i.Origin
			}
			changed = merge(&ports, &guessed, w) || changed
		}
	}
	if !changed {
		return nil
	}
	var body map[string]any
	if old != nil {
		if err := json.Unmarshal(old.record.Body, &body); err != nil {
			return nil
		}
	}
	if body == nil {
		body = map[string]any{}
	}
	body["ports"] = ports
	data, err := json.Marshal(body)
	if err != nil {
		return nil
	}
	obj, err := newObject(key, serviceRecord{Body: data, Guessed: guessed}, origin, r.config.Model.DedicatedPools)
	if err != nil {
		r.problem("service_invalid", key.String(), origin, "cannot be recorded: "+err.Error(), "mend the registration's meta")
		return nil
	}
	return obj
}

// merge takes one wanted port into what is recorded: a new name is added, a
// guess gives way to an explicit wish, anything else stays as it was.
func merge(ports *[]recordedPort, guessed *[]string, w discovery.WantedPort) bool {
	for i, p := range *ports {
		// A guessed only port is what an explicit one of another name means.
		guess := i == 0 && len(*ports) == 1 && slices.Contains(*guessed, p.Name) && !w.Guessed
		if p.Name != w.Name && !guess {
			continue
		}
		if w.Guessed || !slices.Contains(*guessed, p.Name) {
			return false
		}
		*guessed = slices.DeleteFunc(*guessed, func(n string) bool { return n == p.Name })
		(*ports)[i] = recordedPort{w.Name, w.Dial, w.Protocol}
		return true
	}
	if slices.ContainsFunc(*ports, func(p recordedPort) bool { return p.Port == w.Dial }) {
		return false
	}
	*ports = append(*ports, recordedPort{w.Name, w.Dial, w.Protocol})
	if w.Guessed {
		*guessed = append(*guessed, w.Name)
	}
	return true
}

// The errors of service objects that a caller tells apart.
var (
	ErrUnknownService = errors.New("there is no such service")
	ErrDeclared       = errors.New("the service is declared in a file")
	ErrAnnounced      = errors.New("a source still announces the service")
	ErrChanged        = errors.New("the service has changed since")
)

// Condition says which state of a service a change is meant for: If-Match and
// If-None-Match of RFC 9110.
type Condition struct {
	Match []string // entity tags of which one must be in force; "*" is any
	None  bool     // there must be no such service
}

// fulfilled checks a condition against the object of now, nil being none.
func (c Condition) fulfilled(o *object) error {
	if c.None && o != nil {
		return fmt.Errorf("%w: it exists, and If-None-Match says that it must not", ErrChanged)
	}
	if len(c.Match) == 0 || o != nil && (slices.Contains(c.Match, "*") || slices.Contains(c.Match, o.etag())) {
		return nil
	}
	return fmt.Errorf("%w: its entity tag is not the one of If-Match: read it again", ErrChanged)
}

// guard stages a change that is only made while the store still has what the
// condition was checked against: another replica may be first. lost tells, after
// the build, that it was.
func (r *reconciler) guard(c Condition, owner ledger.Owner, old *object, change func(*ledger.Tx)) (lost *bool) {
	lost = new(bool)
	r.stage(func(tx *ledger.Tx) {
		now, ok := tx.Object(owner)
		*lost = (c.None || len(c.Match) > 0) && (ok != (old != nil) || ok && !bytes.Equal(now.Spec, old.raw))
		if !*lost {
			change(tx)
		}
	})
	return lost
}

// Tag is the entity tag of a service that no file declares; "" is none.
func (d *Daemon) Tag(ctx context.Context, key lb.Key) (tag string) {
	_ = d.look(ctx, func(r *reconciler) { // when Roost stops there is no tag
		if o := r.objects[key]; o != nil && r.declared[key] == nil {
			tag = o.etag()
		}
	})
	return tag
}

// PutService makes or changes a service. It returns after the change is written
// down, with the entity tag of what was written. The error wraps ErrDeclared or
// ErrChanged, or is a strict.Errors for a body that cannot be used.
func (d *Daemon) PutService(ctx context.Context, key lb.Key, body []byte, condition Condition) (created bool, tag string, err error) {
	var lost *bool
	err = d.do(ctx, func(r *reconciler) error {
		if s := r.declared[key]; s != nil {
			return fmt.Errorf("%w: change it at %s", ErrDeclared, s.Origin)
		}
		old := r.object(key)
		if err := condition.fulfilled(old); err != nil {
			return err
		}
		origin := "api"
		if old != nil {
			origin = cmp.Or(old.origin, origin)
		}
		obj, err := newObjectStrict(key, serviceRecord{Body: compact(body)}, origin, r.config.Model)
		if err != nil {
			return err
		}
		stored, err := obj.stored(key)
		if err != nil {
			return err
		}
		lost = r.guard(condition, stored.Owner, old, func(tx *ledger.Tx) { tx.PutObject(stored) })
		obj.raw, r.put[key] = stored.Spec, obj
		created, tag = old == nil, obj.etag()
		if !created && !bytes.Equal(old.raw, stored.Spec) {
			d.Events.Add(events.Change(events.ServiceChanged, key.Tenant, key.Service, "", "changed through the API", time.Now(), 0))
		}
		return nil
	})
	if err == nil && *lost {
		err = fmt.Errorf("%w: another replica was first: read it again", ErrChanged)
	}
	return created, tag, err
}

// compact takes the white space out of a JSON body, so that the same content is
// the same record; what is no JSON stays and is refused with its place.
func compact(body []byte) []byte {
	var out bytes.Buffer
	if json.Compact(&out, body) != nil {
		return body
	}
	return out.Bytes()
}

func newObjectStrict(key lb.Key, rec serviceRecord, origin string, c *lb.Config) (*object, error) {
	if _, err := config.ParseService(key, rec.Body, c.DedicatedPools); err != nil {
		return nil, err
	}
	return newObject(key, rec, origin, c.DedicatedPools)
}

// DeleteService deletes a service; its addresses go into quarantine and are
// returned. The error wraps ErrUnknownService, ErrDeclared, ErrAnnounced or
// ErrChanged.
func (d *Daemon) DeleteService(ctx context.Context, key lb.Key, condition Condition) (records []ledger.Record, err error) {
	owner := ownerOf(key)
	var lost *bool
	err = d.do(ctx, func(r *reconciler) error {
		if s := r.declared[key]; s != nil {
			return fmt.Errorf("%w: remove it at %s", ErrDeclared, s.Origin)
		}
		old := r.object(key)
		if old == nil {
			return ErrUnknownService
		}
		if err := condition.fulfilled(old); err != nil {
			return err
		}
		if g := r.catalog().Groups.Get(key); g != nil {
			return fmt.Errorf("%w: %s; deregister its %d instances first", ErrAnnounced, g.Instances[0].Origin, len(g.Instances))
		}
		lost = r.guard(condition, owner, old, func(tx *ledger.Tx) { tx.DeleteObject(owner) })
		r.put[key] = nil
		return nil
	})
	if err == nil && *lost {
		err = fmt.Errorf("%w: another replica was first: read it again", ErrChanged)
	}
	if err != nil {
		return nil, err
	}
	for _, rec := range d.ledger.Records() {
		if rec.Owner == owner {
			records = append(records, rec)
		}
	}
	return records, nil
}
