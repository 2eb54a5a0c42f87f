package erofs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
)

const (
	// maxValue is the largest value of an attribute that Linux takes (XATTR_SIZE_MAX). EROFS has 16 bits for its length, and so one byte less.
	maxValue = 64 << 10
	// textPerAttribute and textPerSet are counted against MaxTextBytes for the memory that an attribute, or a set of some, takes beside its
	// bytes.
	textPerAttribute = 100
	textPerSet       = 100
)

// xattrPrefixes are the prefixes of names that EROFS has numbers for (EROFS_XATTR_INDEX_*). A name that is whole has nothing after it.
var xattrPrefixes = []struct {
	prefix string
	index  uint8
	whole  bool
}{
	{"user.", 1, false},
	{"system.posix_acl_access", 2, true},
	{"system.posix_acl_default", 3, true},
	{"trusted.", 4, false},
	{"security.", 6, false},
}

// attributes are the extended attributes of all inodes. Most files have none, and those that do often have the same: each attribute, and
// each set of attributes, is there once.
type attributes struct {
	attributes []attribute
	byContent  map[string]uint32
	// sets are the indexes of attributes, in the order of their names. The set 0 is empty.
	sets    [][]uint32
	setByID map[string]uint32
}

type attribute struct {
	name, value string
	// uses is how many inodes have it, and shared its position in the shared attributes, from plan on.
	uses, shared uint32
}

func newAttributes() attributes {
	return attributes{byContent: map[string]uint32{}, sets: [][]uint32{nil}, setByID: map[string]uint32{"": 0}}
}

// splitName returns the number of a name's prefix, and what follows it.
func splitName(name string) (index uint8, rest string, err error) {
	for _, p := range xattrPrefixes {
		after, ok := strings.CutPrefix(name, p.prefix)
		switch {
		case !ok || p.whole && after != "":
		case after == "" && !p.whole:
			return 0, "", syscall.EINVAL
		default:
			return p.index, after, nil
		}
	}
	return 0, "", syscall.EOPNOTSUPP
}

// SetXattr sets an extended attribute (setxattr(2)). The error is EOPNOTSUPP for a name that no file system has.
//
// As on a file system, an access control list (system.posix_acl_access) changes the permission bits, and is not kept where they say all.
func (i *Image) SetXattr(of Inode, name string, value []byte) error {
	return failedXattr("setxattr", of, name, i.setXattr(of, name, value))
}

// failedXattr returns an error like that of a system call.
func failedXattr(op string, of Inode, name string, err error) error {
	if err == nil || errors.Is(err, ErrCannotHold) {
		return err
	}
	return &os.PathError{Op: op + " " + name, Path: fmt.Sprint("inode ", of), Err: err}
}

func (i *Image) setXattr(of Inode, name string, value []byte) error {
	switch {
	case name == "" || len(name) > maxName:
		return syscall.ERANGE
	case len(value) > maxValue:
		return syscall.E2BIG
	}
	index, _, err := splitName(name)
	if err != nil {
		return err
	}
	at := i.inode(of)
	switch {
	case index == indexUser && !isType(at.mode, syscall.S_IFREG) && !isType(at.mode, syscall.S_IFDIR):
		return syscall.EPERM
	case index == indexACLAccess || index == indexACLDefault:
		keep, err := i.applyACL(at, index, value)
		if err != nil {
			return err
		}
		if !keep {
			if err := i.removeXattr(of, name); !errors.Is(err, syscall.ENODATA) {
				return err
			}
			return nil
		}
	case name == capabilityName:
		if !isCapability(value) {
			return syscall.EINVAL
		}
	}
	if len(value) == maxValue {
		return fmt.Errorf("%w: the attribute %s has %d bytes, and EROFS takes one less", ErrCannotHold, name, len(value))
	}
	id, err := i.intern(name, string(value))
	if err != nil {
		return err
	}
	return i.changeSet(at, name, id, true)
}

// RemoveXattr removes an extended attribute (removexattr(2)). The error is ENODATA if there is none.
func (i *Image) RemoveXattr(of Inode, name string) error {
	return failedXattr("removexattr", of, name, i.removeXattr(of, name))
}

func (i *Image) removeXattr(of Inode, name string) error {
	at := i.inode(of)
	if _, found := i.attributes.search(at.set, name); !found {
		return syscall.ENODATA
	}
	return i.changeSet(at, name, 0, false)
}

// GetXattr returns an extended attribute (getxattr(2)). The error is ENODATA if there is none.
func (i *Image) GetXattr(of Inode, name string) ([]byte, error) {
	value, found := i.value(of, name)
	if !found {
		return nil, failedXattr("getxattr", of, name, syscall.ENODATA)
	}
	return []byte(value), nil
}

func (i *Image) value(of Inode, name string) (value string, found bool) {
	a, set := &i.attributes, i.inode(of).set
	at, found := a.search(set, name)
	if !found {
		return "", false
	}
	return a.attributes[a.sets[set][at]].value, true
}

// search returns where an attribute is in a set, or would be.
func (a *attributes) search(set uint32, name string) (at int, found bool) {
	return slices.BinarySearchFunc(a.sets[set], name, func(id uint32, name string) int {
		return strings.Compare(a.attributes[id].name, name)
	})
}

// intern returns the index of an attribute.
func (i *Image) intern(name, value string) (uint32, error) {
	a := &i.attributes
	key := name + "\x00" + value
	if id, ok := a.byContent[key]; ok {
		return id, nil
	}
	// The key, and the name and value, which are parts of it.
	size := len(key) + textPerAttribute
	if err := i.checkText(size); err != nil {
		return 0, err
	}
	i.otherText += size
	id := uint32(len(a.attributes))
	a.attributes = append(a.attributes, attribute{name: key[:len(name)], value: key[len(name)+1:]})
	a.byContent[key] = id
	return id, nil
}

// changeSet gives an inode the set that it has, with or without one attribute.
func (i *Image) changeSet(of *inode, name string, id uint32, with bool) error {
	a := &i.attributes
	at, found := a.search(of.set, name)
	set := slices.Clone(a.sets[of.set])
	if found {
		set = slices.Delete(set, at, at+1)
	}
	if with {
		set = slices.Insert(set, at, id)
	}
	var key []byte
	for _, id := range set {
		key = binary.LittleEndian.AppendUint32(key, id)
	}
	known, ok := a.setByID[string(key)]
	if !ok {
		size := 2*len(key) + textPerSet
		if err := i.checkText(size); err != nil {
			return err
		}
		i.otherText += size
		known = uint32(len(a.sets))
		a.sets = append(a.sets, set)
		a.setByID[string(key)] = known
	}
	of.set = known
	return nil
}
