package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func cachesCommand(opts *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "caches",
		Short: "List the caches on this node with their size, last use and volumes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			caches, err := opts.client().Caches(cmd.Context())
			if err != nil {
				return err
			}
			return opts.print(cmd.OutOrStdout(), caches, func(w io.Writer) {
				fmt.Fprintln(w, "NAMESPACE\tNAME\tVERSIONS\tSIZE\tLAST USED\tVOLUMES")
				for _, cache := range caches {
					users := "-"
					if len(cache.Volumes) > 0 {
						users = strings.Join(cache.Volumes, ",")
					}
					fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\n", cache.Namespace, cache.Name, cache.Versions, humanize.IBytes(uint64(cache.Bytes)),
						age(cache.LastUsed), users)
				}
			})
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "delete NAMESPACE/NAME",
		Short: "Delete a cache; volumes that have it keep what they have",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			namespace, name, _ := strings.Cut(args[0], "/")
			return opts.client().DeleteCache(cmd.Context(), namespace, name)
		},
	})
	return cmd
}
