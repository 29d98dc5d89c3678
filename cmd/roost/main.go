// Command roost keeps the addresses of services while their instances move: it
// is control plane, DNS server and command line in one.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes of the contract.
const (
	exitFailed      = 1
	exitNoStart     = 2
	exitUsage       = 64
	exitBadFile     = 65
	exitUnreachable = 69
	exitFindings    = 79
)

// exitError carries an exit code; a nil error says nothing more.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func exit(code int, err error) error { return &exitError{code, err} }

func usage(format string, args ...any) error { return exit(exitUsage, fmt.Errorf(format, args...)) }

func main() {
	// The first signal asks to stop, the second one ends the process.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop()
	}()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var e *exitError
	if !errors.As(err, &e) {
		e = &exitError{exitUsage, err} // cobra's own: flags, arguments, unknown verbs
	}
	if text := e.Error(); text != "" {
		fmt.Fprintln(os.Stderr, "roost: "+text)
	}
	return e.code
}

// options are the flags that all verbs have.
type options struct {
	address string
	output  string
	config  string
}

func newRoot() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use: "roost", Short: "Services migrate, their address doesn't.",
		Long:          "Roost keeps a name and an address for each service while its instances come, go and move.\nIt feeds real Envoys by xDS, answers DNS, and says why a request goes where it goes.",
		SilenceErrors: true, SilenceUsage: true, Version: version(),
	}
	root.PersistentFlags().StringVar(&o.address, "address", "", "admin API: URL, HOST:PORT or unix:PATH (default $ROOST_ADDR, else http://127.0.0.1:7480)")
	root.PersistentFlags().StringVarP(&o.output, "output", "o", "table", "table, json or yaml")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exit(exitUsage, err) })
	root.AddGroup(&cobra.Group{ID: "run", Title: "Run:"}, &cobra.Group{ID: "look", Title: "Look:"}, &cobra.Group{ID: "change", Title: "Change:"}, &cobra.Group{ID: "files", Title: "Files:"})
	add := func(group string, verbs ...*cobra.Command) {
		for _, v := range verbs {
			v.GroupID = group
			root.AddCommand(v)
		}
	}
	add("run", runVerb(o), envoyVerb(o), bootstrapVerb(o), demoVerb(o), checkVerb(o))
	add("look", statusVerb(o), servicesVerb(o), instancesVerb(o), routesVerb(o), listenersVerb(o), addressesVerb(o), explainVerb(o), resolveVerb(o), problemsVerb(o), eventsVerb(o), configVerb(o), certificatesVerb(o))
	add("change", serviceVerb(o), drainVerb(o), undrainVerb(o), addressVerb(o), discoveryVerb(o), captureVerb(o))
	add("files", validateVerb(o), translateVerb(o), schemaVerb())
	root.AddCommand(versionVerb(o))
	return root
}

// version is the module's version, or the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}

func versionVerb(o *options) *cobra.Command {
	return &cobra.Command{Use: "version", Short: "What this is", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		v := map[string]string{"version": version()}
		return o.print(cmd, v, func(t *table) { t.row("roost", v["version"]) })
	}}
}
