package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	sdaemon "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/roostmesh/roost/cmd/internal/admin"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/cmd/internal/host"
	"github.com/roostmesh/roost/xds/envoy"
)

const (
	// readyWait bounds how long the ready line waits for sources.
	readyWait = 3 * time.Second
	readyPoll = 5 * time.Millisecond
)

func runVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "run", Short: "Control plane, DNS, certificates and admin API in the foreground", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return serve(cmd.Context(), o.config, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}}
	c.Flags().StringVar(&o.config, "config", "", "config file (default $ROOST_CONFIG, ./roost.yaml, /etc/roost/roost.yaml)")
	return c
}

// loadHere reads the config of this host: a node name that the file does not
// say comes from the Consul agent.
func loadHere(ctx context.Context, path string) (*config.Config, error) {
	c, err := config.LoadOn(config.Find(path), daemon.NodeName(ctx))
	if err != nil {
		return nil, exit(exitBadFile, err)
	}
	return c, nil
}

// load reads the config; mistakes are exit code 65, all of them on stderr.
func load(path string) (*config.Config, error) {
	c, err := config.Load(config.Find(path))
	if err != nil {
		return nil, exit(exitBadFile, err)
	}
	return c, nil
}

func logger(c config.Log, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

func serve(ctx context.Context, path string, out, talk io.Writer) error {
	c, err := loadHere(ctx, path)
	if err != nil {
		return err
	}
	log := logger(c.Log, talk)
	d, err := daemon.New(ctx, c, log)
	if err != nil {
		return exit(exitNoStart, err)
	}
	defer d.Close()
	tcp, unix, err := daemon.ListenAdmin(ctx, c)
	if err != nil {
		return exit(exitNoStart, err)
	}
	handler := admin.New(d, version(), log)
	work, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() { leave(work, d, log); end() })()
	group, ctx := errgroup.WithContext(work)
	group.Go(func() error { return d.Run(ctx) })
	group.Go(func() error { return admin.Serve(ctx, handler, log, tcp, unix) })
	group.Go(func() error { return host.Guard(ctx, c, d.Snapshot, envoy.CapturePort, log, d.SetHostProblems) })
	group.Go(func() error {
		announce(ctx, d, tcp, out, log)
		return nil
	})
	err = group.Wait()
	if err != nil && !errors.Is(err, context.Canceled) {
		return exit(exitFailed, err)
	}
	return nil
}

// leaveFor is how long a Roost that stops still serves, while it says that it is
// not ready any more: for who asks that before sending somebody here.
const leaveFor = 200 * time.Millisecond

// leave says that this Roost is about to stop.
func leave(ctx context.Context, d *daemon.Daemon, log *slog.Logger) {
	if _, err := sdaemon.SdNotify(false, sdaemon.SdNotifyStopping); err != nil {
		log.Debug("service manager was not told of the stop", "error", err)
	}
	d.Leave()
	select {
	case <-time.After(leaveFor):
	case <-ctx.Done():
	}
}

// announce says on stdout, once, that Roost is ready and where. Sources that do
// not answer hold it up for a moment only: what is known is served without them.
func announce(ctx context.Context, d *daemon.Daemon, tcp net.Listener, out io.Writer, log *slog.Logger) {
	deadline := time.NewTimer(readyWait)
	defer deadline.Stop()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
wait:
	for len(d.NotReady()) > 0 {
		select {
		case <-ctx.Done():
			return
		case <-deadline.C:
			for _, w := range d.NotReady() {
				log.Warn("not ready, serving what is known", "what", w.What, "why", w.Why)
			}
			break wait
		case <-tick.C:
		}
	}
	xdsAt, dnsAt := d.Sockets()
	if _, err := fmt.Fprintf(out, "roost ready admin=%s xds=%s dns=%s\n", tcp.Addr(), xdsAt, dnsAt); err != nil {
		log.Debug("the ready line could not be written", "error", err)
	}
	if _, err := sdaemon.SdNotify(false, sdaemon.SdNotifyReady); err != nil {
		log.Warn("service manager was not told", "error", err)
	}
}

func validateVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "validate", Short: "All mistakes of a config file", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		path := config.Find(o.config)
		c, err := load(path)
		if err != nil {
			return err
		}
		if path == "" {
			path = "the embedded default"
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: ok, %d services, %d listeners, %d routes\n", path, len(c.Model.Services), len(c.Model.Listeners), len(c.Model.Routes))
		return err
	}}
	c.Flags().StringVar(&o.config, "config", "", "config file (default as for run)")
	return c
}

func schemaVerb() *cobra.Command {
	return &cobra.Command{Use: "schema", Short: "JSON Schema of the config file", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		_, err := os.Stdout.Write(config.Schema())
		return err
	}}
}
