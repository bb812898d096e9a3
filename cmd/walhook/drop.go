package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/walhook/walhook/cdc"
)

func dropSlotCommand(o *options) *cobra.Command {
	wait := 30 * time.Second
	cmd := &cobra.Command{
		Use:   "drop-slot",
		Short: "Drop the slot and publications when walhook goes for good",
		Long: `Drops the replication slot of the configuration, which keeps WAL for as long as nobody reads from it,
and, where cdc.create is true, the publications that its role may drop. It is for when walhook goes for
good: what is committed from then on is not kept for it. Stop walhook first; a slot that somebody holds is
waited for, and stays. The schema walhook, with what is parked and dead, stays too.

A walhook that starts again afterwards asks what to do about the events in between.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait < 0 {
				return usageError{fmt.Errorf("--wait %s: want 0 or more", wait)}
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			return dropForGood(cmd.Context(), cfg, wait, cmd.OutOrStdout())
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", wait, "how long to wait for whoever holds the slot")
	return cmd
}

func dropForGood(ctx context.Context, cfg *Config, wait time.Duration, out io.Writer) error {
	stream := streamConfig(cfg, func() (string, error) { return cfg.Database.Replication().Reveal(), nil }, nil)
	dropped, err := cdc.DropSlot(ctx, stream, wait)
	var fault *cdc.Fault
	switch {
	case errors.As(err, &fault):
		fmt.Fprintf(out, "✗ slot %s: %s\n", stream.Slot, fault.Cause())
		if fault.Remedy != "" {
			fmt.Fprintf(out, "    %s\n", fault.Remedy)
		}
		code := exitFailed
		if fault.Config {
			code = exitUsage
		}
		return failed{errors.New("the slot was not dropped"), code}
	case err != nil:
		return err
	case dropped:
		fmt.Fprintf(out, "✓ slot %s: dropped\n", stream.Slot)
	default:
		fmt.Fprintf(out, "- slot %s: there is none\n", stream.Slot)
	}
	names := []string{stream.Publication, stream.Mirror.Publication}
	if !cfg.CDC.Create { // then somebody else made them
		for _, name := range names {
			fmt.Fprintf(out, "- publication %s: kept, cdc.create is false; it keeps no WAL. Its owner may: %s\n", name, cdc.DropPublicationSQL(name))
		}
	} else {
		gone, kept, err := cdc.DropPublications(ctx, stream, names...)
		for _, name := range gone {
			fmt.Fprintf(out, "✓ publication %s: dropped\n", name)
		}
		for _, name := range kept {
			fmt.Fprintf(out, "- publication %s: kept, it is not this role's; it keeps no WAL. Its owner may: %s\n", name, cdc.DropPublicationSQL(name))
		}
		if err != nil {
			return err
		}
	}
	fmt.Fprintln(out, "- schema walhook: kept, with the deliveries that are parked or dead; when nobody needs them: drop schema walhook cascade")
	return nil
}
