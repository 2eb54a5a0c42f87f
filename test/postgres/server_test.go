package postgres

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

// programs is where Debian's packages of PostgreSQL have their programs, one directory for each version.
const programs = "/usr/lib/postgresql/*/bin"

// database is a data directory, and a server that may run on it. It is run by the user postgres, as the server wants.
type database struct {
	t           *testing.T
	bin         string
	credential  *syscall.Credential
	dir, socket string
	server      *exec.Cmd
	ended       chan struct{}
}

// newDatabase binds a volume's target to where the user can reach it, as a container has it, for the end of the test at the latest.
func newDatabase(t *testing.T, target string) *database {
	t.Helper()
	found := installed(t)
	uid, gid := postgresUser(t)
	mounted, err := os.MkdirTemp("", "overlay-csi-postgres-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(mounted)) })
	volume := filepath.Join(mounted, "volume")
	must(t, errors.Join(os.Chmod(mounted, 0o755), os.Mkdir(volume, 0o755), os.Chown(mounted, uid, gid)))
	must(t, unix.Mount(target, volume, "", unix.MS_BIND, ""))
	d := &database{t: t, bin: slices.Max(found), dir: filepath.Join(volume, "pgdata"), socket: mounted,
		credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	t.Cleanup(d.close)
	return d
}

// installed returns the directories with programs.
func installed(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(programs)
	must(t, err)
	if len(found) == 0 {
		needs.Program(t, fmt.Errorf("%s: %w; apt-get install postgresql", programs, exec.ErrNotFound))
	}
	return found
}

// postgresUser returns the user and group that Debian's package makes.
func postgresUser(t *testing.T) (uid, gid int) {
	t.Helper()
	owner, err := user.Lookup("postgres")
	must(t, err)
	uid, err = strconv.Atoi(owner.Uid)
	must(t, err)
	gid, err = strconv.Atoi(owner.Gid)
	must(t, err)
	return uid, gid
}

// close stops the server, and unmounts the volume.
func (d *database) close() {
	d.stop(syscall.SIGINT)
	if err := unix.Unmount(filepath.Dir(d.dir), 0); err != nil && !errors.Is(err, unix.EINVAL) {
		d.t.Error(err)
	}
}

func (d *database) command(program string, args ...string) *exec.Cmd {
	command := exec.Command(filepath.Join(d.bin, program), args...)
	command.Dir = d.socket
	command.Env = []string{"PATH=" + d.bin, "LC_ALL=C", "PGHOST=" + d.socket, "PGUSER=postgres", "PGDATABASE=postgres"}
	command.SysProcAttr = &syscall.SysProcAttr{Credential: d.credential, Pdeathsig: syscall.SIGKILL}
	return command
}

// run runs a program to its end, and returns what it printed.
func (d *database) run(program string, args ...string) string {
	d.t.Helper()
	output, err := d.command(program, args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s %q: %v\n%s", program, args, err, output)
	}
	return strings.TrimSpace(string(output))
}

// start starts the server, and returns once it answers. Of a directory whose server did not stop in order, it has replayed the log then.
func (d *database) start() {
	d.t.Helper()
	// In a copy of a directory that is in use, it names the process of the source. In a container that would be the server itself.
	if err := os.Remove(filepath.Join(d.dir, "postmaster.pid")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(d.socket, "log"))
	must(d.t, err)
	defer log.Close()
	server := d.command("postgres", "-D", d.dir, "-c", "listen_addresses=", "-c", "unix_socket_directories="+d.socket,
		"-c", "shared_buffers=16MB", "-c", "max_connections=20", "-c", "checkpoint_timeout=30s")
	server.Stdout, server.Stderr = log, log
	ended, started := make(chan struct{}), make(chan error)
	go func() {
		// Pdeathsig is sent when the thread ends that started the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := server.Start()
		started <- err
		if err == nil {
			_ = server.Wait()
			close(ended)
		}
	}()
	must(d.t, <-started)
	d.server, d.ended = server, ended
	for d.command("pg_isready").Run() != nil {
		select {
		case <-ended:
			content, _ := os.ReadFile(log.Name())
			d.t.Fatalf("the server has ended: %s\n%s", server.ProcessState, content)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends the server with one of its signals: SIGINT in order, SIGQUIT at once.
func (d *database) stop(signal syscall.Signal) {
	if d.server == nil {
		return
	}
	_ = d.server.Process.Signal(signal)
	<-d.ended
	d.server = nil
}

// query returns what a query answers, one line.
func (d *database) query(sql string) string {
	d.t.Helper()
	return d.run("psql", "-X", "-At", "-c", sql)
}

// transactions returns how many transactions of pgbench the database has.
func (d *database) transactions() int {
	d.t.Helper()
	count, err := strconv.Atoi(d.query("SELECT count(*) FROM pgbench_history"))
	must(d.t, err)
	return count
}

// check checks every table and index, and that each transaction of pgbench is there as a whole: it adds one amount to an account, a teller,
// a branch and the history.
func (d *database) check() {
	d.t.Helper()
	d.run("pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--parent-check")
	sums := d.query(`SELECT count(DISTINCT s) FROM (
		SELECT sum(abalance) s FROM pgbench_accounts UNION ALL SELECT sum(tbalance) FROM pgbench_tellers UNION ALL
		SELECT sum(bbalance) FROM pgbench_branches UNION ALL SELECT coalesce(sum(delta), 0) FROM pgbench_history) sums`)
	counts := d.query(`SELECT (SELECT count(*) FROM pgbench_accounts), (SELECT count(*) FROM pgbench_tellers),
		(SELECT count(*) FROM pgbench_branches)`)
	if sums != "1" || counts != "100000|10|1" {
		d.t.Errorf("%s different sums, and %s accounts, tellers and branches", sums, counts)
	}
}
