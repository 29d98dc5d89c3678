package main

import "github.com/spf13/cobra"

func demoVerb(*options) *cobra.Command  { return &cobra.Command{Use: "demo"} }
func checkVerb(*options) *cobra.Command { return &cobra.Command{Use: "check"} }
