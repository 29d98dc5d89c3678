package admin

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/discovery/strict"
	"github.com/roostmesh/roost/lb/ledger"
)

func (a *api) registerServices(h huma.API) {
	const path = "/api/v1/services/{tenant}/{service}"
	get(h, path, "service", "One service", a.service)
	huma.Register(h, huma.Operation{Method: http.MethodPut, Path: path, OperationID: "put-service", Summary: "Make or change a service", DefaultStatus: http.StatusOK}, a.putService)
	huma.Register(h, huma.Operation{Method: http.MethodDelete, Path: path, OperationID: "delete-service", Summary: "Delete a service", DefaultStatus: http.StatusOK}, a.deleteService)
}

// Conditions are the preconditions of RFC 9110 on a service's entity tag.
type Conditions struct {
	IfMatch     string `header:"If-Match" doc:"entity tags of a GET or PUT; the change is refused (412) when the service is no longer so"`
	IfNoneMatch string `header:"If-None-Match" doc:"*: the service must not exist yet"`
}

// condition reads the preconditions. Weak tags match nothing: If-Match compares
// strongly.
func (c *Conditions) condition() (daemon.Condition, error) {
	out := daemon.Condition{None: strings.TrimSpace(c.IfNoneMatch) == "*"}
	if c.IfNoneMatch != "" && !out.None {
		return out, huma.Error400BadRequest("If-None-Match " + c.IfNoneMatch + " is not *")
	}
	for _, tag := range strings.Split(c.IfMatch, ",") {
		if tag = strings.TrimSpace(tag); tag != "" {
			out.Match = append(out.Match, strings.Trim(tag, `"`))
		}
	}
	return out, nil
}

type serviceOutput struct {
	Status int
	ETag   string `header:"ETag"`
	Body   Service
}

func (a *api) service(ctx context.Context, id *ServiceID) (*serviceOutput, error) {
	s := a.d.Snapshot().Services.Get(id.key())
	if s == nil {
		return nil, huma.Error404NotFound("there is no service " + id.key().String())
	}
	return &serviceOutput{Status: http.StatusOK, ETag: a.tag(ctx, id), Body: serviceOf(s)}, nil
}

// tag is the entity tag of a service, quoted; "" of one that a file declares.
func (a *api) tag(ctx context.Context, id *ServiceID) string {
	return quoted(a.d.Tag(ctx, id.key()))
}

func quoted(tag string) string {
	if tag == "" {
		return ""
	}
	return `"` + tag + `"`
}

type putInput struct {
	ServiceID
	Conditions
	RawBody []byte
}

func (a *api) putService(ctx context.Context, in *putInput) (*serviceOutput, error) {
	condition, err := in.condition()
	if err != nil {
		return nil, err
	}
	created, tag, err := a.d.PutService(ctx, in.key(), in.RawBody, condition)
	if err != nil {
		return nil, refused(err)
	}
	out := &serviceOutput{Status: http.StatusOK}
	if created {
		out.Status = http.StatusCreated
	}
	s := a.d.Snapshot().Services.Get(in.key())
	if s == nil {
		return nil, huma.Error500InternalServerError("the service is gone again")
	}
	out.Body, out.ETag = serviceOf(s), quoted(tag)
	return out, nil
}

// refused turns an error of a service object into a problem document.
func refused(err error) error {
	var errs strict.Errors
	switch {
	case errors.As(err, &errs):
		details := make([]error, len(errs))
		for i, e := range errs {
			details[i] = &huma.ErrorDetail{Message: e.Message, Location: pointer(e.Path), Value: e.Place}
		}
		return huma.Error422UnprocessableEntity("the service cannot be made from this body", details...)
	case errors.Is(err, daemon.ErrDeclared), errors.Is(err, daemon.ErrAnnounced):
		return huma.Error409Conflict(err.Error())
	case errors.Is(err, daemon.ErrChanged):
		return huma.Error412PreconditionFailed(err.Error())
	case errors.Is(err, daemon.ErrUnknownService):
		return huma.Error404NotFound(err.Error())
	}
	return huma.Error503ServiceUnavailable(err.Error())
}

// pointer writes ports[0].port as the JSON pointer /ports/0/port.
func pointer(path string) string {
	return "/" + strings.NewReplacer("[", "/", "]", "", ".", "/").Replace(path)
}

type deleteInput struct {
	ServiceID
	Conditions
}

func (a *api) deleteService(ctx context.Context, in *deleteInput) (*body[Address], error) {
	condition, err := in.condition()
	if err != nil {
		return nil, err
	}
	records, err := a.d.DeleteService(ctx, in.key(), condition)
	if err != nil {
		return nil, refused(err)
	}
	for _, r := range records {
		if r.Kind == ledger.Internal {
			return &body[Address]{addressOf(r)}, nil
		}
	}
	return &body[Address]{Address{Tenant: in.Tenant, Service: in.Service, Holders: []string{}}}, nil
}
