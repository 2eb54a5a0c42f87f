package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
)

func diffCommand(opts *options) *cobra.Command {
	var pod string
	cmd := &cobra.Command{
		Use:   "diff VOLUME",
		Short: "List what was written to a volume: added (A), changed (C) and deleted (D) entries",
		Long: `List what was written to a volume, one entry a line: A for one that was added to
the layers, C for one that was changed, D for one that was deleted. Names with
characters that a terminal does not print are quoted.

The volume may be in use. It is not changed, and a pod that mounts or unmounts it
ends the list.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			out := bufio.NewWriter(cmd.OutOrStdout())
			// Lines of JSON, not an array: a volume can have any number of changes.
			write := func(change api.Change) error { return writeChange(out, change) }
			if opts.output == "json" {
				encoder := json.NewEncoder(out)
				write = func(change api.Change) error { return encoder.Encode(change) }
			}
			err := opts.client().Diff(cmd.Context(), args[0], pod, write)
			if flushed := out.Flush(); err == nil {
				err = flushed
			}
			return err
		},
	}
	cmd.Flags().StringVar(&pod, "pod", "", "the `UID` of the pod whose view is read, where each pod has an upper of its own")
	return cmd
}

func writeChange(to io.Writer, change api.Change) error {
	path := change.Path
	if change.RawPath != nil {
		path = string(change.RawPath)
	}
	_, err := fmt.Fprintf(to, "%s %s\n", change.Kind, printable("/"+strings.TrimPrefix(path, ".")))
	return err
}

// printable quotes a path that has characters which a terminal could take for commands, or which end the line.
func printable(path string) string {
	if strings.ContainsFunc(path, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar || r == '"' }) {
		return strconv.Quote(path)
	}
	return path
}
