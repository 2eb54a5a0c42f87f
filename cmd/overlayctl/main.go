package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
)

// version is set by the linker (see Makefile).
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "overlayctl:", err)
		os.Exit(1)
	}
}

// socketEnv is the environment variable that changes the default of --socket.
const socketEnv = "OVERLAYCTL_SOCKET"

// options are the flags that all commands have.
type options struct {
	socket string
	output string
}

func (o *options) client() *api.Client { return api.NewClient(o.socket) }

func newCommand() *cobra.Command {
	opts := &options{}
	root := &cobra.Command{
		Use:           "overlayctl",
		Short:         "Inspect and manage the layers and volumes of the overlay-csi driver on this node",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if opts.output != "table" && opts.output != "json" {
				return fmt.Errorf("--output %q: the formats are table and json", opts.output)
			}
			return nil
		},
	}
	socket := os.Getenv(socketEnv)
	if socket == "" {
		socket = "/var/lib/overlay-csi/overlayctl.sock"
	}
	root.PersistentFlags().StringVar(&opts.socket, "socket", socket, "the driver's admin `socket` (default from "+socketEnv+")")
	root.PersistentFlags().StringVarP(&opts.output, "output", "o", "table", "output `format`: table or json")
	root.AddCommand(layersCommand(opts), imagesCommand(opts), pullCommand(opts), gcCommand(opts), inspectCommand(opts))
	root.AddCommand(diffCommand(opts), commitCommand(opts), snapshotsCommand(opts), cachesCommand(opts), rebaseCommand(opts))
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
