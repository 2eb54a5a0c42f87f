package api

import (
	"context"
	"net/http"
	"net/url"
)

// Conflict is an entry that both what was written to a volume and other layers changed, each in its own way.
type Conflict struct {
	// Path is relative to the root of the volume. RawPath has the bytes of one that is no UTF-8.
	Path    string `json:"path"`
	RawPath []byte `json:"rawPath,omitempty"`
	// Upper is what the volume did to the entry of its layers, and Layers what the other ones did: A for added, C for changed, D for
	// deleted.
	Upper  string `json:"upper"`
	Layers string `json:"layers"`
}

// RebaseEvent is one line of the answer to a request for the conflicts of a rebase. The last one has End or Error.
type RebaseEvent struct {
	Conflict *Conflict `json:"conflict,omitempty"`
	End      bool      `json:"end,omitempty"`
	Error    string    `json:"error,omitempty"`
}

// Rebase calls conflict for each conflict that a claim made from a volume with these layers would have. Nothing changes.
func (c *Client) Rebase(ctx context.Context, id string, layers []string, conflict func(Conflict) error) error {
	response, err := c.do(ctx, http.MethodGet, "volumes/"+url.PathEscape(id)+"/rebase", url.Values{"layer": layers})
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return readEvents(response.Body, "conflicts of volume "+id, func(event RebaseEvent) (end bool, message string, err error) {
		if event.Conflict != nil {
			err = conflict(*event.Conflict)
		}
		return event.End, event.Error, err
	})
}
