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
		Short: "Remove layers that no volume uses, if the disk is fuller than the high mark",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			collected, err := opts.client().Collect(cmd.Context(), dryRun, all)
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), collected, func(w io.Writer) {
				for _, layer := range collected.Layers {
					fmt.Fprintf(w, "%s\t%s\tlast used %s ago\n", short(layer.DiffID), humanize.IBytes(uint64(layer.Bytes)), age(layer.LastUsed))
				}
				verb := "removed"
				if dryRun {
					verb = "would be removed"
				}
				fmt.Fprintf(w, "%d layers, %s %s\n", len(collected.Layers), humanize.IBytes(uint64(collected.Bytes)), verb)
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "remove nothing, and say what would be removed")
	cmd.Flags().BoolVar(&all, "all", false, "however full the disk is")
	return cmd
}
