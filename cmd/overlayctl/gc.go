package main

import (
	"fmt"
	"io"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func gcCommand(opts *options) *cobra.Command {
	var dryRun, all bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove caches and layers that no volume uses if disk usage is above the high threshold",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			result, err := opts.client().GC(cmd.Context(), dryRun, all)
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), result, func(w io.Writer) {
				for _, layer := range result.Layers {
					fmt.Fprintf(w, "%s\t%s\tlast used %s ago\n", short(layer.DiffID), humanize.IBytes(uint64(layer.Bytes)), age(layer.LastUsed))
				}
				for _, id := range result.Unreadable {
					fmt.Fprintf(w, "volume %s\tits record is damaged or missing: layers that may be its were left\n", id)
				}
				verb := "removed"
				if dryRun {
					verb = "would be removed"
				}
				if result.Caches > 0 {
					fmt.Fprintf(w, "caches, %s %s\n", humanize.IBytes(uint64(result.Caches)), verb)
				}
				fmt.Fprintf(w, "%d layers, %s %s\n", len(result.Layers), humanize.IBytes(uint64(result.Bytes)), verb)
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only print what would be removed")
	cmd.Flags().BoolVar(&all, "all", false, "remove all layers that may be collected, whatever the disk usage")
	return cmd
}
