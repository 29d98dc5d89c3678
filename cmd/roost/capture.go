package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/internal/config"
	"github.com/roostmesh/roost/cmd/internal/host"
	"github.com/roostmesh/roost/xds/envoy"
)

// captureVerb puts the host's rules and the pool's route in place by hand, and
// takes them away again: `roost run` keeps them, and leaves them when it ends.
func captureVerb(o *options) *cobra.Command {
	c := &cobra.Command{Use: "capture", Short: "The host's rules and route for service addresses: install, remove"}
	verb := func(use, short string, do func(*config.Config) error) *cobra.Command {
		var dry bool
		v := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(o.config)
			if err != nil {
				return err
			}
			if dry {
				_, err := fmt.Fprint(cmd.OutOrStdout(), host.Describe(c, envoy.CapturePort, use == "remove"))
				return err
			}
			if err := do(c); err != nil {
				return exit(exitFailed, err)
			}
			return nil
		}}
		v.Flags().StringVar(&o.config, "config", "", "config file (default as for run)")
		v.Flags().BoolVar(&dry, "dry-run", false, "only show the commands that would do it")
		return v
	}
	c.AddCommand(
		verb("install", "Put them in place", func(c *config.Config) error {
			err := host.Install(host.RulesFor(c, envoy.CapturePort))
			for _, p := range host.RoutedPools(c) {
				err = errors.Join(err, host.KeepRoute(p))
			}
			return err
		}),
		verb("remove", "Take them away; only when no Envoy of Roost runs here any more", func(c *config.Config) error {
			err := host.Remove(host.RulesFor(c, envoy.CapturePort))
			for _, p := range host.RoutedPools(c) {
				err = errors.Join(err, host.DropRoute(p))
			}
			return err
		}),
	)
	return c
}
