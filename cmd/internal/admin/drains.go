package admin

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/cmd/internal/drain"
)

func (a *api) registerDrains(h huma.API) {
	huma.Register(h, huma.Operation{Method: http.MethodPost, Path: "/api/v1/instances/{id}/drain", OperationID: "drain", Summary: "Take an instance out of service; answers when every proxy has let go of it, or when its time is over"}, a.drain)
	huma.Register(h, huma.Operation{Method: http.MethodPost, Path: "/api/v1/instances/{id}/undrain", OperationID: "undrain", Summary: "Put an instance back into service"}, a.undrain)
}

type drainInput struct {
	ID      string  `path:"id" doc:"tenant/service/id[@node], or a bare id where that is unique"`
	Timeout float64 `query:"timeout" minimum:"0" doc:"seconds; default: the service's drain.timeout"`
}

func (a *api) drain(ctx context.Context, in *drainInput) (*body[drain.Result], error) {
	result, err := a.d.Drain(ctx, unescape(in.ID), time.Duration(in.Timeout*float64(time.Second)))
	if err != nil {
		return nil, notDrained(err)
	}
	return &body[drain.Result]{result}, nil
}

// Undrained says which instance is back.
type Undrained struct {
	Instance string `json:"instance"`
}

func (a *api) undrain(ctx context.Context, in *struct {
	ID string `path:"id"`
}) (*body[Undrained], error) {
	name, err := a.d.Undrain(ctx, unescape(in.ID))
	if err != nil {
		return nil, notDrained(err)
	}
	return &body[Undrained]{Undrained{name}}, nil
}

// ambiguous is the problem document of a name that several instances have.
type ambiguous struct {
	*huma.ErrorModel
	Candidates []string `json:"candidates"`
}

func notDrained(err error) error {
	var many *daemon.AmbiguousError
	switch {
	case errors.As(err, &many):
		return &ambiguous{&huma.ErrorModel{Title: http.StatusText(http.StatusConflict), Status: http.StatusConflict, Detail: err.Error()}, many.Candidates}
	case errors.Is(err, daemon.ErrUnknownInstance):
		return huma.Error404NotFound(err.Error())
	case errors.Is(err, daemon.ErrNotDraining), errors.Is(err, drain.ErrGivenUp):
		return huma.Error409Conflict(err.Error())
	}
	return huma.Error503ServiceUnavailable(err.Error())
}
