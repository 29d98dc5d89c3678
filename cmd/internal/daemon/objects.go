package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
)

// object is a service that no file declares: seen in Consul, or made through
// the API. It is written down in the ledger's store.
type object struct {
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

func (r *reconciler) loadObjects(recorded []ledger.Object) {
	r.objects = map[lb.Key]*object{}
	for _, o := range recorded {
		key := lb.Key{Tenant: o.Owner.Tenant, Service: o.Owner.Service}
		var rec serviceRecord
		err := json.Unmarshal(o.Spec, &rec)
		var obj *object
		if err == nil {
			obj, err = newObject(key, rec, o.Origin, r.config.Model.DedicatedPools)
		}
		if err != nil {
			r.d.log.Error("a recorded service cannot be read; its address stays reserved", "service", key, "error", err)
			continue
		}
		r.objects[key] = obj
	}
}

// record writes down services that a source shows for the first time, and
// explicit ports that replace guessed ones.
func (r *reconciler) record(ctx context.Context, catalog *discovery.Catalog) []events.Event {
	fresh := map[lb.Key]*object{}
	var changes []events.Event
	seen := r.groups
	r.groups = catalog.Groups
	for key, group := range catalog.Groups {
		if seen[key] == group || r.declared[key] != nil {
			continue
		}
		old := r.objects[key]
		obj := r.wanted(key, group, old)
		if obj == nil {
			continue
		}
		fresh[key] = obj
		if old != nil {
			changes = append(changes, events.Change(events.ServiceChanged, key.Tenant, key.Service, "", "its ports are now "+portsText(obj.spec.Ports), group.Seen, 0))
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	if err := r.store(ctx, fresh); err != nil {
		r.ledgerFailed(err)
		r.groups = nil
		return nil
	}
	return changes
}

func (r *reconciler) store(ctx context.Context, objects map[lb.Key]*object) error {
	var list []ledger.Object
	for _, key := range slices.SortedFunc(maps.Keys(objects), lb.Key.Compare) {
		o := objects[key]
		spec, err := json.Marshal(o.record)
		if err != nil {
			return err
		}
		list = append(list, ledger.Object{Owner: ledger.Owner{Tenant: key.Tenant, Service: key.Service}, Origin: o.origin, Spec: spec})
	}
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	if err := r.d.ledger.PutObjects(ctx, list); err != nil {
		return err
	}
	maps.Copy(r.objects, objects)
	r.dirty = true
	return nil
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

func portsText(ports []lb.PortSpec) string {
	out := ""
	for i, p := range ports {
		if i > 0 {
			out += ", "
		}
		out += fmt.Sprintf("%d/%s", p.Port, p.Protocol)
	}
	return out
}

// The errors of service objects that a caller tells apart.
var (
	ErrUnknownService = errors.New("there is no such service")
	ErrDeclared       = errors.New("the service is declared in a file")
	ErrAnnounced      = errors.New("a source still announces the service")
)

// PutService makes or changes a service. The error wraps ErrDeclared, or is a
// strict.Errors for a body that cannot be used.
func (d *Daemon) PutService(ctx context.Context, key lb.Key, body []byte) (created bool, err error) {
	err = d.do(ctx, func(r *reconciler) error {
		if s := r.declared[key]; s != nil {
			return fmt.Errorf("%w: change it at %s", ErrDeclared, s.Origin)
		}
		origin := "api"
		old := r.objects[key]
		if old != nil {
			origin = cmp.Or(old.origin, origin)
		}
		obj, err := newObjectStrict(key, serviceRecord{Body: body}, origin, r.config.Model)
		if err != nil {
			return err
		}
		if err := r.store(ctx, map[lb.Key]*object{key: obj}); err != nil {
			return err
		}
		created = old == nil
		if !created {
			d.Events.Add(events.Change(events.ServiceChanged, key.Tenant, key.Service, "", "changed through the API", time.Now(), 0))
		}
		return nil
	})
	return created, err
}

func newObjectStrict(key lb.Key, rec serviceRecord, origin string, c *lb.Config) (*object, error) {
	if _, err := config.ParseService(key, rec.Body, c.DedicatedPools); err != nil {
		return nil, err
	}
	return newObject(key, rec, origin, c.DedicatedPools)
}

// DeleteService deletes a service; its addresses go into quarantine and are
// returned. The error wraps ErrUnknownService, ErrDeclared or ErrAnnounced.
func (d *Daemon) DeleteService(ctx context.Context, key lb.Key) (records []ledger.Record, err error) {
	owner := ledger.Owner{Tenant: key.Tenant, Service: key.Service}
	err = d.do(ctx, func(r *reconciler) error {
		if s := r.declared[key]; s != nil {
			return fmt.Errorf("%w: remove it at %s", ErrDeclared, s.Origin)
		}
		if r.objects[key] == nil {
			return ErrUnknownService
		}
		if g := d.aggregator.Catalog().Groups[key]; g != nil {
			return fmt.Errorf("%w: %s; deregister its %d instances first", ErrAnnounced, g.Instances[0].Origin, len(g.Instances))
		}
		if err := d.ledger.DeleteObject(ctx, owner); err != nil {
			return err
		}
		delete(r.objects, key)
		r.dirty = true
		return nil
	})
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
