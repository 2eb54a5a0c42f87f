package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// startTimeout is how long the start of a program may take.
const startTimeout = 30 * time.Second

// maxReason is how much is read of why a program could not be started, in bytes.
const maxReason = 1 << 10

// Process is a program that runs in a sandbox.
type Process struct {
	cmd    *exec.Cmd
	exited chan error
}

// Start starts the program of a root with arguments. helper is a command that calls [Main]; it gives its rights up and becomes the
// program. The program reads from stdin and writes to stdout, which are descriptors of pipes and stay open here. It is killed when this
// process ends. An error means that the program has read nothing.
func Start(root *Root, helper, args []string, stdin, stdout *os.File) (*Process, error) {
	status, statusEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer status.Close()
	cmd := exec.Command(helper[0], append(helper[1:len(helper):len(helper)], args...)...)
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = stdin, stdout, statusEnd, []*os.File{root.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:  syscall.SIGKILL,
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
	}
	process := &Process{cmd, make(chan error, 1)}
	started := make(chan error)
	go func() {
		// The kernel kills the program when the thread ends that started it, and others end threads of this process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			process.exited <- cmd.Wait()
		}
	}()
	err = <-started
	statusEnd.Close()
	if err != nil {
		return nil, err
	}
	if err := awaitExec(status); err != nil {
		process.Kill()
		<-process.exited
		return nil, err
	}
	return process, nil
}

// awaitExec waits until the helper has become the program, which closes the other end of status, or says why it did not.
func awaitExec(status *os.File) error {
	if err := status.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	reason, err := io.ReadAll(io.LimitReader(status, maxReason))
	if err != nil {
		return fmt.Errorf("wait for the start: %w", err)
	}
	if len(reason) > 0 {
		return errors.New(strings.TrimSpace(strings.ToValidUTF8(string(reason), "?")))
	}
	return nil
}

// PID returns the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited returns a channel that receives once how the program ended: nil for status 0, otherwise an *[exec.ExitError].
func (p *Process) Exited() <-chan error { return p.exited }

// Kill ends the program.
func (p *Process) Kill() {
	// It has ended already if that fails.
	_ = p.cmd.Process.Kill()
}
