package main

import (
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
)

func pullCommand(opts *options) *cobra.Command {
	return &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Pull an image with the node's credentials before a pod needs it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			bars := newBars(cmd)
			image, err := opts.client().Pull(cmd.Context(), args[0], bars.update)
			bars.close(err == nil)
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), image, func(w io.Writer) {
				fmt.Fprintf(w, "%s\t%s\n", image.Names[0], image.Digest)
			})
		},
	}
}

// bars are the progress bars of a pull, one for each layer. They are drawn only if standard error is a terminal.
type bars struct {
	progress *mpb.Progress
	byLayer  map[digest.Digest]*mpb.Bar
}

func newBars(cmd *cobra.Command) *bars {
	return &bars{progress: mpb.NewWithContext(cmd.Context(), mpb.WithOutput(cmd.ErrOrStderr())), byLayer: map[digest.Digest]*mpb.Bar{}}
}

func (b *bars) update(progress api.Progress) {
	for _, layer := range progress.Layers {
		bar := b.byLayer[layer.Digest]
		if bar == nil {
			name := layer.FileName
			if name == "" {
				name = short(layer.Digest)
			}
			// The bar has one unit more than the blob has bytes, which is filled once the layer is unpacked.
			bar = b.progress.AddBar(layer.Size+1,
				mpb.PrependDecorators(decor.Name(name+" "), decor.CountersKibiByte("% .1f / % .1f")),
				mpb.AppendDecorators(decor.OnComplete(decor.Percentage(), "done")))
			b.byLayer[layer.Digest] = bar
		}
		done := layer.Done
		if layer.Present {
			done = layer.Size + 1
		}
		bar.SetCurrent(done)
	}
}

// close stops the bars, and fills them if the pull is complete.
func (b *bars) close(complete bool) {
	for _, bar := range b.byLayer {
		if complete {
			bar.SetTotal(-1, true)
		} else {
			bar.Abort(false)
		}
	}
	b.progress.Wait()
}
