package erofs

import (
	"encoding/binary"
	"syscall"
)

const (
	indexUser       = 1
	indexACLAccess  = 2
	indexACLDefault = 3

	aclAccessName  = "system.posix_acl_access"
	capabilityName = "security.capability"
)

// The form of an access control list in an attribute (include/uapi/linux/posix_acl_xattr.h): a version, then entries of a tag, permissions
// and an ID.
const (
	aclVersion   = 2
	aclHeader    = 4
	aclEntry     = 8
	aclUserObj   = 0x01
	aclUser      = 0x02
	aclGroupObj  = 0x04
	aclGroup     = 0x08
	aclMask      = 0x10
	aclOther     = 0x20
	aclUndefined = 1<<32 - 1
)

// applyACL does what file systems do when a list is set (posix_acl_from_xattr, posix_acl_valid and posix_acl_update_mode in
// fs/posix_acl.c). keep reports whether the list says more than the permission bits.
func (i *Image) applyACL(of *inode, index uint8, value []byte) (keep bool, _ error) {
	if isType(of.mode, syscall.S_IFLNK) {
		return false, syscall.EOPNOTSUPP
	}
	if len(value) == 0 {
		return false, nil
	}
	if len(value) < aclHeader {
		return false, syscall.EINVAL
	}
	if binary.LittleEndian.Uint32(value) != aclVersion {
		return false, syscall.EOPNOTSUPP
	}
	if (len(value)-aclHeader)%aclEntry != 0 {
		return false, syscall.EINVAL
	}
	isDefault := index == indexACLDefault
	if len(value) == aclHeader {
		return false, nil
	}
	mode, extended, err := readACL(value[aclHeader:])
	if err != nil {
		return false, err
	}
	if isDefault {
		if !isType(of.mode, syscall.S_IFDIR) {
			return false, syscall.EACCES
		}
		return true, nil
	}
	of.mode = of.mode&^0o777 | mode
	return extended, nil
}

// readACL checks the entries of a list. It returns the permission bits that they mean, and whether there is more to them.
func readACL(entries []byte) (mode uint16, extended bool, _ error) {
	// state is the tag that may come next, and those after it.
	state, needsMask := uint16(aclUserObj), false
	for ; len(entries) > 0; entries = entries[aclEntry:] {
		tag, perm := binary.LittleEndian.Uint16(entries), binary.LittleEndian.Uint16(entries[2:])
		isNamed := tag == aclUser || tag == aclGroup
		valid := perm <= 0o7 && (!isNamed || binary.LittleEndian.Uint32(entries[4:]) != aclUndefined)
		switch tag {
		case aclUserObj:
			valid = valid && state == aclUserObj
			state, mode = aclUser, mode|perm<<6
		case aclGroupObj:
			valid = valid && state == aclUser
			state, mode = aclGroup, mode|perm<<3
		case aclUser, aclGroup:
			valid = valid && state == tag
			needsMask, extended = true, true
		case aclMask:
			valid = valid && state == aclGroup
			state, mode, extended = aclOther, mode&^0o070|perm<<3, true
		case aclOther:
			valid = valid && (state == aclOther || state == aclGroup && !needsMask)
			state, mode = 0, mode|perm
		default:
			valid = false
		}
		if !valid {
			return 0, false, syscall.EINVAL
		}
	}
	if state != 0 {
		return 0, false, syscall.EINVAL
	}
	return mode, extended, nil
}

// chmodACL returns a list that permission bits were set on (__posix_acl_chmod_masq in fs/posix_acl.c).
func chmodACL(value []byte, mode uint32) []byte {
	group := 0
	for at := aclHeader; at < len(value); at += aclEntry {
		set := func(bits uint32) { binary.LittleEndian.PutUint16(value[at+2:], uint16(bits&0o7)) }
		switch binary.LittleEndian.Uint16(value[at:]) {
		case aclUserObj:
			set(mode >> 6)
		case aclOther:
			set(mode)
		case aclGroupObj, aclMask:
			// The mask comes after the group, and stands for it.
			group = at
		}
	}
	binary.LittleEndian.PutUint16(value[group+2:], uint16(mode>>3&0o7))
	return value
}

// isCapability reports whether a value is a set of capabilities of a file (cap_convert_nscap in security/commoncap.c): its version, and
// with it its length.
func isCapability(value []byte) bool {
	const (
		revisionMask = 0xff000000
		revision2    = 0x02000000
		revision3    = 0x03000000
		size2        = 20
		size3        = 24
	)
	if len(value) < 4 {
		return false
	}
	switch binary.LittleEndian.Uint32(value) & revisionMask {
	case revision2:
		return len(value) == size2
	case revision3:
		// The user that is root for them has an ID.
		return len(value) == size3 && binary.LittleEndian.Uint32(value[size2:]) != aclUndefined
	}
	return false
}
