//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
)

// overlayNode is what the tests read of an OverlayNode.
type overlayNode struct {
	Metadata struct{ Name string }
	Spec     struct {
		Node          string
		NodeGoneSince string
		Requests      map[string]struct{ ID, Method string }
	}
	Status struct {
		CapacityBytes int64
		ReportedAt    string
		Results       map[string]struct {
			ID      string
			Code    int
			Message string
		}
	}
}

// overlayNodes reads all OverlayNodes. There are none where the cluster does not know the kind.
func (c *kindCluster) overlayNodes() ([]overlayNode, error) {
	output, err := command("kubectl", "--namespace", driverNamespace, "get", "overlaynodes", "--output", "json")
	if err != nil {
		if strings.Contains(err.Error(), "the server doesn't have a resource type") {
			return nil, nil
		}
		return nil, err
	}
	var list struct{ Items []overlayNode }
	if err := json.Unmarshal([]byte(output), &list); err != nil {
		return nil, err
	}
	return list.Items, nil
}

// overlayNode reads that of a node, and fails the test if there is none.
func (c *kindCluster) overlayNode(t *testing.T, node string) overlayNode {
	t.Helper()
	all, err := c.overlayNodes()
	must(t, err)
	for _, o := range all {
		if o.Metadata.Name == node+"."+driverName {
			return o
		}
	}
	t.Fatalf("there is no OverlayNode of %s among %d", node, len(all))
	return overlayNode{}
}

// unanswered are the handles of the requests that the node has not answered.
func (o *overlayNode) unanswered() (handles []string) {
	for handle, request := range o.Spec.Requests {
		if o.Status.Results[handle].ID != request.ID {
			handles = append(handles, handle)
		}
	}
	return handles
}

// unansweredRequests says which requests no node has answered.
func (c *kindCluster) unansweredRequests() (left []string, err error) {
	all, err := c.overlayNodes()
	for _, o := range all {
		for _, handle := range o.unanswered() {
			left = append(left, fmt.Sprintf("request %s of %s in OverlayNode %s", o.Spec.Requests[handle].Method, handle, o.Metadata.Name))
		}
	}
	return left, err
}

// TestOverlayNodes: each node has one, which says what the node can reserve.
func TestOverlayNodes(t *testing.T) {
	onlyCentral(t)
	t.Parallel()
	for _, node := range cluster.nodes {
		eventually(t, "OverlayNode of "+node+" has a capacity", func() error {
			o := cluster.overlayNode(t, node)
			if o.Spec.Node != node || o.Spec.NodeGoneSince != "" {
				t.Fatalf("%+v", o.Spec)
			}
			if o.Status.CapacityBytes <= 0 || o.Status.ReportedAt == "" {
				return fmt.Errorf("%w: %+v", errNot, o.Status)
			}
			return nil
		})
	}
}

// rights are what a ServiceAccount may do, and what it may not: "verb resource", with a namespace or none.
var rights = map[string]map[string]bool{
	release: {
		"get pods":                      true,
		"get persistentvolumeclaims":    true,
		"list pods":                     false,
		"list persistentvolumeclaims":   false,
		"update persistentvolumeclaims": false,
		"patch persistentvolumeclaims --subresource=status":          false,
		"get persistentvolumes":                                      false,
		"create persistentvolumes":                                   false,
		"patch persistentvolumes":                                    false,
		"delete persistentvolumes":                                   false,
		"get volumesnapshots":                                        false,
		"patch volumesnapshotcontents":                               false,
		"list storageclasses":                                        false,
		"create events":                                              false,
		"get secrets":                                                false,
		"get secrets/" + provisionerSecret + " " + driverNamespace:   false,
		"create overlaynodes " + driverNamespace:                     true,
		"watch overlaynodes " + driverNamespace:                      true,
		"patch overlaynodes --subresource=status " + driverNamespace: true,
		"patch overlaynodes " + driverNamespace:                      false,
		"delete overlaynodes " + driverNamespace:                     false,
		"create overlaynodes default":                                false,
		"create csistoragecapacities " + driverNamespace:             false,
		"update leases " + driverNamespace:                           false,
	},
	controllerName: {
		"create persistentvolumes":       true,
		"update persistentvolumeclaims":  true,
		"list nodes":                     true,
		"list csinodes":                  true,
		"update volumesnapshots":         true,
		"delete volumesnapshots":         false,
		"patch volumesnapshotcontents":   true,
		"create volumesnapshotcontents":  false,
		"delete volumesnapshotcontents":  false,
		"delete nodes":                   false,
		"get pods":                       false,
		"get secrets " + driverNamespace: false,
		"get secrets/" + provisionerSecret + " " + driverNamespace:   true,
		"patch overlaynodes " + driverNamespace:                      true,
		"delete overlaynodes " + driverNamespace:                     true,
		"patch overlaynodes --subresource=status " + driverNamespace: false,
		"create overlaynodes default":                                false,
	},
}

// TestRights holds the ServiceAccounts to what docs/operations.md says of them.
func TestRights(t *testing.T) {
	onlyCentral(t)
	t.Parallel()
	for account, may := range rights {
		for right, want := range may {
			fields := strings.Fields(right)
			args := []string{"auth", "can-i", fields[0], fields[1], "--as=system:serviceaccount:" + driverNamespace + ":" + account}
			namespace := ""
			for _, field := range fields[2:] {
				if strings.HasPrefix(field, "--") {
					args = append(args, field)
				} else {
					namespace = field
				}
			}
			if namespace == "" {
				args = append(args, "--all-namespaces")
			} else {
				args = append(args, "--namespace", namespace)
			}
			output, err := command("kubectl", args...)
			if said := err == nil && strings.Contains(output, "yes"); said != want {
				t.Errorf("%s: %s: %t, want %t (%s %v)", account, right, said, want, output, err)
			}
		}
	}
}

// podClient talks to the API server with the token of the driver's ServiceAccount, as whoever controls a node can.
type podClient struct {
	t      *testing.T
	config *rest.Config
}

// asPod returns a client with the token of a pod, or with one that is of no pod.
func asPod(t *testing.T, pod string) *podClient {
	t.Helper()
	create := []string{"--namespace", driverNamespace, "create", "token", release}
	if pod != "" {
		create = append(create, "--bound-object-kind", "Pod", "--bound-object-name", pod)
	}
	token, err := command("kubectl", create...)
	must(t, err)
	config := rest.AnonymousClientConfig(cluster.GetConfig())
	config.BearerToken = token
	return &podClient{t, config}
}

// send sends a request about OverlayNodes of the driver's namespace, and returns what the API server says if it refuses it.
func (c *podClient) send(method, path, contentType, body string) error {
	c.t.Helper()
	client, err := rest.HTTPClientFor(c.config)
	must(c.t, err)
	url := c.config.Host + "/apis/overlay-csi.github.io/v1alpha1/namespaces/" + driverNamespace + "/overlaynodes" + path
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	must(c.t, err)
	request.Header.Set("Content-Type", contentType)
	response, err := client.Do(request)
	must(c.t, err)
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	must(c.t, err)
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s: %s", response.Status, answer)
	}
	return nil
}

func (c *podClient) report(node string) error {
	return c.send(http.MethodPatch, "/"+node+"."+driverName+"/status", "application/merge-patch+json", `{"status":{}}`)
}

func (c *podClient) create(name, node, requests string) error {
	return c.send(http.MethodPost, "", "application/json", fmt.Sprintf(`{"apiVersion": "overlay-csi.github.io/v1alpha1", "kind": "OverlayNode",
		"metadata": {"name": %q}, "spec": {"node": %q, "requests": %s}}`, name, node, requests))
}

// TestNodeWritesItsOwnOverlayNode: with the admission policy, a node has no say about other nodes.
func TestNodeWritesItsOwnOverlayNode(t *testing.T) {
	onlyCentral(t)
	t.Parallel()
	one, other := cluster.workers[0], cluster.workers[1]
	asOne := asPod(t, cluster.driverPod(t, one).Name)
	const alone = "writes the OverlayNode of that node alone"
	// The API server needs a moment to take a policy in.
	eventually(t, "a node is refused the OverlayNode of another", func() error {
		if err := asOne.report(other); err == nil || !strings.Contains(err.Error(), alone) {
			return fmt.Errorf("%w: %v", errNot, err)
		}
		return nil
	})
	if err := asOne.report(one); err != nil {
		t.Errorf("a node's own OverlayNode: %v", err)
	}
	if err := asPod(t, "").report(one); err == nil || !strings.Contains(err.Error(), "does not name a node") {
		t.Errorf("a token without a node: %v", err)
	}
	const requests = `{"x": {"id": "1", "method": "DeleteVolume", "postedAt": "2026-01-01T00:00:00Z"}}`
	for what, c := range map[string]struct {
		err  error
		word string
	}{
		"of a node that does not exist": {asOne.create("no-such."+driverName, "no-such", "{}"), alone},
		"with the name of another":      {asOne.create(other+"."+driverName, one, "{}"), alone},
		"for another node":              {asOne.create(one+"."+driverName, other, "{}"), alone},
		"with requests":                 {asOne.create(one+"."+driverName, one, requests), "without requests"},
		"once more":                     {asOne.create(one+"."+driverName, one, "{}"), "already exists"},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.word) {
			t.Errorf("an OverlayNode %s: %v; want %q", what, c.err, c.word)
		}
	}
}
