package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

// overlayctl runs overlayctl in the driver's pod on a node. What it prints goes to out and errOut.
func (c *cluster) overlayctl(ctx context.Context, node string, args []string, out, errOut io.Writer) error {
	pod, err := c.driverPod(ctx, node)
	if err != nil {
		return err
	}
	request := c.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(c.driver.namespace).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: driverContainer, Command: append([]string{"overlayctl"}, args...), Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	spdy, err := remotecommand.NewSPDYExecutor(c.config, "POST", request.URL())
	if err != nil {
		return err
	}
	websocket, err := remotecommand.NewWebSocketExecutor(c.config, "GET", request.URL().String())
	if err != nil {
		return err
	}
	// As kubectl does: an API server before 1.29, or a proxy, may not take WebSockets.
	executor, err := remotecommand.NewFallbackExecutor(websocket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: out, Stderr: errOut})
	if _, ok := errors.AsType[exec.CodeExitError](err); ok {
		return fmt.Errorf("%w: %w", errRemote, err)
	}
	if err != nil {
		return fmt.Errorf("run overlayctl in pod %s/%s on node %s: %w", c.driver.namespace, pod, node, err)
	}
	return nil
}
