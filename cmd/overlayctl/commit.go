package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func commitCommand(opts *options) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "commit VOLUME --output FILE",
		Short: "Write what was written to a volume as the tar of an image layer",
		Long: `Write what was written to a volume, as it was at one moment, to FILE: the tar of
the image layer that, above the layers of the volume, is what pods see. It has
whiteouts as the OCI image specification defines them, so that every container
runtime unpacks it. With --output - it goes to the standard output.

The volume has upper: claim. One that no pod uses is at rest, and may be used again
at once. One in use is copied at one moment where its backend can do that: a disk
image, or a data root on btrfs.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			write := func(to io.Writer) error { return opts.client().Layer(cmd.Context(), args[0], to) }
			switch output {
			case "":
				return errors.New("--output is missing: name the file, or - for the standard output")
			case "-":
				return write(cmd.OutOrStdout())
			}
			return writeFile(output, write)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "the `file` that is written, - for the standard output")
	return cmd
}

// writeFile has write write a file, which gets its name once it is complete.
func writeFile(path string, write func(io.Writer) error) (err error) {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(file.Name()))
		}
	}()
	if err := errors.Join(write(file), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}
