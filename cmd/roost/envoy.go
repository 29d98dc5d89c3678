package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/host"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
	"github.com/roostmesh/roost/xds/proxyless"
)

// drainSeconds is how long Envoy lets connections of a removed listener live.
const drainSeconds = 30

// proxyFlags say which proxy an Envoy is, and where its control plane is.
type proxyFlags struct {
	sidecar, node, gateway, grpc, xds, config, admin string
}

func (f *proxyFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.sidecar, "sidecar", "", "TENANT/SERVICE/ID[@NODE]: beside this instance")
	c.Flags().StringVar(&f.node, "node", "", "HOST: for every caller on this host")
	c.Flags().StringVar(&f.gateway, "gateway", "", "GROUP[/MEMBER]: public listeners and dedicated IPs")
	c.Flags().StringVar(&f.grpc, "grpc", "", "TENANT/SERVICE/ID[@NODE]: this instance's own gRPC library, without an Envoy (bootstrap only)")
	c.Flags().StringVar(&f.xds, "xds", "", "control plane: HOST:PORT or unix:PATH (default: from --config, else "+config.DefaultXDS+")")
	c.Flags().StringVar(&f.config, "config", "", "config file, for the control plane's address and this host's name")
	c.Flags().StringVar(&f.admin, "admin", "", "Envoy's admin interface: unix:PATH or IP:PORT on loopback (default: a private unix socket; for bootstrap 127.0.0.1:0)")
}

// loadConfig reads the config where one is named or found; a proxy needs none.
func (f *proxyFlags) loadConfig(ctx context.Context) (*config.Config, error) {
	return loadHere(ctx, f.config)
}

func (f *proxyFlags) identity(c *config.Config) (lb.Identity, error) {
	set := 0
	for _, s := range []string{f.sidecar, f.node, f.gateway, f.grpc} {
		if s != "" {
			set++
		}
	}
	if set != 1 {
		return lb.Identity{}, usage("say which proxy this is: one of --sidecar TENANT/SERVICE/ID[@NODE], --node HOST, --gateway GROUP[/MEMBER], --grpc TENANT/SERVICE/ID[@NODE]")
	}
	switch {
	case f.node != "":
		return lb.Identity{Role: lb.Node, Node: f.node}, nil
	case f.gateway != "":
		group, member, _ := strings.Cut(f.gateway, "/")
		if member == "" {
			member = c.Model.Node
		}
		if group == "" {
			return lb.Identity{}, usage("--gateway %q is not GROUP[/MEMBER]", f.gateway)
		}
		return lb.Identity{Role: lb.Gateway, Group: group, Member: member}, nil
	}
	if f.grpc != "" {
		return besides(lb.Proxyless, "--grpc", f.grpc)
	}
	return besides(lb.Sidecar, "--sidecar", f.sidecar)
}

// besides is the identity of a proxy that acts for one instance.
func besides(role lb.Role, flag, instance string) (lb.Identity, error) {
	parts := strings.SplitN(instance, "/", 3)
	if len(parts) != 3 || slices.Contains(parts, "") {
		return lb.Identity{}, usage("%s %q is not TENANT/SERVICE/ID[@NODE]", flag, instance)
	}
	id, node := parts[2], ""
	if i := strings.LastIndexByte(id, '@'); i > 0 {
		id, node = id[:i], id[i+1:]
	}
	return lb.Identity{Role: role, Tenant: parts[0], Service: parts[1], Instance: id, Node: node}, nil
}

func (f *proxyFlags) control(c *config.Config) string {
	if f.xds != "" {
		return strings.Replace(f.xds, "localhost:", "127.0.0.1:", 1)
	}
	return c.XDS.Address.String()
}

func bootstrapVerb(*options) *cobra.Command {
	var f proxyFlags
	c := &cobra.Command{Use: "bootstrap", Short: "The bootstrap of an Envoy, or of a gRPC client, as JSON on stdout", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := f.loadConfig(cmd.Context())
		if err != nil {
			return err
		}
		id, err := f.identity(c)
		if err != nil {
			return err
		}
		if id.Role == lb.Proxyless {
			return f.grpcBootstrap(cmd.OutOrStdout(), id, c)
		}
		at := f.admin
		metadata := map[string]string{}
		if at == "" {
			at = "127.0.0.1:0"
		} else {
			metadata[envoy.MetadataAdmin] = at
		}
		data, err := envoy.Bootstrap(envoy.BootstrapOptions{Identity: id, XDS: f.control(c), Admin: at, Metadata: metadata})
		if err != nil {
			return exit(exitUsage, err)
		}
		_, err = cmd.OutOrStdout().Write(data)
		return err
	}}
	f.add(c)
	return c
}

// grpcBootstrap prints what GRPC_XDS_BOOTSTRAP is to name.
func (f *proxyFlags) grpcBootstrap(out io.Writer, id lb.Identity, c *config.Config) error {
	if f.admin != "" {
		return usage("--admin is Envoy's: a gRPC client has no admin interface")
	}
	data, err := proxyless.Bootstrap(id, f.control(c))
	if err != nil {
		return exit(exitUsage, err)
	}
	_, err = out.Write(data)
	return err
}

func envoyVerb(*options) *cobra.Command {
	var f proxyFlags
	var path string
	c := &cobra.Command{Use: "envoy [-- ENVOY ARGS]", Short: "Find, bootstrap and run an Envoy in the foreground", RunE: func(cmd *cobra.Command, args []string) error {
		return runEnvoy(cmd.Context(), f, path, args, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}}
	f.add(c)
	c.Flags().StringVar(&path, "envoy", "", "the Envoy to run (default $ROOST_ENVOY, envoy on PATH, else it is downloaded)")
	return c
}

func runEnvoy(ctx context.Context, f proxyFlags, path string, extra []string, out, talk io.Writer) error {
	if f.grpc != "" {
		return usage("--grpc is for an application that needs no Envoy: roost bootstrap --grpc %s > bootstrap.json, and start it with GRPC_XDS_BOOTSTRAP=bootstrap.json", f.grpc)
	}
	c, err := f.loadConfig(ctx)
	if err != nil {
		return err
	}
	id, err := f.identity(c)
	if err != nil {
		return err
	}
	program, err := binaries.FindEnvoy(ctx, binaries.EnvoyOptions{Path: path, Talk: talk})
	if err != nil {
		return exit(exitFailed, err)
	}
	log := logger(c.Log, talk)
	at := f.admin
	if at == "" {
		dir, err := os.MkdirTemp("", "roost-")
		if err != nil {
			return exit(exitFailed, err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		at = "unix:" + filepath.Join(dir, "envoy.sock")
	}
	fds, err := binaries.RaiseFileLimit()
	if err != nil {
		log.Warn("the limit of open files stays as it is", "error", err)
	}
	data, err := envoy.Bootstrap(envoy.BootstrapOptions{Identity: id, XDS: f.control(c), Admin: at, Metadata: map[string]string{
		envoy.MetadataAdmin: at, envoy.MetadataFDs: strconv.FormatUint(fds, 10), envoy.MetadataWorker: strconv.Itoa(workers(extra)),
	}})
	if err != nil {
		return exit(exitUsage, err)
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1)
	defer signal.Stop(signals)
	s, err := binaries.NewSupervisor(binaries.SupervisorConfig{
		Path: program.Path, Bootstrap: data, Stdout: out, Stderr: talk, Logger: log, Signals: signals, AmbientCaps: true, ExtraArgs: extra,
		Args: []string{"--log-level", "warning", "--drain-time-s", strconv.Itoa(drainSeconds), "--drain-strategy", "immediate"},
	})
	if err != nil {
		return exit(exitFailed, err)
	}
	host.InstallGuard(guardOf(c, id), log)
	if err := s.Run(ctx); err != nil {
		return exit(exitFailed, fmt.Errorf("envoy: %w", err))
	}
	return nil
}

// guardOf are the rules for the namespace of this Envoy.
func guardOf(c *config.Config, id lb.Identity) host.Rules {
	r := host.RulesFor(c, envoy.CapturePort)
	if id.Role == lb.Sidecar { // a gateway is beside the node proxy of its host
		r.Capture, r.Everybody = 0, false
	}
	if id.Role == lb.Sidecar && c.Model.CaptureSidecar != lb.CaptureBind {
		r.Capture = envoy.CapturePort
	}
	return r
}

// workers is the concurrency that Envoy will run with.
func workers(args []string) int {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--concurrency="); ok {
			a, args = "--concurrency", append(slices.Clone(args[:i+1]), v)
		}
		if a == "--concurrency" && i+1 < len(args) {
			if n, err := strconv.Atoi(args[i+1]); err == nil && n > 0 {
				return n
			}
		}
	}
	return runtime.NumCPU()
}
