package main

import "github.com/spf13/cobra"

func checkVerb(*options) *cobra.Command { return &cobra.Command{Use: "check"} }
