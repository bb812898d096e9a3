package main

import "github.com/spf13/cobra"

func checkCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Look at the database, the config and the endpoints; say what is wrong and what mends it",
		RunE:  func(cmd *cobra.Command, _ []string) error { _, err := o.load(); return err },
	}
}
