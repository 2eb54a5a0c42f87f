package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"
)

func layersCommand(opts *options) *cobra.Command {
	return &cobra.Command{
		Use:   "layers",
		Short: "List the layers on this node with their size, age and volumes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			layers, err := opts.client().Layers(cmd.Context())
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), layers, func(w io.Writer) {
				fmt.Fprintln(w, "DIFF ID\tSIZE\tENTRIES\tAGE\tLAST USED\tVOLUMES")
				for _, layer := range layers {
					users := "-"
					if len(layer.Volumes) > 0 {
						users = strings.Join(layer.Volumes, ",")
					}
					fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\n", short(layer.DiffID), humanize.IBytes(uint64(layer.Bytes)), layer.Entries,
						age(layer.Created), age(layer.LastUsed), users)
				}
			})
		},
	}
}

// short abbreviates a digest for tables.
func short(id digest.Digest) string { return id.Algorithm().String() + ":" + id.Encoded()[:16] }

func age(since time.Time) string { return duration.HumanDuration(time.Since(since)) }
