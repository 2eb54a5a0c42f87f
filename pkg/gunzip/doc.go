// Package gunzip decompresses gzip with igzip, in a process without any rights. igzip takes about half of the CPU time of a
// decompressor in Go, and is written in C and assembler, so that what a registry sends must not meet it in a process that may do anything.
//
// It gives no other content than Go's. What igzip refuses, or ends before its last byte, is an [ErrRefused], which Go's decompressor
// decides. igzip takes a few streams that Go's refuses, all with the content that their checksums are of: proposal 30 lists them.
package gunzip
