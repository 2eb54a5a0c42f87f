package access

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// saltSize is the size of the salt in bytes, with which the file of a table begins.
	saltSize = 32
	// idSize is the size of an ID in bytes. The IDs follow the salt, the oldest first.
	idSize = 16
	// maxIDs is the maximum number of IDs. The file then has 1 MiB.
	maxIDs = 64 << 10
)

// ID is a salted hash of what was accepted. It does not disclose names or credentials, and another node has other IDs.
type ID string

// table is a set of IDs in a file. An entry that is lost, with the file or by damage, only means that a registry is asked again.
type table struct {
	path string
	salt []byte

	mu    sync.Mutex
	ids   map[ID]bool
	order []ID
	// isStored reports whether the file has the table. If not, the next ID has it written as a whole: the disk may have been full.
	isStored bool
}

// openTable reads a table. It begins a new one if the file is missing, damaged, or cannot be read. The disk need not be writable.
func openTable(path string) *table {
	t := &table{path: path, ids: map[ID]bool{}}
	data, err := readTable(path)
	if err != nil || len(data) < saltSize {
		t.salt = make([]byte, saltSize)
		rand.Read(t.salt)
		_ = t.write()
		return t
	}
	t.salt, data = data[:saltSize], data[saltSize:]
	for ; len(data) >= idSize; data = data[idSize:] {
		t.addLocked(ID(hex.EncodeToString(data[:idSize])))
	}
	// A crash can have left a part of an ID.
	t.isStored = len(data) == 0
	return t
}

func readTable(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, saltSize+maxIDs*idSize))
}

// write replaces the file.
func (t *table) write() error {
	data := t.salt[:saltSize:saltSize]
	for _, id := range t.order {
		data = append(data, id.bytes()...)
	}
	dir, err := linux.OpenDir(filepath.Dir(t.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	err = linux.WriteFileAtomic(dir, filepath.Base(t.path), data, true)
	t.isStored = err == nil
	return err
}

func (i ID) bytes() []byte {
	// hash made the ID.
	data, _ := hex.DecodeString(string(i))
	return data
}

// hash returns the ID of a list of texts.
func (t *table) hash(texts ...string) ID {
	mac := hmac.New(sha256.New, t.salt)
	for _, text := range texts {
		fmt.Fprintf(mac, "%d:%s", len(text), text)
	}
	return ID(hex.EncodeToString(mac.Sum(nil)[:idSize]))
}

// has reports whether one of the IDs is in the table.
func (t *table) has(ids ...ID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range ids {
		if t.ids[id] {
			return true
		}
	}
	return false
}

func (t *table) addLocked(id ID) {
	if !t.ids[id] {
		t.ids[id] = true
		t.order = append(t.order, id)
	}
}

// add adds an ID. When there is no room for it, the older half of the table is forgotten. After an error the ID is only in memory.
func (t *table) add(id ID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ids[id] {
		return nil
	}
	if len(t.order) < maxIDs {
		t.addLocked(id)
		if !t.isStored {
			return t.write()
		}
		return t.append(id)
	}
	for _, old := range t.order[:maxIDs/2] {
		delete(t.ids, old)
	}
	t.order = append([]ID{}, t.order[maxIDs/2:]...)
	t.addLocked(id)
	return t.write()
}

// append appends an ID to the file. It does not sync: a power cut may lose the ID.
func (t *table) append(id ID) error {
	file, err := os.OpenFile(t.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(id.bytes())
	err = errors.Join(err, file.Close())
	t.isStored = err == nil
	return err
}
