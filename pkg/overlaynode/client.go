package overlaynode

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// Client reads and writes the OverlayNodes of one driver in one namespace.
type Client struct {
	client            rest.Interface
	namespace, driver string
}

// NewClient returns a client of the API server that config names. It does not connect.
func NewClient(config *rest.Config, namespace, driver string) (*Client, error) {
	scheme := runtime.NewScheme()
	scheme.AddKnownTypeWithName(kind, &OverlayNode{})
	scheme.AddKnownTypeWithName(groupVersion.WithKind(kind.Kind+"List"), &OverlayNodeList{})
	metav1.AddToGroupVersion(scheme, groupVersion)
	config = rest.CopyConfig(config)
	// There is no limit by client-go: an agent has one write under way at a time, and a dispatcher one for each node.
	config.QPS = -1
	config.GroupVersion, config.APIPath = &groupVersion, "/apis"
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("create a client of the API server for OverlayNodes: %w", err)
	}
	return &Client{client: client, namespace: namespace, driver: driver}, nil
}

// Name returns the name of a node's object. It returns ErrInvalidArgument if it would be too long.
func (c *Client) Name(node string) (string, error) {
	name := node + "." + c.driver
	if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
		return "", fmt.Errorf("%w: the name of an OverlayNode is that of the node and that of the driver, and %q cannot be one: %s",
			errdefs.ErrInvalidArgument, name, problems[0])
	}
	return name, nil
}

// ensure creates the object of a node if there is none.
func (c *Client) ensure(ctx context.Context, node string) error {
	name, err := c.Name(node)
	if err != nil {
		return err
	}
	object := &OverlayNode{
		TypeMeta:   metav1.TypeMeta{APIVersion: groupVersion.String(), Kind: kind.Kind},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: c.namespace},
		Spec:       Spec{Node: node},
	}
	err = c.client.Post().Namespace(c.namespace).Resource(resource).Body(object).Do(ctx).Error()
	switch {
	case err == nil || apierrors.IsAlreadyExists(err):
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%w: create OverlayNode %s/%s: %w; install the chart's CustomResourceDefinition, if the namespace exists",
			errdefs.ErrUnavailable, c.namespace, name, err)
	}
	return fmt.Errorf("%w: create OverlayNode %s/%s: %w", errdefs.ErrUnavailable, c.namespace, name, err)
}

// patch changes an object by a JSON merge patch (RFC 7386). subresource is "" for its spec.
func (c *Client) patch(ctx context.Context, name, subresource string, patch any) (*OverlayNode, error) {
	body, err := json.Marshal(patch)
	if err != nil {
		return nil, err
	}
	request := c.client.Patch(types.MergePatchType).Namespace(c.namespace).Resource(resource).Name(name)
	if subresource != "" {
		request = request.SubResource(subresource)
	}
	object := &OverlayNode{}
	err = request.Body(body).Do(ctx).Into(object)
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%w: OverlayNode %s/%s: %w", errdefs.ErrNotFound, c.namespace, name, err)
	case err != nil:
		return nil, fmt.Errorf("%w: change OverlayNode %s/%s: %w", errdefs.ErrUnavailable, c.namespace, name, err)
	}
	return object, nil
}

// remove deletes an object, unless it was changed since it was read.
func (c *Client) remove(ctx context.Context, object *OverlayNode) error {
	options := &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &object.ResourceVersion}}
	err := c.client.Delete().Namespace(c.namespace).Resource(resource).Name(object.Name).Body(options).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("%w: delete OverlayNode %s/%s: %w", errdefs.ErrUnavailable, c.namespace, object.Name, err)
	}
	return nil
}

// informer returns an informer of the object of that name, of all objects if it is "".
func (c *Client) informer(name string) cache.SharedIndexInformer {
	selector := fields.Everything()
	if name != "" {
		selector = fields.OneTermEqualSelector(metav1.ObjectNameField, name)
	}
	return cache.NewSharedIndexInformer(cache.NewListWatchFromClient(c.client, resource, c.namespace, selector), &OverlayNode{}, 0, nil)
}

// key returns the key of an object in the store of an informer.
func (c *Client) key(name string) string { return c.namespace + "/" + name }
