package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

func imagesCommand(opts *options) *cobra.Command {
	return &cobra.Command{
		Use:   "images",
		Short: "List the images and archives whose layers are on this node",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			images, err := opts.client().Images(cmd.Context())
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), images, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tDIGEST\tLAYERS\tPLATFORM\tAGE")
				for _, image := range images {
					platform := image.Platform
					if platform == "" {
						platform = "-"
					}
					fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", strings.Join(image.Names, ","), short(image.Digest), len(image.Layers), platform,
						age(image.Pulled))
				}
			})
		},
	}
}
