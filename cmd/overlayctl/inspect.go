package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
)

func inspectCommand(opts *options) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect [VOLUME...]",
		Short: "Show volumes as JSON (default all)",
		RunE: func(cmd *cobra.Command, ids []string) error {
			client := opts.client()
			if len(ids) == 0 {
				var err error
				if ids, err = client.Volumes(cmd.Context()); err != nil {
					return err
				}
			}
			volumes := []api.Volume{}
			for _, id := range ids {
				description, err := client.Volume(cmd.Context(), id)
				if err != nil {
					return err
				}
				volumes = append(volumes, description)
			}
			encoder := json.NewEncoder(cmd.OutOrStdout())
			encoder.SetIndent("", "  ")
			return encoder.Encode(volumes)
		},
	}
}
