package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// Client talks to a running driver on its admin socket.
type Client struct{ http http.Client }

// NewClient returns a client of the socket at path.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	// Connecting to a local socket is cheap, and an idle connection would outlive the client.
	return &Client{http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Layers lists the layers of the store.
func (c *Client) Layers(ctx context.Context) ([]Layer, error) {
	return call[[]Layer](ctx, c, http.MethodGet, "layers", nil)
}

// Images lists the images whose layers are in the store.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return call[[]Image](ctx, c, http.MethodGet, "images", nil)
}

// Volumes lists the volumes on the node.
func (c *Client) Volumes(ctx context.Context) ([]string, error) {
	return call[[]string](ctx, c, http.MethodGet, "volumes", nil)
}

// Volume describes a volume.
func (c *Client) Volume(ctx context.Context, id string) (Volume, error) {
	return call[Volume](ctx, c, http.MethodGet, "volumes/"+url.PathEscape(id), nil)
}

// Diff calls change for each entry that differs between the layers of a volume and what the pod with a UID sees, or the one that has the
// volume if the UID is "". A directory comes before what is in it.
func (c *Client) Diff(ctx context.Context, id, pod string, change func(Change) error) error {
	query := url.Values{}
	if pod != "" {
		query.Set("pod", pod)
	}
	response, err := c.do(ctx, http.MethodGet, "volumes/"+url.PathEscape(id)+"/diff", query)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return readEvents(response.Body, "changes of volume "+id, func(event DiffEvent) (end bool, message string, err error) {
		if event.Change != nil {
			err = change(*event.Change)
		}
		return event.End, event.Error, err
	})
}

// readEvents reads the lines of an answer until each reports the end, a message of the driver or an error. what is in the answer.
func readEvents[E any](from io.Reader, what string, each func(E) (end bool, message string, err error)) error {
	decoder := json.NewDecoder(from)
	for {
		var event E
		if err := decoder.Decode(&event); err != nil {
			return fmt.Errorf("read the %s: %w; the volume was mounted or unmounted, or the driver has restarted: try again", what, err)
		}
		end, message, err := each(event)
		switch {
		case message != "":
			return errors.New(message)
		case end || err != nil:
			return err
		}
	}
}

// Layer writes the tar of the image layer that has what was written to a volume.
func (c *Client) Layer(ctx context.Context, id string, to io.Writer) error {
	return c.writeTar(ctx, id, "layer", nil, nil, to)
}

// Archive writes an image of a volume as an OCI archive, which calls it name. secret is a Docker config.json with logins for the image
// below, which may be empty: those of the node are used beside them.
func (c *Client) Archive(ctx context.Context, id, name string, secret []byte, to io.Writer) error {
	query := url.Values{}
	if name != "" {
		query.Set("name", name)
	}
	return c.writeTar(ctx, id, "archive", query, bytes.NewReader(secret), to)
}

func (c *Client) writeTar(ctx context.Context, id, what string, query url.Values, body io.Reader, to io.Writer) error {
	response, err := c.send(ctx, http.MethodPost, "volumes/"+url.PathEscape(id)+"/"+what, query, body)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(to, response.Body); err != nil {
		return fmt.Errorf("read the %s of volume %s: %w", what, id, err)
	}
	if message := response.Trailer.Get(ErrorTrailer); message != "" {
		return errors.New(message)
	}
	if response.Trailer.Get(EndTrailer) == "" {
		return fmt.Errorf("read the %s of volume %s: the answer ended early; the driver may have restarted: try again", what, id)
	}
	return nil
}

// Snapshots lists the snapshots on the node.
func (c *Client) Snapshots(ctx context.Context) ([]Snapshot, error) {
	return call[[]Snapshot](ctx, c, http.MethodGet, "snapshots", nil)
}

// Caches lists the caches on the node.
func (c *Client) Caches(ctx context.Context) ([]Cache, error) {
	return call[[]Cache](ctx, c, http.MethodGet, "caches", nil)
}

// DeleteCache deletes a cache.
func (c *Client) DeleteCache(ctx context.Context, namespace, name string) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, "caches/"+url.PathEscape(namespace)+"/"+url.PathEscape(name), nil)
	return err
}

// GC removes layers that no volume uses: those that the driver's own garbage collection would remove, or with all, every one.
// With dryRun it removes nothing, and returns what it would remove.
func (c *Client) GC(ctx context.Context, dryRun, all bool) (GCResult, error) {
	query := url.Values{}
	if dryRun {
		query.Set("dryRun", "")
	}
	if all {
		query.Set("all", "")
	}
	return call[GCResult](ctx, c, http.MethodPost, "gc", query)
}

// Pull pulls an image with the node's credentials. It calls progress while the pull runs.
func (c *Client) Pull(ctx context.Context, image string, progress func(Progress)) (Image, error) {
	response, err := c.do(ctx, http.MethodPost, "pull", url.Values{"image": {image}})
	if err != nil {
		return Image{}, err
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	for {
		var event PullEvent
		if err := decoder.Decode(&event); err != nil {
			return Image{}, fmt.Errorf("read the progress of the pull: %w; the driver may have restarted: pull again, it resumes", err)
		}
		switch {
		case event.Error != "":
			return Image{}, errors.New(event.Error)
		case event.Image != nil:
			return *event.Image, nil
		case event.Progress != nil:
			progress(*event.Progress)
		}
	}
}

func call[T any](ctx context.Context, c *Client, method, path string, query url.Values) (T, error) {
	var value T
	response, err := c.do(ctx, method, path, query)
	if err != nil {
		return value, err
	}
	defer response.Body.Close()
	return value, json.NewDecoder(response.Body).Decode(&value)
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values) (*http.Response, error) {
	return c.send(ctx, method, path, query, nil)
}

// send sends a request with a body, which may be nil.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	target := "http://overlay-csi/v1/" + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, fmt.Errorf("connect to the driver: %w; check that it is running, and that --socket names its admin socket", err)
	}
	if response.StatusCode >= 400 {
		defer response.Body.Close()
		message, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
		return nil, errors.Join(errors.New(strings.TrimSpace(string(message))), err)
	}
	return response, nil
}
