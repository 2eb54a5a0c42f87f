package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// onVolume returns a command that runs overlayctl for a volume. argsOf returns its arguments.
func onVolume(
	opts *options, connect func(*options) (*cluster, error), cmd *cobra.Command, argsOf func(volume) []string,
	write func(run func(out io.Writer) error) error,
) *cobra.Command {
	cmd.Args = cobra.RangeArgs(1, 2)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := connect(opts)
		if err != nil {
			return err
		}
		v, err := c.find(cmd.Context(), args)
		if err != nil {
			return err
		}
		run := func(out io.Writer) error {
			return c.overlayctl(cmd.Context(), v.node, argsOf(v), out, cmd.ErrOrStderr())
		}
		if write == nil {
			return run(cmd.OutOrStdout())
		}
		return write(run)
	}
	return cmd
}

func inspectCommand(opts *options, connect func(*options) (*cluster, error)) *cobra.Command {
	cmd := &cobra.Command{Use: "inspect (POD VOLUME | pvc/NAME)", Short: "Show a volume as JSON"}
	return onVolume(opts, connect, cmd, func(v volume) []string { return []string{"inspect", "--", v.handle} }, nil)
}

func diffCommand(opts *options, connect func(*options) (*cluster, error)) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "diff (POD VOLUME | pvc/NAME)",
		Short: "List what was written to a volume: added (A), changed (C) and deleted (D) entries",
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "output `format`: table or json")
	return onVolume(opts, connect, cmd, func(v volume) []string {
		args := []string{"diff", "--output", output}
		if v.pod != "" {
			args = append(args, "--pod", v.pod)
		}
		return append(args, "--", v.handle)
	}, nil)
}

func commitCommand(opts *options, connect func(*options) (*cluster, error)) *cobra.Command {
	var output, format string
	cmd := &cobra.Command{
		Use:   "commit (POD VOLUME | pvc/NAME) --output FILE",
		Short: "Write what was written to a volume to a file, as the tar of an image layer or as an OCI archive",
	}
	cmd.Flags().StringVar(&format, "format", "layer", "what is written: the tar of a layer (layer), or an OCI archive (oci)")
	cmd.Flags().StringVarP(&output, "output", "o", "", "the `file` that is written, - for the standard output")
	argsOf := func(v volume) []string {
		return []string{"commit", "--format", format, "--output", "-", "--", v.handle}
	}
	return onVolume(opts, connect, cmd, argsOf, func(run func(io.Writer) error) error {
		switch output {
		case "":
			return errors.New("--output is missing: name the file, or - for the standard output")
		case "-":
			return runTar(run, cmd.OutOrStdout())
		}
		return writeFile(output, func(to io.Writer) error { return runTar(run, to) })
	})
}

// runTar has run write a tar, and checks that it has its end: an API server or a proxy may end a stream without an error.
func runTar(run func(io.Writer) error, to io.Writer) error {
	end := &tailWriter{to: to}
	if err := run(end); err != nil {
		return err
	}
	if !bytes.Equal(end.tail, make([]byte, tarEnd)) {
		return errors.New("the tar ends early; the connection may have been closed: try again")
	}
	return nil
}

// tarEnd is how many zeroes a tar ends with.
const tarEnd = 1024

// tailWriter remembers the last bytes that were written.
type tailWriter struct {
	to   io.Writer
	tail []byte
}

// Write writes to the other writer.
func (w *tailWriter) Write(data []byte) (int, error) {
	n, err := w.to.Write(data)
	w.tail = append(w.tail, data[max(0, n-tarEnd):n]...)
	w.tail = w.tail[max(0, len(w.tail)-tarEnd):]
	return n, err
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
