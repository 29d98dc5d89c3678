package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/cmd/internal/demo"
)

func demoVerb(o *options) *cobra.Command {
	var headless bool
	var duration time.Duration
	c := &cobra.Command{Use: "demo", Short: "The main job live on loopback, with a real Envoy, in a minute", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		talk := cmd.ErrOrStderr()
		program, err := os.Executable()
		if err != nil {
			return exit(exitFailed, err)
		}
		found, err := binaries.FindEnvoy(cmd.Context(), binaries.EnvoyOptions{Talk: talk})
		if err != nil {
			return exit(exitFailed, err)
		}
		c := demo.Config{Program: program, Envoy: found.Path, Version: found.Version, Talk: talk, Commands: cmd.OutOrStdout(), Stay: cmd.Flags().Changed("duration"), Duration: duration}
		asJSON := o.output == "json"
		if asJSON {
			c.Commands = talk
		} else if !headless {
			c.Talk = cmd.OutOrStdout()
		}
		if headless {
			c.Commands = nil
		}
		result, err := demo.Run(cmd.Context(), c)
		if err != nil && !errors.Is(err, context.Canceled) {
			return exit(exitFailed, err)
		}
		if asJSON || headless {
			if _, err := cmd.OutOrStdout().Write(result.JSON()); err != nil {
				return exit(exitFailed, err)
			}
		}
		if !result.OK {
			return exit(exitFailed, errors.New("not every promise held"))
		}
		return nil
	}}
	c.Flags().BoolVar(&headless, "headless", false, "for scripts: one line of JSON on stdout at the end")
	c.Flags().DurationVar(&duration, "duration", 0, "stay this long after the steps; 0 stays until Ctrl-C")
	return c
}
