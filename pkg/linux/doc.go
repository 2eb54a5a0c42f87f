// Package linux wraps the system calls that the driver needs and that the standard library lacks.
//
// It is the only package that imports golang.org/x/sys/unix. Each call is wrapped once, by these rules:
//
//   - A handle is an *os.File whose name is the full path by which it was opened. Where a function takes a directory and a path,
//     the path is looked up in that directory, and a nil directory means the current one, so that absolute paths need none.
//   - Every handle is close-on-exec.
//   - A call that a signal interrupted (EINTR) is made again. So is a lookup that failed only because something was renamed or
//     mounted beside it (EAGAIN); see [Open].
//   - An error is an [os.PathError] or [os.LinkError] with the name of the system call and the full path. Compare it with
//     errors.Is to a syscall.Errno (syscall.ENOSPC) or an error of io/fs.
package linux
