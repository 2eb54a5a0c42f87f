// Package uppertest is the suite of tests that every backend of package upper passes.
package uppertest
