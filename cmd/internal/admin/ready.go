package admin

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/roostmesh/roost/cmd/internal/daemon"
)

// Ready is whether every source has answered once.
type Ready struct {
	Ready    bool             `json:"ready"`
	NotReady []daemon.Waiting `json:"not_ready"`
	// Verbose is there when it was asked for.
	Verbose *ReadyDetail `json:"verbose,omitempty"`
}

// ReadyDetail is the state of what readiness depends on, and of what is held.
type ReadyDetail struct {
	Sources  []Source         `json:"sources"`
	Held     int              `json:"held" doc:"instances kept although their source lost them"`
	Degraded []daemon.Waiting `json:"degraded" doc:"what works with its last good state"`
}

type readyInput struct{ verbose bool }

// Resolve implements huma.Resolver: ?verbose needs no value.
func (in *readyInput) Resolve(ctx huma.Context) []error {
	u := ctx.URL()
	in.verbose = u.Query().Has("verbose")
	return nil
}

type readyOutput struct {
	Status int
	Body   Ready
}

func (a *api) readyz(_ context.Context, in *readyInput) (*readyOutput, error) {
	waiting := a.d.NotReady()
	out := &readyOutput{Status: http.StatusOK, Body: Ready{Ready: len(waiting) == 0, NotReady: waiting}}
	if !out.Body.Ready {
		out.Status = http.StatusServiceUnavailable
	}
	if s := a.d.Snapshot(); in.verbose && s != nil {
		detail := &ReadyDetail{Sources: []Source{}, Degraded: a.d.Degraded()}
		for _, src := range s.Catalog.Sources {
			detail.Sources = append(detail.Sources, sourceOf(src))
			detail.Held += src.Held
		}
		out.Body.Verbose = detail
	}
	return out, nil
}
