package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
)

func snapshotsCommand(opts *options) *cobra.Command {
	return &cobra.Command{
		Use:   "snapshots",
		Short: "List the snapshots on this node with their source, size, age, state and volumes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			snapshots, err := opts.client().Snapshots(cmd.Context())
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), snapshots, func(w io.Writer) {
				fmt.Fprintln(w, "SNAPSHOT\tSOURCE\tSIZE\tAGE\tSTATE\tVOLUMES")
				for _, s := range snapshots {
					writeSnapshot(w, s)
				}
			})
		},
	}
}

func writeSnapshot(w io.Writer, s api.Snapshot) {
	source, size, since, users := "-", "-", "-", "-"
	if s.Volume != "" {
		source, since = s.Volume, age(s.Created)
	}
	if s.SizeBytes > 0 {
		size = humanize.IBytes(uint64(s.SizeBytes))
	}
	if len(s.Volumes) > 0 {
		users = strings.Join(s.Volumes, ",")
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, source, size, since, s.State, users)
}
