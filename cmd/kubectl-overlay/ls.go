package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func lsCommand(opts *options, connect func(*options) (*cluster, error)) *cobra.Command {
	return &cobra.Command{
		Use:   "ls [POD]",
		Short: "List the overlay volumes of the pods of a namespace",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(opts)
			if err != nil {
				return err
			}
			return c.list(cmd.Context(), args, cmd.OutOrStdout())
		},
	}
}

// list writes a table of the volumes of the driver that a pod has, or all pods of the namespace.
func (f *finder) list(ctx context.Context, args []string, out io.Writer) error {
	var pods []corev1.Pod
	if len(args) == 1 {
		pod, err := f.client.CoreV1().Pods(f.namespace).Get(ctx, args[0], metav1.GetOptions{})
		if err != nil {
			return err
		}
		pods = []corev1.Pod{*pod}
	} else {
		list, err := f.client.CoreV1().Pods(f.namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		pods = list.Items
	}
	table := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "POD\tVOLUME\tCLAIM\tNODE\tHANDLE")
	for i := range pods {
		pod := &pods[i]
		for _, v := range pod.Spec.Volumes {
			claim, handle := claimOf(pod, v), ""
			switch {
			case v.CSI != nil && v.CSI.Driver == f.driver.name:
				claim, handle = "-", inlineHandle(pod, v.Name)
			case claim != "":
				pv, err := f.persistentVolume(ctx, claim)
				if errors.Is(err, errNoVolume) || apierrors.IsNotFound(err) {
					continue
				}
				if err != nil {
					return err
				}
				handle = pv.Spec.CSI.VolumeHandle
			default:
				continue
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", pod.Name, v.Name, claim, pod.Spec.NodeName, handle)
		}
	}
	return table.Flush()
}
