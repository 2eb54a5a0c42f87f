package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
)

func rebaseCommand(opts *options) *cobra.Command {
	var layers []string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "rebase --dry-run VOLUME --layers REFERENCE...",
		Short: "List the conflicts of a claim that is made from a volume with other layers",
		Long: `List the conflicts that a claim made from a volume would have with other layers, one
a line: what the volume did to the entry of its layers, what the other layers did (A
added, C changed, D deleted), and its path. Without conflicts nothing is printed.

The layers are named as in a StorageClass, the topmost first, separated by commas or
by one --layers for each. Images are pulled with the node's login.

Nothing is rebased: a volume stays on its layers. Create a claim with the volume as
its dataSource. The volume may be in use, and a pod that mounts or unmounts it ends
the list.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case !dryRun:
				return errors.New("a volume stays on its layers: write --dry-run, or create a claim with the volume as its dataSource")
			case len(layers) == 0:
				return errors.New("--layers is needed: the layers that the claim is to have")
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			encoder := json.NewEncoder(out)
			err := opts.client().Rebase(cmd.Context(), args[0], layers, func(conflict api.Conflict) error {
				if opts.output == "json" {
					return encoder.Encode(conflict)
				}
				path := conflict.Path
				if conflict.RawPath != nil {
					path = string(conflict.RawPath)
				}
				_, err := fmt.Fprintf(out, "%s %s %s\n", conflict.Upper, conflict.Layers, printable("/"+path))
				return err
			})
			if flushed := out.Flush(); err == nil {
				err = flushed
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only list the conflicts, which is all that the command does")
	cmd.Flags().StringSliceVar(&layers, "layers", nil, "the `references` of the layers, the topmost first")
	return cmd
}
