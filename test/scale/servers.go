package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	"k8s.io/client-go/rest"
)

// binaries are the programs of the control plane.
type binaries struct{ etcd, apiserver, manager, scheduler string }

// program is one of them: the flag that names it, its name in the PATH, and the package that it is built from, in which module.
type program struct {
	path                *string
	name, build, module string
}

const (
	serversModule     = "test/scale/servers"
	provisionerModule = serversModule + "/provisioner" // of another version of Kubernetes' modules
)

func (b *binaries) programs() []program {
	return []program{
		{&b.etcd, "etcd", "go.etcd.io/etcd/server/v3", serversModule},
		{&b.apiserver, "kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver", serversModule},
		{&b.manager, "kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager", serversModule},
		{&b.scheduler, "kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler", serversModule},
	}
}

// find fills in what no flag names: from the PATH, from bin/scale, or built into it, which takes a quarter of an hour once.
func (b *binaries) find(ctx context.Context) error {
	return findAll(ctx, b.programs())
}

func findAll(ctx context.Context, programs []program) error {
	for _, p := range programs {
		if *p.path == "" {
			*p.path, _ = exec.LookPath(p.name)
		}
		if *p.path == "" {
			if err := p.make(ctx); err != nil {
				return err
			}
		}
		absolute, err := filepath.Abs(*p.path)
		if err != nil {
			return err
		}
		*p.path = absolute
	}
	return nil
}

// make builds a program into bin/scale, unless that was done before.
func (p program) make(ctx context.Context) error {
	tree, err := sourceTree()
	if err != nil {
		return err
	}
	*p.path = filepath.Join(tree, "bin", "scale", p.name)
	if _, err := os.Stat(*p.path); err == nil {
		return nil
	}
	progress("building %s", p.name)
	command := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", *p.path, p.build)
	command.Dir = filepath.Join(tree, p.module)
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", p.name, err, output)
	}
	return nil
}

// sourceTree returns the root of the project, which this runs in.
func sourceTree() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, missing := os.Stat(filepath.Join(dir, "deploy", "overlay-csi.yaml")); missing == nil {
			return dir, nil
		}
		if dir == "/" {
			err = errors.New("this must run in the source tree")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}

// servers are a control plane of one machine: etcd, the API server, and of the controllers and the scheduler what binds claims.
type servers struct {
	dir, url, token string
	auditLog        string
	etcd, apiserver *exec.Cmd
	scheduler       *exec.Cmd
	central         map[string]*exec.Cmd // the programs that run once for the cluster, by the names of their containers
	all             []*exec.Cmd
	config          *rest.Config
}

const adminToken = "scale-admin"

// startServers starts etcd and the API server. With an audit policy, the API server writes an audit log.
func startServers(ctx context.Context, b binaries, auditPolicy string) (_ *servers, err error) {
	dir, err := os.MkdirTemp("", "overlay-csi-scale-")
	if err != nil {
		return nil, err
	}
	s := &servers{dir: dir, token: adminToken}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	ports, err := freePorts(4)
	if err != nil {
		return nil, err
	}
	client, peer := fmt.Sprintf("http://127.0.0.1:%d", ports[0]), fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	if s.etcd, err = s.start(ctx, b.etcd, "--data-dir", filepath.Join(dir, "etcd"), "--listen-client-urls", client,
		"--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--initial-cluster", "default="+peer, "--log-level", "error", "--quota-backend-bytes", "8589934592"); err != nil {
		return nil, err
	}
	key := filepath.Join(dir, "service-account.key")
	if err := writeKey(key); err != nil {
		return nil, err
	}
	tokens := filepath.Join(dir, "tokens.csv")
	if err := os.WriteFile(tokens, []byte(adminToken+",admin,admin,system:masters\n"), 0o600); err != nil {
		return nil, err
	}
	args := []string{
		"--etcd-servers", client, "--bind-address", "127.0.0.1", "--secure-port", fmt.Sprint(ports[2]),
		"--cert-dir", filepath.Join(dir, "certs"), "--token-auth-file", tokens, "--authorization-mode", "RBAC",
		"--service-account-issuer", "https://scale.test", "--service-account-key-file", key, "--service-account-signing-key-file", key,
		"--service-cluster-ip-range", "10.96.0.0/16", "--allow-privileged",
		// The nodes here have no kubelet that would report them ready.
		"--disable-admission-plugins", "TaintNodesByCondition",
	}
	if auditPolicy != "" {
		policy := filepath.Join(dir, "audit-policy.yaml")
		if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
			return nil, err
		}
		s.auditLog = filepath.Join(dir, "audit.log")
		args = append(args, "--audit-policy-file", policy, "--audit-log-path", s.auditLog)
	}
	if s.apiserver, err = s.start(ctx, b.apiserver, args...); err != nil {
		return nil, err
	}
	s.url = fmt.Sprintf("https://127.0.0.1:%d", ports[2])
	s.config = &rest.Config{Host: s.url, BearerToken: adminToken, QPS: -1, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	return s, s.waitReady(ctx)
}

// startControllers starts what makes a claim bound beside the driver's own side: the scheduler, which chooses the node, and the
// controllers that bind claims and remove the finalizers of claims and volumes. They are not limited in their requests, since the
// churn is more than one cluster's worth for their default of 20 a second. score is the percentage of nodes that the scheduler scores, 0
// for its default.
func (s *servers) startControllers(ctx context.Context, b binaries, score int) error {
	kubeconfig := filepath.Join(s.dir, "kubeconfig")
	if err := s.writeKubeconfig(kubeconfig, adminToken); err != nil {
		return err
	}
	scheduler := filepath.Join(s.dir, "scheduler.yaml")
	if err := os.WriteFile(scheduler, fmt.Appendf(nil, `apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
clientConnection: {kubeconfig: %q, qps: 5000, burst: 10000}
leaderElection: {leaderElect: false}
percentageOfNodesToScore: %d
`, kubeconfig, score), 0o600); err != nil {
		return err
	}
	certs := filepath.Join(s.dir, "certs-of-controllers")
	ports, err := freePorts(2)
	if err != nil {
		return err
	}
	if _, err := s.start(ctx, b.manager, "--kubeconfig", kubeconfig, "--leader-elect=false", "--kube-api-qps", "5000",
		"--kube-api-burst", "10000", "--secure-port", fmt.Sprint(ports[0]), "--bind-address", "127.0.0.1", "--cert-dir", certs, "--controllers",
		"persistentvolume-binder-controller,persistentvolumeclaim-protection-controller,persistentvolume-protection-controller"); err != nil {
		return err
	}
	s.scheduler, err = s.start(ctx, b.scheduler, "--config", scheduler, "--secure-port", fmt.Sprint(ports[1]), "--bind-address", "127.0.0.1",
		"--cert-dir", certs)
	return err
}

// start starts a program, whose output goes to a file in the servers' directory. It ends with this process.
func (s *servers) start(ctx context.Context, path string, args ...string) (*exec.Cmd, error) {
	return s.startWith(ctx, nil, path, args...)
}

// startWith starts a program with variables in its environment.
func (s *servers) startWith(ctx context.Context, env []string, path string, args ...string) (*exec.Cmd, error) {
	log, err := os.Create(s.logOf(len(s.all)))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	command := exec.CommandContext(ctx, path, args...)
	command.Stdout, command.Stderr = log, log
	command.Env = append(os.Environ(), env...)
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	s.all = append(s.all, command)
	return command, nil
}

func (s *servers) logOf(i int) string { return filepath.Join(s.dir, fmt.Sprintf("%d.log", i)) }

func (s *servers) waitReady(ctx context.Context) error {
	client, err := rest.HTTPClientFor(s.config)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/readyz", http.NoBody)
		if err != nil {
			return err
		}
		if response, err := client.Do(request); err == nil {
			_ = response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			log, _ := os.ReadFile(s.logOf(1)) // etcd was the first.
			return fmt.Errorf("the API server is not ready: %w\n%s", ctx.Err(), log[max(0, len(log)-2000):])
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// stop ends all servers, the last one first, and removes what they stored.
func (s *servers) stop() error {
	for i := len(s.all) - 1; i >= 0; i-- {
		_ = s.all[i].Process.Kill()
		_ = s.all[i].Wait()
	}
	return os.RemoveAll(s.dir)
}

// usage is what a process has taken so far.
type usage struct {
	cpu      float64 // seconds
	resident int     // bytes
	files    int
}

func usageOf(pid int) (usage, error) {
	process, err := procfs.NewProc(pid)
	if err != nil {
		return usage{}, err
	}
	stat, err := process.Stat()
	if err != nil {
		return usage{}, err
	}
	files, err := process.FileDescriptorsLen()
	if err != nil {
		return usage{}, err
	}
	return usage{cpu: stat.CPUTime(), resident: stat.ResidentMemory(), files: files}, nil
}

func writeKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer listener.Close()
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}
