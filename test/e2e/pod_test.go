//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/e2e-framework/klient/k8s"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
	"sigs.k8s.io/e2e-framework/klient/wait/conditions"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// testLabel is on every namespace that a test makes.
const testLabel = "overlay-csi-e2e"

// namespace is the place of one test.
type namespace struct {
	t    *testing.T
	name string
}

// newNamespace makes a namespace of a Pod Security level and has it deleted after the test, which nobody waits for: what
// is left is looked at after all tests.
func newNamespace(t *testing.T, level string) *namespace {
	t.Helper()
	n := &namespace{t: t, name: envconf.RandomName("e2e", 12)}
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: n.name, Labels: map[string]string{
		testLabel:                            "true",
		"pod-security.kubernetes.io/enforce": level,
	}}}
	must(t, cluster.Create(context.Background(), object))
	t.Cleanup(func() {
		if t.Failed() {
			n.describe()
		}
		if err := cluster.Delete(context.Background(), object); err != nil && !apierrors.IsNotFound(err) {
			t.Errorf("delete namespace %s: %v", n.name, err)
		}
	})
	// Pods are refused until the service account is there.
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default", Namespace: n.name}}
	eventually(t, "service account of "+n.name, func() error {
		return cluster.Get(context.Background(), account.Name, account.Namespace, account)
	})
	return n
}

// describe logs what a person would ask for first when a test fails.
func (n *namespace) describe() {
	for _, args := range [][]string{{"pods,pvc", "--output=wide"}, {"events", "--field-selector=type=Warning", "--sort-by=.lastTimestamp"}} {
		output, err := command("kubectl", append([]string{"--namespace", n.name, "get"}, args...)...)
		n.t.Logf("namespace %s: %v\n%s", n.name, err, output)
	}
}

func (n *namespace) create(object k8s.Object) {
	n.t.Helper()
	object.SetNamespace(n.name)
	must(n.t, cluster.Create(context.Background(), object))
}

// pod is a running or coming pod of a test.
type pod struct {
	*corev1.Pod
	t *testing.T
}

type podOption func(*corev1.Pod)

func onNode(name string) podOption {
	return func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": name} }
}

// withVolume mounts a volume at /NAME.
func withVolume(volume corev1.Volume, change ...func(*corev1.VolumeMount)) podOption {
	return func(p *corev1.Pod) {
		mount := corev1.VolumeMount{Name: volume.Name, MountPath: "/" + volume.Name}
		for _, c := range change {
			c(&mount)
		}
		p.Spec.Volumes = append(p.Spec.Volumes, volume)
		p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, mount)
	}
}

// withCommand runs a shell script in place of sleeping.
func withCommand(script string) podOption {
	return func(p *corev1.Pod) { p.Spec.Containers[0].Command = []string{"sh", "-c", script} }
}

// restricted makes the pod one that the Pod Security level "restricted" takes, with a read-only root.
func restricted(user int64) podOption {
	yes, no := true, false
	return func(p *corev1.Pod) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{
			RunAsNonRoot: &yes, RunAsUser: &user, RunAsGroup: &user,
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		}
		p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		}
	}
}

// newPod is a pod that sleeps until it is told to end.
func newPod(name string, options ...podOption) *corev1.Pod {
	grace := int64(5)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name:            "main",
				Image:           os.Getenv(envWorkload),
				ImagePullPolicy: corev1.PullIfNotPresent,
				Command:         []string{"sh", "-c", "trap exit TERM; while :; do sleep 3600 & wait; done"},
			}},
		},
	}
	for _, option := range options {
		option(p)
	}
	return p
}

// start makes a pod without waiting for it.
func (n *namespace) start(name string, options ...podOption) *pod {
	n.t.Helper()
	p := &pod{newPod(name, options...), n.t}
	n.create(p.Pod)
	return p
}

// run makes a pod and waits until it is ready.
func (n *namespace) run(name string, options ...podOption) *pod {
	n.t.Helper()
	p := n.start(name, options...)
	p.waitReady()
	return p
}

func (p *pod) waitReady() {
	p.t.Helper()
	if err := waitFor(conditions.New(cluster.Resources).PodReady(p.Pod)); err != nil {
		p.t.Fatalf("pod %s is not ready: %v\nevents: %s", p.Name, err, strings.Join(p.events(), "\n"))
	}
	p.refresh()
}

func (p *pod) refresh() {
	p.t.Helper()
	must(p.t, cluster.Get(context.Background(), p.Name, p.Namespace, p.Pod))
}

// exec runs a shell script in the pod and returns what it prints.
func (p *pod) exec(script string) (string, error) {
	var stdout, stderr bytes.Buffer
	err := cluster.ExecInPod(
		context.Background(),
		p.Namespace,
		p.Name,
		p.Spec.Containers[0].Name,
		[]string{"sh", "-c", script},
		&stdout,
		&stderr,
	)
	if err != nil {
		return "", fmt.Errorf("in pod %s: %s: %w: %s%s", p.Name, script, err, stdout.String(), stderr.String())
	}
	return strings.TrimSpace(stdout.String()), nil
}

// want runs a shell script in the pod and compares what it prints.
func (p *pod) want(script, want string) {
	p.t.Helper()
	got, err := p.exec(script)
	must(p.t, err)
	if got != want {
		p.t.Errorf("in pod %s: %s: %q, want %q", p.Name, script, got, want)
	}
}

// refused runs a shell script that must fail, with this word in what it prints.
func (p *pod) refused(script, word string) {
	p.t.Helper()
	if got, err := p.exec(script); err == nil {
		p.t.Errorf("in pod %s: %s: it works (%q)", p.Name, script, got)
	} else if !strings.Contains(err.Error(), word) {
		p.t.Errorf("in pod %s: %s: %v; want %q", p.Name, script, err, word)
	}
}

// delete deletes the pod and waits until it is gone.
func (p *pod) delete() {
	p.t.Helper()
	p.deleteInBackground()
	p.waitGone()
}

func (p *pod) deleteInBackground() {
	p.t.Helper()
	must(p.t, cluster.Delete(context.Background(), p.Pod.DeepCopy()))
}

func (p *pod) waitGone() {
	p.t.Helper()
	uid := p.UID
	eventually(p.t, "pod "+p.Name+" is gone", func() error {
		var now corev1.Pod
		err := cluster.Get(context.Background(), p.Name, p.Namespace, &now)
		if apierrors.IsNotFound(err) || (err == nil && now.UID != uid) {
			return nil
		}
		return fmt.Errorf("%w: %s (%v)", errNot, now.Status.Phase, err)
	})
}

// events are what Kubernetes says of the pod.
func (p *pod) events() []string { return eventsOf(p.t, p.Namespace, p.UID) }

// waitEvent waits for an event of the pod with this word in its message.
func (p *pod) waitEvent(word string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("event of pod %s with %q", p.Name, word), func() error {
		events := p.events()
		for _, event := range events {
			if strings.Contains(event, word) {
				return nil
			}
		}
		return fmt.Errorf("%w: %s", errNot, strings.Join(events, "\n"))
	})
}

func eventsOf(t *testing.T, namespace string, uid types.UID) []string {
	t.Helper()
	var events corev1.EventList
	must(
		t,
		cluster.WithNamespace(namespace).List(context.Background(), &events, resources.WithFieldSelector("involvedObject.uid="+string(uid))),
	)
	var messages []string
	for _, event := range events.Items {
		messages = append(messages, event.Reason+": "+event.Message)
	}
	return messages
}

// wantNothingOf checks that a node has nothing left of a pod: no directory, no mount, no state of the driver's.
func wantNothingOf(t *testing.T, node string, uid types.UID) {
	t.Helper()
	eventually(t, fmt.Sprintf("nothing of pod %s on %s", uid, node), func() error {
		left, err := cluster.onNode(
			node,
			fmt.Sprintf(
				`ls -d /var/lib/kubelet/pods/%[1]s 2>/dev/null; grep %[1]s /proc/self/mountinfo; `+
					`grep -l %[1]s %[2]s/volumes/*/volume.json 2>/dev/null; true`,
				uid,
				dataRoot,
			),
		)
		if err == nil && left != "" {
			err = fmt.Errorf("%w: %s", errNot, left)
		}
		return err
	})
}

// inlineVolume is a volume of the driver in the pod itself, with these keys.
func inlineVolume(name string, keys ...string) corev1.Volume {
	return corev1.Volume{
		Name:         name,
		VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: driverName, VolumeAttributes: pairs(keys)}},
	}
}

func claimVolume(name, claim string) corev1.Volume {
	return corev1.Volume{
		Name:         name,
		VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}},
	}
}

func configMapVolume(name, configMap string) corev1.Volume {
	source := &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: configMap}}
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{ConfigMap: source}}
}

func emptyDirVolume(name, sizeLimit string) corev1.Volume {
	source := &corev1.EmptyDirVolumeSource{}
	if sizeLimit != "" {
		limit := resource.MustParse(sizeLimit)
		source.SizeLimit = &limit
	}
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: source}}
}

func pairs(list []string) map[string]string {
	m := map[string]string{}
	for i := 0; i+1 < len(list); i += 2 {
		m[list[i]] = list[i+1]
	}
	return m
}

func subPath(path string) func(*corev1.VolumeMount) {
	return func(mount *corev1.VolumeMount) { mount.SubPath = path }
}

func readOnlyMount(mount *corev1.VolumeMount) { mount.ReadOnly = true }
