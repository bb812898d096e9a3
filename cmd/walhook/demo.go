package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func demoCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Play the whole thing on a throwaway Postgres, with two receivers and a producer",
		RunE:  func(*cobra.Command, []string) error { return errors.New("not written yet") },
	}
}
