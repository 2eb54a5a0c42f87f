package overlaynode

import (
	"crypto/ecdh"
	"crypto/hpke"
	"encoding/base64"
	"fmt"

	"github.com/containerd/errdefs"
)

// Key is the key of a node's driver, by which it alone can read the secrets in its requests: whoever may read the OverlayNodes cannot. It
// lasts as long as the process, and is on no disk.
type Key struct {
	private hpke.PrivateKey
}

// suite is how secrets are sealed (RFC 9180): with a key agreement over X25519.
func suite() (hpke.KEM, hpke.KDF, hpke.AEAD) {
	return hpke.DHKEM(ecdh.X25519()), hpke.HKDFSHA256(), hpke.AES256GCM()
}

// NewKey makes a key.
func NewKey() (*Key, error) {
	kem, _, _ := suite()
	private, err := kem.GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("make a key for secrets: %w", err)
	}
	return &Key{private}, nil
}

// Public returns the public part of the key, as an OverlayNode has it.
func (k *Key) Public() string {
	return base64.StdEncoding.EncodeToString(k.private.PublicKey().Bytes())
}

// Open returns what Seal sealed with the same purpose for this key. It returns ErrUnavailable for what was sealed for another one, as that
// of an earlier process: it can be sealed again.
func (k *Key) Open(purpose, sealed string) ([]byte, error) {
	data, err := base64.StdEncoding.DecodeString(sealed)
	if err != nil {
		return nil, fmt.Errorf("%w: read a sealed secret: %w", errdefs.ErrInvalidArgument, err)
	}
	_, kdf, aead := suite()
	opened, err := hpke.Open(k.private, kdf, aead, []byte(purpose), data)
	if err != nil {
		return nil, fmt.Errorf("%w: open a sealed secret: %w; it may be for a driver that has ended, try again", errdefs.ErrUnavailable, err)
	}
	return opened, nil
}

// Seal encrypts a secret for the driver of a node. It can be opened for the same purpose alone. It returns ErrUnavailable if the driver has
// written no key yet.
func (n *OverlayNode) Seal(purpose string, secret []byte) (string, error) {
	if n.Status.PublicKey == "" {
		return "", fmt.Errorf("%w: the driver of node %s has written no key for secrets; it is older than the controller, or does not run",
			errdefs.ErrUnavailable, n.Spec.Node)
	}
	data, err := base64.StdEncoding.DecodeString(n.Status.PublicKey)
	if err != nil {
		return "", fmt.Errorf("%w: the key of node %s: %w", errdefs.ErrUnavailable, n.Spec.Node, err)
	}
	kem, kdf, aead := suite()
	public, err := kem.NewPublicKey(data)
	if err != nil {
		return "", fmt.Errorf("%w: the key of node %s: %w", errdefs.ErrUnavailable, n.Spec.Node, err)
	}
	sealed, err := hpke.Seal(public, kdf, aead, []byte(purpose), secret)
	if err != nil {
		return "", fmt.Errorf("seal a secret for node %s: %w", n.Spec.Node, err)
	}
	return base64.StdEncoding.EncodeToString(sealed), nil
}
