package integration

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// besideVariable is set in the processes that runBeside starts.
const besideVariable = "OVERLAY_CSI_TEST_PROCESS"

// runBeside runs the tests of each pattern in a process of their own, several at a time, and returns the exit code. Most of their
// time tests wait for disks and processes.
//
// They do not run beside each other in one process (t.Parallel): until a process that one test starts has reached its exec, it
// has the files open that another test has in a view, and the driver is right not to unmount that.
func runBeside(patterns []string) int {
	queue := make(chan string, len(patterns))
	for _, pattern := range patterns {
		queue <- pattern
	}
	close(queue)
	var failed atomic.Bool
	var printing sync.Mutex
	var workers sync.WaitGroup
	for range processes() {
		workers.Go(func() {
			// A child dies with the thread that started it.
			runtime.LockOSThread()
			for pattern := range queue {
				output, err := runAlone(pattern)
				if err != nil {
					failed.Store(true)
				}
				printing.Lock()
				os.Stdout.Write(output)
				if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
					fmt.Println(err)
				}
				printing.Unlock()
			}
		})
	}
	workers.Wait()
	if failed.Load() {
		fmt.Println("FAIL")
		return 1
	}
	fmt.Println("PASS")
	return 0
}

// runAlone runs the tests of a pattern in a process of their own with this one's flags, and returns what it printed of them.
func runAlone(pattern string) ([]byte, error) {
	var args []string
	flag.Visit(func(f *flag.Flag) {
		if f.Name != "test.run" && f.Name != "test.testlogfile" {
			args = append(args, "-"+f.Name+"="+f.Value.String())
		}
	})
	command := exec.Command(os.Args[0], append(args, "-test.run="+pattern)...)
	command.Env = append(os.Environ(), besideVariable+"=1")
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	output, err := command.CombinedOutput()
	for _, end := range []string{"PASS\n", "FAIL\n"} {
		output = bytes.TrimSuffix(output, []byte(end))
	}
	return output, err
}

// processes is how many tests run beside each other: -parallel, or twice as many as there are processors.
func processes() int {
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() != parallel.DefValue {
		return parallel.Value.(flag.Getter).Get().(int)
	}
	return 2 * runtime.NumCPU()
}

// testsBeside are the tests that were asked for, where they are to run beside each other: not one alone, and not where something
// else was asked for as well.
func testsBeside() []string {
	value := func(name string) string { return flag.Lookup("test." + name).Value.String() }
	if os.Getenv(besideVariable) != "" || strings.Contains(value("run"), "/") || processes() == 1 {
		return nil
	}
	for _, name := range []string{"bench", "list", "fuzz", "coverprofile", "cpuprofile", "memprofile", "trace"} {
		if value(name) != "" {
			return nil
		}
	}
	run := value("run")
	if run == "" {
		run = "."
	}
	output, err := exec.Command(os.Args[0], "-test.list="+run).Output()
	if err != nil {
		return nil
	}
	tests := strings.Fields(string(output))
	if len(tests) < 2 {
		return nil
	}
	// What takes longest begins first.
	slices.SortStableFunc(tests, func(a, b string) int { return slices.Index(long, b) - slices.Index(long, a) })
	var patterns []string
	for _, test := range tests {
		patterns = append(patterns, split(test)...)
	}
	return patterns
}

// long are the tests that take longest, the longest last.
var long = []string{
	"TestCollectUnderLoad", "TestInterruptedWalkIsFinished", "TestOverlaySemantics", "TestPublishRacesUnpublish", "TestFiftyPodsAtOnce",
	"TestManyDiskImages", "TestKillsDuringPulls", "TestCrashOfLimitedUppers", "TestCrash",
}

// split returns the patterns of a test's subtests where they take long, or the test's own.
func split(test string) (patterns []string) {
	var subtests []string
	switch test {
	case "TestCrash", "TestFiftyPodsAtOnce", "TestPublishRacesUnpublish":
		if os.Getenv("OVERLAY_CSI_TEST_NATIVE") == "" {
			subtests = slices.Sorted(maps.Keys(kernels))
		}
	case "TestCrashOfLimitedUppers":
		subtests = crashSystems
	}
	for _, subtest := range subtests {
		patterns = append(patterns, "^"+test+"$/^"+regexp.QuoteMeta(strings.ReplaceAll(subtest, " ", "_"))+"$")
	}
	if patterns == nil {
		return []string{"^" + test + "$"}
	}
	return patterns
}

// useBinaries builds the commands for the processes that run the tests.
func useBinaries() error {
	binary, err := buildDriver()
	if err != nil {
		return err
	}
	if _, err := buildOverlayctl(); err != nil {
		return err
	}
	return os.Setenv("OVERLAY_CSI_BINARY", binary)
}
