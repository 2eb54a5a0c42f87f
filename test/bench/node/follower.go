package main

import (
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// follower follows the mount table as systemd does: it polls it, and reads all of it after a change, at most five times in a second.
// What that takes, process 1 takes on a node with systemd.
type follower struct {
	// cpu is the processor time that it took, in nanoseconds, and reads how often it read the table.
	cpu, reads atomic.Int64
	stopped    chan struct{}
	err        error
}

// followerReads is how often systemd reads the table in a second (mount_setup_bus_event_source, RATELIMIT of src/core/mount.c).
const followerReads = 5

// follow starts a follower, which stop ends.
func follow() (f *follower, stop func() error) {
	f = &follower{stopped: make(chan struct{})}
	end := make(chan struct{})
	go func() {
		defer close(f.stopped)
		// Its thread is not used for anything else.
		runtime.LockOSThread()
		f.err = f.run(end)
	}()
	return f, func() error {
		close(end)
		<-f.stopped
		return f.err
	}
}

func (f *follower) run(end <-chan struct{}) error {
	// Not by os.Open: the runtime would poll it too, and take the changes.
	table, err := unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(table)
	buffer := make([]byte, 4<<10)
	for {
		select {
		case <-end:
			return nil
		case <-time.After(time.Second / followerReads):
		}
		changed, err := unix.Poll([]unix.PollFd{{Fd: int32(table), Events: unix.POLLPRI}}, 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if changed > 0 {
			if err := readAll(table, buffer); err != nil {
				return err
			}
			f.reads.Add(1)
		}
		var usage unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_THREAD, &usage); err != nil {
			return err
		}
		f.cpu.Store(usage.Utime.Nano() + usage.Stime.Nano())
	}
}

// readAll reads a file from its beginning, in pieces of what the C library reads at once.
func readAll(file int, buffer []byte) error {
	if _, err := unix.Seek(file, 0, unix.SEEK_SET); err != nil {
		return os.NewSyscallError("lseek", err)
	}
	for {
		n, err := unix.Read(file, buffer)
		if err != nil || n == 0 {
			return os.NewSyscallError("read", err)
		}
	}
}
