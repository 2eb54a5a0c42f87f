// Package admin serves the admin socket, on which overlayctl talks to a running driver: JSON over HTTP, for root alone.
// Package api has the client and the JSON form.
package admin
