package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// Client asks a running driver.
type Client struct{ http http.Client }

// NewClient returns a client of the socket at path.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	// A socket of this node: connecting costs nothing, and a connection that is kept would outlive the client.
	return &Client{http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Layers lists the layers of the store.
func (c *Client) Layers(ctx context.Context) ([]Layer, error) {
	return ask[[]Layer](ctx, c, http.MethodGet, "layers", nil)
}

// Images lists the images whose layers are in the store.
func (c *Client) Images(ctx context.Context) ([]store.Image, error) {
	return ask[[]store.Image](ctx, c, http.MethodGet, "images", nil)
}

// Volumes lists the volumes on the node.
func (c *Client) Volumes(ctx context.Context) ([]string, error) {
	return ask[[]string](ctx, c, http.MethodGet, "volumes", nil)
}

// Volume describes a volume.
func (c *Client) Volume(ctx context.Context, id string) (volume.Description, error) {
	return ask[volume.Description](ctx, c, http.MethodGet, "volumes/"+url.PathEscape(id), nil)
}

// Collect removes layers that no volume uses, as a collection of the driver's own would, or all of them. With dryRun it
// removes nothing, and answers what it would.
func (c *Client) Collect(ctx context.Context, dryRun, all bool) (store.Collected, error) {
	query := url.Values{}
	if dryRun {
		query.Set("dryRun", "")
	}
	if all {
		query.Set("all", "")
	}
	return ask[store.Collected](ctx, c, http.MethodPost, "gc", query)
}

// Pull brings an image to the node, and tells how far it is meanwhile.
func (c *Client) Pull(ctx context.Context, image string, progress func(store.Progress)) (store.Image, error) {
	response, err := c.do(ctx, http.MethodPost, "pull", url.Values{"image": {image}})
	if err != nil {
		return store.Image{}, err
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	for {
		var event PullEvent
		if err := decoder.Decode(&event); err != nil {
			return store.Image{}, fmt.Errorf("the driver has ended meanwhile: pull again, it goes on from where it was: %w", err)
		}
		switch {
		case event.Error != "":
			return store.Image{}, errors.New(event.Error)
		case event.Image != nil:
			return *event.Image, nil
		case event.Progress != nil:
			progress(*event.Progress)
		}
	}
}

func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values) (T, error) {
	var value T
	response, err := c.do(ctx, method, path, query)
	if err != nil {
		return value, err
	}
	defer response.Body.Close()
	return value, json.NewDecoder(response.Body).Decode(&value)
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values) (*http.Response, error) {
	target := "http://overlay-csi/v1/" + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, target, nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask the driver (is it running, and is this its socket: --socket?): %w", err)
	}
	if response.StatusCode >= 400 {
		defer response.Body.Close()
		message, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
		return nil, errors.Join(errors.New(strings.TrimSpace(string(message))), err)
	}
	return response, nil
}
