package main

import "github.com/spf13/cobra"

func initCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Print the SQL that a DBA runs once (role, grants, publication, schema); --apply runs it",
		RunE:  func(cmd *cobra.Command, _ []string) error { _, err := o.load(); return err },
	}
}
