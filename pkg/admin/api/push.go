package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/opencontainers/go-digest"
)

// PushedImage is an image that was pushed.
type PushedImage struct {
	Name   string        `json:"name"`
	Digest digest.Digest `json:"digest"`
}

// PushProgress is the progress of a push.
type PushProgress struct {
	// Sent is the number of bytes that the registry has, of Total. Total is 0 while the volume is read for the first time.
	Sent  int64 `json:"sent"`
	Total int64 `json:"total"`
}

// PushEvent is a line of the answer to a push. The last one has Image or Error.
type PushEvent struct {
	Progress *PushProgress `json:"progress,omitempty"`
	Image    *PushedImage  `json:"image,omitempty"`
	Error    string        `json:"error,omitempty"`
}

// Push pushes what was written to a volume as an image, with the logins of a Docker config.json, which may be empty, and those of the node.
// It calls progress while the push runs.
func (c *Client) Push(ctx context.Context, id, image string, secret []byte, progress func(PushProgress)) (PushedImage, error) {
	query := url.Values{"image": {image}}
	response, err := c.send(ctx, http.MethodPost, "volumes/"+url.PathEscape(id)+"/push", query, bytes.NewReader(secret))
	if err != nil {
		return PushedImage{}, err
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	for {
		var event PushEvent
		if err := decoder.Decode(&event); err != nil {
			return PushedImage{}, fmt.Errorf("read the progress of the push: %w; the driver may have restarted: push again, it goes on", err)
		}
		switch {
		case event.Error != "":
			return PushedImage{}, errors.New(event.Error)
		case event.Image != nil:
			return *event.Image, nil
		case event.Progress != nil && progress != nil:
			progress(*event.Progress)
		}
	}
}
