package drivertest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// NFSServer is the kernel's own NFSv4 server, which serves one directory, read-only. Its clients reach it through this process, which
// can keep back what they say: the server is away then, its host being there or not.
type NFSServer struct {
	proxy net.Listener
	// passing is held for reading by whoever passes something on, and for writing while the server is away.
	passing sync.RWMutex
}

// Where the kernel's server is configured, and the port that it gets.
const (
	nfsd     = "/proc/fs/nfsd"
	nfsdPort = 20490
)

// HasNFS reports whether this kernel has NFS, client and server, and nobody uses the server yet.
func HasNFS() bool {
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(known), "\tnfs4\n") || !strings.Contains(string(known), "\tnfsd\n") {
		return false
	}
	threads, err := os.ReadFile(nfsd + "/threads")
	return err != nil || strings.TrimSpace(string(threads)) == "0"
}

// ServeNFS serves a directory until Close. It is alone on the machine: the kernel has one server.
func ServeNFS(dir string) (*NFSServer, error) {
	if err := unix.Mount("nfsd", nfsd, "nfsd", 0, ""); err != nil {
		return nil, fmt.Errorf("mount %s: %w", nfsd, err)
	}
	// What rpc.mountd would answer when the kernel asks: who 127.0.0.1 is, which path has the file handles of the export 0, and how
	// that is exported. All of it is valid until 2038. The flags (include/uapi/linux/nfsd/export.h): read-only, from any port, with
	// no check for subtrees, numbered.
	const flags = 0x1 | 0x2 | 0x400 | 0x2000
	for _, setting := range [][2]string{
		{"/proc/net/rpc/auth.unix.ip/channel", "nfsd 127.0.0.1 2147483647 test\n"},
		{"/proc/net/rpc/nfsd.export/channel", fmt.Sprintf("test %s 2147483647 %d 65534 65534 0\n", dir, flags)},
		{"/proc/net/rpc/nfsd.fh/channel", fmt.Sprintf("test 1 \\x00000000 2147483647 %s\n", dir)},
		{nfsd + "/versions", "-3 +4 +4.1 +4.2\n"},
		// Files cannot be opened before that is over. It is the least that the kernel takes.
		{nfsd + "/nfsv4gracetime", "10\n"},
		{nfsd + "/portlist", fmt.Sprintf("tcp %d\n", nfsdPort)},
		{nfsd + "/threads", "4\n"},
	} {
		if err := os.WriteFile(setting[0], []byte(setting[1]), 0); err != nil {
			return nil, errors.Join(fmt.Errorf("set up the NFS server: %w", err), stopNFS())
		}
	}
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, stopNFS())
	}
	server := &NFSServer{proxy: proxy}
	go server.accept()
	return server, nil
}

// Mount mounts what the server has, with more options. The client waits for the server without end ("hard").
func (s *NFSServer) Mount(at, options string) error {
	options = fmt.Sprintf("vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,proto=tcp,port=%d,hard,timeo=20,%s",
		s.proxy.Addr().(*net.TCPAddr).Port, options)
	if err := unix.Mount("127.0.0.1:/", at, "nfs4", unix.MS_RDONLY, options); err != nil {
		return fmt.Errorf("mount NFS at %s (%s): %w", at, options, err)
	}
	return nil
}

// GoAway has the server answer nobody, until ComeBack.
func (s *NFSServer) GoAway() { s.passing.Lock() }

// ComeBack has the server answer again, also what was asked while it was away.
func (s *NFSServer) ComeBack() { s.passing.Unlock() }

// Close ends the server, which must not be away. What it is mounted at must be unmounted.
func (s *NFSServer) Close() error { return errors.Join(s.proxy.Close(), stopNFS()) }

func (s *NFSServer) accept() {
	for {
		client, err := s.proxy.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", nfsdPort))
		if err != nil {
			client.Close()
			continue
		}
		go s.pass(client, server)
		go s.pass(server, client)
	}
}

// pass passes on what one says to the other.
func (s *NFSServer) pass(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	_, _ = io.Copy(passer{s, to}, from)
}

type passer struct {
	server *NFSServer
	to     io.Writer
}

func (p passer) Write(data []byte) (int, error) {
	p.server.passing.RLock()
	defer p.server.passing.RUnlock()
	return p.to.Write(data)
}

// stopNFS ends the kernel's server and has it forget what it served.
func stopNFS() error {
	err := os.WriteFile(nfsd+"/threads", []byte("0\n"), 0)
	for _, cache := range []string{"auth.unix.ip", "nfsd.fh", "nfsd.export"} {
		err = errors.Join(err, os.WriteFile("/proc/net/rpc/"+cache+"/flush", []byte("2147483647\n"), 0))
	}
	return errors.Join(err, unix.Unmount(nfsd, unix.MNT_DETACH))
}
