// Package gunzip decompresses gzip with igzip, in a process without any rights. igzip takes about half of the CPU time of a
// decompressor in Go, and is written in C and assembler, so that what a registry sends must not meet it in a process that may do anything.
//
// It gives no other answers than Go's: what igzip refuses, or takes although Go would not, is an [ErrRefused].
package gunzip
