package main

import (
	"strings"
	"unicode/utf8"

	nilnil "github.com/Antonboom/nilnil/pkg/analyzer"
	"github.com/OpenPeeDeeP/depguard/v2"
	"github.com/nishanths/exhaustive/passes/exhaustive"
	"github.com/polyfloyd/go-errorlint/errorlint"
	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/unitchecker"
)

// imports are rules that go vet -vettool checks with every build tag. test/imports_test.go has the map of packages.
var imports = depguard.LinterSettings{
	"system calls": {
		ListMode: "lax",
		Files:    []string{"!$test", "!**/pkg/linux/**", "!**/test/**"},
		Deny: map[string]string{
			"golang.org/x/sys/unix": "only pkg/linux makes system calls that the standard library lacks; error numbers are in package syscall",
		},
	},
	"no logrus": {
		ListMode: "lax",
		Files:    []string{"!$test", "!**/pkg/registry/**", "!**/pkg/store/**"},
		Deny:     map[string]string{"github.com/sirupsen/logrus$": "the driver logs through klog"},
	},
	"downward": {
		ListMode: "lax",
		Files:    []string{"**/pkg/**", "!$test", "!**/uppertest/**"},
		Deny: map[string]string{
			"github.com/overlay-csi/overlay-csi/cmd":  "packages import downward",
			"github.com/overlay-csi/overlay-csi/test": "the driver has no test code in it",
			"testing": "the driver has no test code in it",
		},
	},
}

// maxLine is the number of characters that a line may have.
const maxLine = 140

var lineLength = &analysis.Analyzer{
	Name: "linelength",
	Doc:  "report lines that are longer than 140 characters",
	Run: func(pass *analysis.Pass) (any, error) {
		for _, f := range pass.Files {
			file := pass.Fset.File(f.Package)
			if !strings.HasSuffix(file.Name(), ".go") {
				continue
			}
			content, err := pass.ReadFile(file.Name())
			if err != nil {
				return nil, err
			}
			for i, line := range strings.Split(string(content), "\n") {
				if n := utf8.RuneCountInString(line); n > maxLine {
					pass.Reportf(file.LineStart(i+1), "line of %d characters, at most %d", n, maxLine)
				}
			}
		}
		return struct{}{}, nil
	},
}

func main() {
	rules, err := depguard.NewAnalyzer(&imports)
	if err != nil {
		panic(err)
	}
	if err := exhaustive.Analyzer.Flags.Set("d", "true"); err != nil {
		panic(err)
	}
	unitchecker.Main(errorlint.NewAnalyzer(), exhaustive.Analyzer, lineLength, nilnil.New(), rules)
}
