//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/e2e-framework/klient/decoder"
	"sigs.k8s.io/e2e-framework/klient/k8s"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
	"sigs.k8s.io/e2e-framework/klient/wait/conditions"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

const examplesDir = "../../deploy/examples"

// examples are what each file of deploy/examples claims, and how that is proven.
var examples = map[string]func(*testing.T, *namespace){
	"dataset.yaml": func(t *testing.T, n *namespace) {
		n.apply("dataset.yaml", nil)
		trainers := n.pods("app=trainers", 4)
		for i, p := range trainers {
			p.want(fmt.Sprintf("cat /data/labels.csv /data/labels.sorted && echo %d > /data/mine", i), "cat,1\ncat,1")
		}
		for i, p := range trainers {
			p.want("cat /data/mine", fmt.Sprint(i))
		}
	},
	"model-cache.yaml": func(t *testing.T, n *namespace) {
		objects := n.apply("model-cache.yaml", nil)
		server := n.pod("model-server")
		server.want("cat /model/config.yaml /model/weights.bin && echo cached >> /model/cache/compiled", "learning_rate: 0.01\nweights")
		server.delete()
		for _, object := range objects {
			if again, ok := object.(*corev1.Pod); ok {
				again.ResourceVersion = ""
				n.create(again)
			}
		}
		n.pod("model-server").want("cat /model/cache/compiled", "weights\ncached")
	},
	"golden-database.yaml": func(t *testing.T, n *namespace) {
		n.apply("golden-database.yaml", nil)
		n.waitJob("integration-tests")
		for _, node := range cluster.workers {
			got, err := cluster.onNode(node, "cat /var/lib/layers/databases/golden/orders.csv")
			must(t, err)
			if got != "1,first order" {
				t.Errorf("the golden database on %s is %q", node, got)
			}
		}
	},
	"ci-cache.yaml": func(t *testing.T, n *namespace) {
		n.apply("ci-cache.yaml", nil)
		n.waitJob("build")
	},
	"rox-claim-as-layer.yaml": func(t *testing.T, n *namespace) {
		className, dir := otherDriver(t, corev1.ReadOnlyMany, cluster.workers[0])
		_, err := cluster.onNode(cluster.workers[0], "echo text > "+dir+"/corpus.txt")
		must(t, err)
		n.apply("rox-claim-as-layer.yaml", classIs(className))
		n.pod("annotator").want("cat /work/corpus.txt /corpus/corpus.txt", "text\nannotated\ntext")
	},
	"upper-on-other-claim.yaml": func(t *testing.T, n *namespace) {
		className, dir := otherDriver(t, corev1.ReadWriteOnce, cluster.workers[0])
		n.apply("upper-on-other-claim.yaml", classIs(className))
		p := n.pod("finetune")
		p.want("cat /model/weights.bin /writes/views/model/upper/checkpoint", "weights\ncheckpoint")
		p.delete()
		got, err := cluster.onNode(cluster.workers[0], "cat "+dir+"/views/model/upper/checkpoint")
		must(t, err)
		if got != "checkpoint" {
			t.Errorf("the claim holds %q", got)
		}
	},
	"persistent-workspace.yaml": func(t *testing.T, n *namespace) {
		n.apply("persistent-workspace.yaml", nil)
		first := n.pods("app=workspace", 1)[0]
		first.want("cat /workspace/bin/go /workspace/labels.csv && wc -l < /workspace/starts", "go\ncat,1\n1")
		first.delete()
		second := n.pods("app=workspace", 1)[0]
		second.want("wc -l < /workspace/starts", "2")
		if second.Spec.NodeName != first.Spec.NodeName {
			t.Errorf("the workspace was on %s and is on %s", first.Spec.NodeName, second.Spec.NodeName)
		}
	},
	"image-volume.yaml": func(t *testing.T, n *namespace) {
		script := registrytest.File("bin/greet", "#!/bin/sh\necho greetings\n")
		script.Mode = 0o755
		pushImage(t, "team/tools:1", script)
		n.apply("image-volume.yaml", nil)
		n.pod("toolbox").want("cat /tools/output /tools/config.yaml", "greetings\nlearning_rate: 0.01")
	},
	"model-artifact.yaml": func(t *testing.T, n *namespace) {
		title := func(name string) map[string]string { return map[string]string{"org.opencontainers.image.title": name} }
		artifact, err := registrytest.Artifact(
			registrytest.ArtifactFile{Data: []byte("{}\n"), Annotations: title("config.json")},
			registrytest.ArtifactFile{Data: []byte("one\n"), Annotations: title("weights/part-1.bin")},
			registrytest.ArtifactFile{Data: []byte("two\n"), Annotations: title("weights/part-2.bin")})
		must(t, err)
		push(t, "team/model:7b", artifact)
		n.apply("model-artifact.yaml", nil)
		n.pod("server").want("cat /model/config.json /model/merged.bin", "{}\none\ntwo")
	},
	"generic-ephemeral-volume.yaml": func(t *testing.T, n *namespace) {
		n.apply("generic-ephemeral-volume.yaml", nil)
		p := n.pod("experiment")
		p.want("cat /model/config.yaml /model/weights.bin", "learning_rate: 1\nweights")
		volume := n.volumeOf("experiment-model")
		p.delete()
		waitVolumeGone(t, volume.Name)
	},
}

func TestExamples(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(examplesDir, "*.yaml"))
	must(t, err)
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(strings.TrimSuffix(name, ".yaml"), func(t *testing.T) {
			t.Parallel()
			prove, ok := examples[name]
			if !ok {
				t.Fatalf("nothing proves what %s claims", name)
			}
			prove(t, newNamespace(t, "baseline"))
		})
	}
	if len(files) != len(examples) {
		t.Errorf("there are %d examples, and proofs of %d", len(files), len(examples))
	}
}

// apply makes the objects of an example, changed where the cluster has other names for things.
func (n *namespace) apply(file string, change func(k8s.Object)) []k8s.Object {
	n.t.Helper()
	data, err := os.ReadFile(filepath.Join(examplesDir, file))
	must(n.t, err)
	objects, err := decoder.DecodeAll(context.Background(), bytes.NewReader(data))
	must(n.t, err)
	for _, object := range objects {
		if change != nil {
			change(object)
		}
		n.create(object)
	}
	return objects
}

// classIs puts the StorageClass that the cluster has in place of the one that the example names.
func classIs(name string) func(k8s.Object) {
	return func(object k8s.Object) {
		if c, ok := object.(*corev1.PersistentVolumeClaim); ok {
			c.Spec.StorageClassName = &name
		}
	}
}

// pod waits for a pod that an example makes. Its first container is what exec runs in.
func (n *namespace) pod(name string) *pod {
	n.t.Helper()
	p := &pod{&corev1.Pod{}, n.t}
	must(n.t, cluster.Get(context.Background(), name, n.name, p.Pod))
	p.waitReady()
	return p
}

// pods waits until so many pods with a label are ready.
func (n *namespace) pods(label string, count int) []*pod {
	n.t.Helper()
	var pods []*pod
	eventually(n.t, fmt.Sprintf("%d pods of %s are ready", count, label), func() error {
		var list corev1.PodList
		must(n.t, cluster.WithNamespace(n.name).List(context.Background(), &list, resources.WithLabelSelector(label)))
		pods = nil
		for i := range list.Items {
			if isReady(&list.Items[i]) && list.Items[i].DeletionTimestamp == nil {
				pods = append(pods, &pod{&list.Items[i], n.t})
			}
		}
		if len(pods) != count {
			return fmt.Errorf("%w: %d are", errNot, len(pods))
		}
		return nil
	})
	return pods
}

func (n *namespace) waitJob(name string) {
	n.t.Helper()
	job := &batchv1.Job{}
	must(n.t, cluster.Get(context.Background(), name, n.name, job))
	ended := func(object k8s.Object) bool {
		return slices.ContainsFunc(object.(*batchv1.Job).Status.Conditions, func(c batchv1.JobCondition) bool {
			return (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) && c.Status == corev1.ConditionTrue
		})
	}
	must(n.t, waitFor(conditions.New(cluster.Resources).ResourceMatch(job, ended)))
	if job.Status.Failed > 0 {
		n.t.Errorf("job %s: %d pods failed", name, job.Status.Failed)
	}
}
