// Package sandbox runs a program that parses what nobody trusts, in a process without any rights: its own user and group, no
// capabilities, a root with nothing but the program, read-only, no network, a list of permitted system calls, a memory limit, and no
// descriptors but standard input and output.
//
// Proposal 30 says why it is made this way, and what is left to whoever takes the program over.
package sandbox
