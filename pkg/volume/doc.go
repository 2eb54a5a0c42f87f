// Package volume is the life of volumes on one node: it creates, publishes, expands, unpublishes and deletes them, reports
// their usage and health, and reconciles what a crash left.
//
// [Manager] has one method for each of these. Operations on one volume exclude each other; operations on different volumes
// do not wait for each other. [Manager.Publish] is a list of steps, each with its undo.
package volume
