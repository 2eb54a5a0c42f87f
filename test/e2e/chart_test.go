//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestChartFitsTheAPI has the API server check what the chart renders with each file of values, and the manifests of
// deploy/: strictly, so that a field that does not exist is an error.
func TestChartFitsTheAPI(t *testing.T) {
	t.Parallel()
	rendered := map[string]string{}
	values, err := filepath.Glob(chart + "/ci/*.yaml")
	must(t, err)
	for _, file := range values {
		// A PodMonitor is of a kind that the Prometheus operator brings, and the cluster has none.
		rendered[filepath.Base(file)], err = command("helm", "template", "dry-run", chart, "--namespace", driverNamespace, "--values", file,
			"--set", "metrics.podMonitor.enabled=false")
		must(t, err)
	}
	for _, file := range []string{"../../deploy/namespace.yaml", "../../deploy/overlay-csi.yaml"} {
		data, err := os.ReadFile(file)
		must(t, err)
		rendered[filepath.Base(file)] = string(data)
	}
	if len(rendered) < 4 {
		t.Fatalf("there are %d manifests", len(rendered))
	}
	for name, manifest := range rendered {
		file := filepath.Join(t.TempDir(), name)
		must(t, os.WriteFile(file, []byte(manifest), 0o600))
		_, err := command("kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--filename", file)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestChartRefusesWrongValues holds values.schema.json to what it is for.
func TestChartRefusesWrongValues(t *testing.T) {
	t.Parallel()
	const class = "storageClasses[0].name=x,storageClasses[0].parameters.layers=dir://a/b,storageClasses[0]."
	for set, word := range map[string]string{
		"layerRoot[0].name=x":                              "layerRoot",
		"layerRoots[0].name=x":                             "layerRoots",
		"layerRoots[0].hostPath=/x":                        "name",
		"layerRoots[0].name=a/b,layerRoots[0].hostPath=/x": "name",
		"layerRoots[0].name=A_1,layerRoots[0].hostPath=/x": "name",
		"layerRoots[0].name=x,layerRoots[0].hostPath=/x,layerRoots[0].persistentVolumeClaim=x": "layerRoots",
		"layerRoots[0].name=x,layerRoots[0].hostPath=relative":                                 "hostPath",
		"layerRoots[0].name=x,layerRoots[0].hostPath=/a/../b":                                  "hostPath",
		"dataRoot=/":                  "dataRoot",
		"kubeletDir=var/lib/kubelet":  "kubeletDir",
		"driverName=UPPER":            "driverName",
		"log.format=xml":              "format",
		"log.level=high":              "level",
		"allowMountOptions[0]=noexec": "allowMountOptions",
		"storageClasses[0].name=x,storageClasses[0].parameters=null":           "parameters",
		class + "parameters.layersFrom=claim":                                  "parameters",
		"storageClasses[0].name=x,storageClasses[0].parameters.layersFrom=pod": "layersFrom",
		class + "volumeBindingMode=Late":                                       "volumeBindingMode",
		class + "parameters.sizeLimit=1Gi":                                     "sizeLimit",
		class + "parameters.sizeEnforcement=some":                              "sizeEnforcement",
		class + "parameters.layerOwner=me":                                     "layerOwner",
		"admissionPolicy.enabled=some":                                         "admissionPolicy",
		"admissionPolicy.enabled=null":                                         "admissionPolicy",
		"csiDriver.fsGroupPolicy=Always":                                       "fsGroupPolicy",
		"overcommit=0":                                                         "overcommit",
		"resizer.image.tag=null":                                               "tag",
		"image.pullPolicy=Sometimes":                                           "pullPolicy",
		"healthPort=0":                                                         "healthPort",
		"networkPolicy.apiServerPorts=null":                                    "apiServerPorts",
		"registries.x.host=y":                                                  "registries",
		"registries.a/b.hosts=y":                                               "registries",
		"registries.x.hosts=y,hostRegistries=/x":                               "hostRegistries",
		"hostRegistries=etc":                                                   "hostRegistries",
		"layerGC.highThreshold=101":                                            "layerGC",
		"layerGC.minAge=long":                                                  "minAge",
		"nodeCredentials=A":                                                    "nodeCredentials",
		"provisioner.capacityPollInterval=often":                               "capacityPollInterval",
		"provisioner.mode=both":                                                "mode",
		"controller.nodeGracePeriod=soon":                                      "nodeGracePeriod",
		"controller.replicas=-1":                                               "replicas",
		"controller.podDisruptionBudget.maxUnavailable=null":                   "podDisruptionBudget",
		"controller.serviceAccount.create=false":                               "controller.serviceAccount.name",
		"serviceAccount.create=false":                                          "serviceAccount.name",
		"updateStrategy.type=Sometimes":                                        "updateStrategy",
		"driver.extraArgs[0]=no-dash":                                          "extraArgs",
	} {
		output, err := command("helm", "template", "x", chart, "--set", set)
		if err == nil {
			t.Errorf("--set %s: taken: %.200s", set, output)
		} else if !strings.Contains(fmt.Sprint(err), word) {
			t.Errorf("--set %s: %v; want %q", set, err, word)
		}
	}
}

// TestChartAsksForTheKind: Helm installs the CustomResourceDefinition with a new release alone.
func TestChartAsksForTheKind(t *testing.T) {
	t.Parallel()
	upgrade := []string{"template", "x", chart, "--is-upgrade"}
	_, err := command("helm", upgrade...)
	if err == nil || !strings.Contains(err.Error(), "kubectl apply --server-side -f charts/overlay-csi/crds") {
		t.Errorf("without the kind: %v", err)
	}
	_, err = command("helm", append(upgrade, "--api-versions", "overlay-csi.github.io/v1alpha1/OverlayNode")...)
	must(t, err)
}
