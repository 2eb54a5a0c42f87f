// Command overlayctl shows an operator what the driver has on a node.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/admin"
)

// version is set by the linker (see Makefile).
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "overlayctl:", err)
		os.Exit(1)
	}
}

// socketEnv names the socket where that is not the usual one.
const socketEnv = "OVERLAYCTL_SOCKET"

// options are the flags that all commands have.
type options struct {
	socket string
	output string
}

func (o *options) client() *admin.Client { return admin.NewClient(o.socket) }

func newCommand() *cobra.Command {
	opts := &options{}
	root := &cobra.Command{
		Use:           "overlayctl",
		Short:         "What the overlay-csi driver has on this node",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if opts.output != "table" && opts.output != "json" {
				return fmt.Errorf("--output %q: there are table and json", opts.output)
			}
			return nil
		},
	}
	socket := os.Getenv(socketEnv)
	if socket == "" {
		socket = "/var/lib/overlay-csi/overlayctl.sock"
	}
	root.PersistentFlags().StringVar(&opts.socket, "socket", socket, "the driver's `socket` (its flag --admin-socket), or what "+socketEnv+" says")
	root.PersistentFlags().StringVarP(&opts.output, "output", "o", "table", "`form` of the output: table or json")
	root.AddCommand(layersCommand(opts), imagesCommand(opts), pullCommand(opts), gcCommand(opts), inspectCommand(opts))
	return root
}

// print writes a value as JSON, or as the table that rows writes.
func (o *options) print(to io.Writer, value any, rows func(w io.Writer)) error {
	if o.output == "json" {
		encoder := json.NewEncoder(to)
		encoder.SetIndent("", "  ")
		return encoder.Encode(value)
	}
	table := tabwriter.NewWriter(to, 0, 4, 2, ' ', 0)
	rows(table)
	return table.Flush()
}
