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
	var output, format, name, image, secret string
	cmd := &cobra.Command{
		Use:   "commit VOLUME (--output FILE | --push IMAGE)",
		Short: "Write or push what was written to a volume as an image layer",
		Long: `Write what was written to a volume, as it was at one moment, to FILE: the tar of
the image layer that, above the layers of the volume, is what pods see. It has
whiteouts as the OCI image specification defines them, so that every container
runtime unpacks it. With --output - it goes to the standard output.

With --format oci, FILE is an OCI archive of an image, which "ctr image import",
"docker load", "skopeo copy oci-archive:" and archive:// of this driver read. --name
is what it calls the image. With --push, the driver pushes the image.

Where the layers of the volume are one image, the image is that one with a layer
more, which container runtimes run; the layers below are read from its registry. Else
it is the layer alone, with the references of the layers as an annotation. A push
that failed goes on when it is repeated. The login is that of the node, or is read
from the file that --secret names, a Docker config.json.

The volume has upper: claim. One that no pod uses is at rest, and may be used again
at once. One in use is copied at one moment where its backend can do that: a disk
image, or a data root on btrfs.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case (output == "") == (image == ""):
				return errors.New("one of --output and --push is needed: a file, or - for the standard output; or an image")
			case format != "layer" && format != "oci":
				return fmt.Errorf("--format %q: the formats are layer and oci", format)
			case name != "" && (format != "oci" || image != ""):
				return errors.New("--name is for --output with --format oci")
			case secret != "" && format != "oci" && image == "":
				return errors.New("--secret is for --push, and for --output with --format oci")
			}
			config, err := readSecret(cmd, secret)
			if err != nil {
				return err
			}
			if image != "" {
				return opts.push(cmd, args[0], image, config)
			}
			write := func(to io.Writer) error { return opts.client().Layer(cmd.Context(), args[0], to) }
			if format == "oci" {
				write = func(to io.Writer) error { return opts.client().Archive(cmd.Context(), args[0], name, config, to) }
			}
			if output == "-" {
				return write(cmd.OutOrStdout())
			}
			return writeFile(output, write)
		},
	}
	cmd.Flags().StringVar(&format, "format", "layer", "what --output writes: the tar of a layer (layer), or an OCI archive (oci)")
	cmd.Flags().StringVar(&name, "name", "", "the `name` that an OCI archive gives the image: repository:tag")
	cmd.Flags().StringVarP(&output, "output", "o", "", "the `file` that is written, - for the standard output")
	cmd.Flags().StringVar(&image, "push", "", "the `image` that is pushed: registry/repository:tag")
	cmd.Flags().StringVar(&secret, "secret", "", "Docker config.json `file` with the login for registries, - for the standard input")
	return cmd
}

// readSecret reads the file with the login for registries, if there is one.
func readSecret(cmd *cobra.Command, secret string) (config []byte, err error) {
	switch secret {
	case "":
	case "-":
		config, err = io.ReadAll(cmd.InOrStdin())
	default:
		config, err = os.ReadFile(secret)
	}
	if err != nil {
		return nil, fmt.Errorf("read --secret: %w", err)
	}
	return config, nil
}

// push pushes a volume as an image.
func (o *options) push(cmd *cobra.Command, volume, image string, config []byte) error {
	bars := newBars(cmd)
	pushed, err := o.client().Push(cmd.Context(), volume, image, config, bars.pushed)
	bars.close(err == nil)
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
