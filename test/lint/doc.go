// Command lint is the project's vet tool: analyzers that others wrote, with this project's settings, in one program, so that
// packages are loaded once and go vet caches the results. make lint runs it.
package main
