// Package sanity runs csi-test's sanity suite against the running driver, with everything that the driver advertises.
package sanity

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestSanity(t *testing.T) {
	needs.Root(t)
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	binary, err := drivertest.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	node, err := drivertest.NewNode(dir, binary, "--volume-health")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Layer("layer", map[string]string{"f": "f"}); err != nil {
		t.Fatal(err)
	}
	if err := node.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Stop(); err != nil {
			t.Error(err)
		}
		left, err := node.Leftovers()
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		if t.Failed() {
			t.Log(node.Log())
		}
	})
	parameters := filepath.Join(dir, "parameters.yaml")
	content := fmt.Sprintf("layers: %q\n", drivertest.Layers("layer"))
	if drivertest.LacksResource() {
		// Where a disk image cannot grow because of that.
		content += "sizeEnforcement: none\n"
	}
	if err := os.WriteFile(parameters, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}

	config := sanity.NewTestConfig()
	config.Address = "unix://" + node.Socket
	config.TestVolumeParametersFile = parameters
	config.TargetPath = filepath.Join(dir, "target")
	config.StagingPath = filepath.Join(dir, "staging")
	// The data root's file system need not have the suite's 10 GiB.
	config.TestVolumeSize = 16 << 20
	for _, options := range []*[]grpc.DialOption{&config.DialOptions, &config.ControllerDialOptions} {
		*options = append(*options, grpc.WithChainUnaryInterceptor(marshalled))
	}
	var skipped []string
	ginkgo.ReportAfterSuite("skipped specs", func(report ginkgo.Report) {
		for _, spec := range report.SpecReports {
			if spec.State.Is(types.SpecStateSkipped) {
				skipped = append(skipped, spec.FullText())
			}
		}
	})
	sanity.Test(t, config)
	for _, spec := range skipped {
		if !slices.ContainsFunc(absent, func(word string) bool { return strings.Contains(spec, word) }) {
			t.Errorf("skipped: %s", spec)
		}
	}
}

// marshalled leaves an answer as it is after it was in a request. The suite compares the topology of a snapshot with one that it has sent,
// and with all their unexported fields.
func marshalled(
	ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	if err := invoke(ctx, method, req, reply, conn, options...); err != nil {
		return err
	}
	_, err := proto.Marshal(reply.(proto.Message))
	return err
}

// absent are words in the names of specs of what the driver does not have.
var absent = []string{
	"ControllerPublishVolume", "volume lifecycle", "ControllerUnpublishVolume", "NodeStageVolume", "NodeUnstageVolume",
	"ExpandVolume [Controller Server]", "ModifyVolume", "volume attribute class", "GroupController", "VolumeGroupSnapshot",
}
