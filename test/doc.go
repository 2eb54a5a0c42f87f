// Package test asserts what holds for the project as a whole.
package test
