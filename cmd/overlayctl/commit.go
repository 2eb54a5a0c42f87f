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
	var output, image, secret string
	cmd := &cobra.Command{
		Use:   "commit VOLUME (--output FILE | --push IMAGE)",
		Short: "Write or push what was written to a volume as an image layer",
		Long: `Write what was written to a volume, as it was at one moment, to FILE: the tar of
the image layer that, above the layers of the volume, is what pods see. It has
whiteouts as the OCI image specification defines them, so that every container
runtime unpacks it. With --output - it goes to the standard output.

With --push, the driver pushes it as an image. Where the layers of the volume are one
image, that is this image with a layer more, which container runtimes run; else it is
the layer alone. A push that failed goes on when it is repeated. The login is that of
the node, or is read from the file that --secret names, a Docker config.json.

The volume has upper: claim. One that no pod uses is at rest, and may be used again
at once. One in use is copied at one moment where its backend can do that: a disk
image, or a data root on btrfs.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			write := func(to io.Writer) error { return opts.client().Layer(cmd.Context(), args[0], to) }
			switch {
			case (output == "") == (image == ""):
				return errors.New("one of --output and --push is needed: a file, or - for the standard output; or an image")
			case image != "":
				return opts.push(cmd, args[0], image, secret)
			case output == "-":
				return write(cmd.OutOrStdout())
			}
			return writeFile(output, write)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "the `file` that is written, - for the standard output")
	cmd.Flags().StringVar(&image, "push", "", "the `image` that is pushed: registry/repository:tag")
	cmd.Flags().StringVar(&secret, "secret", "", "Docker config.json `file` with the login for --push, - for the standard input")
	return cmd
}

// push pushes a volume as an image.
func (o *options) push(cmd *cobra.Command, volume, image, secret string) error {
	var config []byte
	var err error
	switch secret {
	case "":
	case "-":
		config, err = io.ReadAll(cmd.InOrStdin())
	default:
		config, err = os.ReadFile(secret)
	}
	if err != nil {
		return fmt.Errorf("read --secret: %w", err)
	}
	pushed, err := o.client().Push(cmd.Context(), volume, image, config, nil)
	if err != nil {
		return err
	}
	return o.print(cmd.OutOrStdout(), pushed, func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\n", pushed.Name, pushed.Digest) })
}

// writeFile has write write a file, which gets its name once it is complete. It writes into a pipe or a device that has the name.
func writeFile(path string, write func(io.Writer) error) (err error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(file), file.Close())
	}
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
