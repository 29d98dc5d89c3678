package host

import (
	"context"
	"log/slog"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/lb"
)

func Guard(ctx context.Context, c *config.Config, log *slog.Logger, problems func([]lb.Problem)) error {
	<-ctx.Done()
	return nil
}
func InstallGuard(c *config.Config, log *slog.Logger) {}
