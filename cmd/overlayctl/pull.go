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

// bars are the progress bars of a pull, one for each layer, or the one of a push. They are drawn only if standard error is a terminal.
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
			bar = b.add(name, layer.Digest, layer.Size+1)
		}
		done := layer.Done
		if layer.Present {
			done = layer.Size + 1
		}
		bar.SetCurrent(done)
	}
}

// pushed shows the progress of a push, from when the size of the image is known. A registry that loses what it had gets it again.
func (b *bars) pushed(progress api.PushProgress) {
	if progress.Total == 0 {
		return
	}
	bar := b.byLayer[""]
	if bar == nil {
		// The unit more is filled once the image has its tag.
		bar = b.add("push", "", progress.Total+1)
	}
	bar.SetCurrent(progress.Sent)
}

func (b *bars) add(name string, id digest.Digest, size int64) *mpb.Bar {
	bar := b.progress.AddBar(size,
		mpb.PrependDecorators(decor.Name(name+" "), decor.CountersKibiByte("% .1f / % .1f")),
		mpb.AppendDecorators(decor.OnComplete(decor.Percentage(), "done")))
	b.byLayer[id] = bar
	return bar
}

// close stops the bars, and fills them if all is done.
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
