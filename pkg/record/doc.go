// Package record stores what the driver knows of each volume on its node: one file, volume.json, in the volume's directory
// of the data root.
//
// The record is written before the upper and the mount that it describes exist, so that the next process finds whatever an
// earlier one was doing. It replaces the one before as a whole (a new file, renamed). What can be derived is not in it:
// whether a target is mounted only the kernel knows.
//
// The record of a volume with a persistent upper is synced before it has its name, so that a power cut leaves the old
// record or the new one. A power cut may leave the record of an ephemeral volume empty, which is harmless: its upper does
// not survive a power cut either.
package record
