package main

import (
	"context"
	"errors"
	"io/fs"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/gunzip"
	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// sandboxCommand is the argument with which this program gives up its rights and becomes another one. It is no command for users.
const sandboxCommand = "sandbox"

// newGunzip returns what decompresses gzip in processes of another program, nil where the driver does so itself.
func newGunzip(ctx context.Context, opts options) image.Gunzip {
	logger := klog.FromContext(ctx)
	if opts.gzipProgram == "" {
		return nil
	}
	decompressor, err := gunzip.New(gunzip.Config{
		Program: opts.gzipProgram, Helper: []string{"/proc/self/exe", sandboxCommand}, StallTimeout: opts.registry.StallTimeout,
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		logger.Info("Decompressing in the driver itself: there is no such program", "program", opts.gzipProgram)
		return nil
	case err != nil:
		logger.Error(err, "Decompressing in the driver itself")
		return nil
	}
	return decompressor.Gunzip
}
