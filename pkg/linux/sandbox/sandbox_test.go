package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

const (
	helperArgument = "sandbox-helper"
	driverArgument = "sandbox-driver"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == helperArgument {
		os.Exit(Main(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == driverArgument {
		os.Exit(drive())
	}
	os.Exit(m.Run())
}

// drive starts a program that neither reads, writes nor ends, prints its process ID, and waits.
func drive() int {
	root, err := NewRoot("/bin/dash")
	if err == nil {
		var process *Process
		args := []string{"-c", "while :; do :; done"}
		if process, err = Start(root, []string{"/proc/self/exe", helperArgument}, args, os.Stdin, os.Stdin); err == nil {
			fmt.Println(process.PID())
			err = <-process.Exited()
		}
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// start starts a program in a sandbox.
func start(t *testing.T, program string, args ...string) (_ *Process, stdin, stdout *os.File) {
	t.Helper()
	needs.Root(t)
	root, err := NewRoot(program)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	in, stdin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	stdout, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	process, err := Start(root, []string{"/proc/self/exe", helperArgument}, args, in, out)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		process.Kill()
		stdin.Close()
		stdout.Close()
	})
	return process, stdin, stdout
}

// TestRights looks at a program in a sandbox as the kernel describes it.
func TestRights(t *testing.T) {
	process, stdin, stdout := start(t, "/bin/cat")
	// It runs when it answers.
	if _, err := io.WriteString(stdin, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	proc := filepath.Join("/proc", fmt.Sprint(process.PID()))
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		t.Fatal(err)
	}
	const id = "2000000030"
	for key, want := range map[string]string{
		"Uid": strings.Repeat(id+" ", 4), "Gid": strings.Repeat(id+" ", 4), "Groups": "", "NoNewPrivs": "1", "Seccomp": "2", "Threads": "1",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000",
		"CapAmb": "0000000000000000",
	} {
		if got := valueOf(string(status), key); got != strings.TrimSpace(want) {
			t.Errorf("%s: %q, not %q", key, got, want)
		}
	}
	if got := names(t, filepath.Join(proc, "fd")); !slices.Equal(got, []string{"0", "1"}) {
		t.Errorf("descriptors %q", got)
	}
	if got := names(t, filepath.Join(proc, "root")); !slices.Contains(got, programName) || len(got) > 5 || slices.Contains(got, "proc") {
		t.Errorf("root has %q", got)
	}
	if err := os.WriteFile(filepath.Join(proc, "root", "new"), nil, 0o600); err == nil {
		t.Error("the root can be written to")
	}
	for _, namespace := range []string{"net", "ipc", "uts", "pid"} {
		ours, err := os.Readlink(filepath.Join("/proc/self/ns", namespace))
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := os.Readlink(filepath.Join(proc, "ns", namespace))
		if err != nil || ours == theirs {
			t.Errorf("namespace %s: %s, ours is %s: %v", namespace, theirs, ours, err)
		}
	}
	limits, err := os.ReadFile(filepath.Join(proc, "limits"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Max address space 67108864 67108864 bytes", "Max file size 0 0 bytes", "Max core file size 1 1 bytes"} {
		if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), want) {
			t.Errorf("no limit %q in\n%s", want, limits)
		}
	}
	stdin.Close()
	if err := <-process.Exited(); err != nil {
		t.Errorf("cat ended with %v", err)
	}
}

// TestShell has a shell try what an attacker would.
func TestShell(t *testing.T) {
	for name, script := range map[string]string{
		"write a file":     "echo x > /file",
		"begin a process":  "(echo x)",
		"end the parent":   "kill -9 1",
		"read a file":      "read x < /etc/passwd",
		"look upward":      "read x < ../../../../proc/self/status",
		"take more memory": "ulimit -v unlimited",
	} {
		t.Run(name, func(t *testing.T) {
			process, stdin, stdout := start(t, "/bin/dash", "-c", script+" && echo done")
			stdin.Close()
			output, err := io.ReadAll(stdout)
			if err != nil || strings.Contains(string(output), "done") {
				t.Errorf("it could: %q %v", output, err)
			}
			if err := <-process.Exited(); err == nil {
				t.Error("it could")
			}
		})
	}
	t.Run("nothing", func(t *testing.T) {
		process, _, stdout := start(t, "/bin/dash", "-c", "echo done")
		output, err := io.ReadAll(stdout)
		if exit := <-process.Exited(); err != nil || exit != nil || string(output) != "done\n" {
			t.Errorf("%q %v %v", output, err, exit)
		}
	})
}

// TestUmask: the program's user may read the root, although files of this process are for its own user alone.
func TestUmask(t *testing.T) {
	before := unix.Umask(0o077)
	defer unix.Umask(before)
	process, stdin, _ := start(t, "/bin/cat")
	stdin.Close()
	if err := <-process.Exited(); err != nil {
		t.Errorf("cat ended with %v", err)
	}
}

// TestKill ends a program that does not end by itself.
func TestKill(t *testing.T) {
	process, _, _ := start(t, "/bin/dash", "-c", "while :; do :; done")
	process.Kill()
	if err := <-process.Exited(); err == nil {
		t.Error("no error of a killed program")
	}
}

// TestDriverKilled: the program ends with the process that has started it, although it uses none of its pipes.
func TestDriverKilled(t *testing.T) {
	needs.Root(t)
	driver := exec.Command("/proc/self/exe", driverArgument)
	driver.Stderr = os.Stderr
	output, err := driver.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := driver.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, scanErr := fmt.Fscan(output, &pid)
	fd, err := unix.PidfdOpen(pid, 0)
	if err := errors.Join(scanErr, err, driver.Process.Kill()); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	_ = driver.Wait()
	ended := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(ended, int(startTimeout.Milliseconds())); n != 1 || err != nil {
		t.Errorf("process %d goes on: %v", pid, errors.Join(err, unix.Kill(pid, unix.SIGKILL)))
	}
}

// TestCannotStart: the reason is that of the helper.
func TestCannotStart(t *testing.T) {
	needs.Root(t)
	// Without its library the program cannot begin, but that is after its start; without itself it cannot start.
	root, err := NewRoot("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := Start(root, []string{"/bin/sh", "-c", "echo reason >&2"}, nil, null, null); err == nil || err.Error() != "reason" {
		t.Errorf("error %v", err)
	}
	if _, err := Start(root, []string{"/no/such/helper"}, nil, null, null); err == nil {
		t.Error("no error")
	}
}

func valueOf(status, key string) string {
	for _, line := range strings.Split(status, "\n") {
		if name, value, ok := strings.Cut(line, ":"); ok && name == key {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	return "missing"
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}
