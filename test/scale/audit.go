package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

// auditPolicy logs every request without its content.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
`

// programs are those on a node, by their user agents.
var programs = []string{"csi-provisioner", "csi-resizer", "csi-snapshotter", "overlay-csi"}

// auditEvent is what is read of a line of the log.
type auditEvent struct {
	UserAgent, Verb, RequestURI string
	ObjectRef                   *struct{ APIGroup, Resource, Subresource string }
	ResponseStatus              struct{ Code int }
}

// readAudit returns what the programs have asked for: a line for each program, verb, resource and selector, sorted, each once. Names of
// nodes are replaced by NODE.
func readAudit(log io.Reader) ([]string, error) {
	var found []string
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, 1<<22)
	for lines.Scan() {
		var event auditEvent
		if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
			return nil, err
		}
		line, ok, err := event.line()
		if err != nil {
			return nil, err
		}
		if i, known := slices.BinarySearch(found, line); ok && !known {
			found = slices.Insert(found, i, line)
		}
	}
	return found, lines.Err()
}

var nodeSelector = regexp.MustCompile(`(managed-by=(external-provisioner-)?)[^,]+`)

func (e auditEvent) line() (_ string, ok bool, _ error) {
	program, _, _ := strings.Cut(e.UserAgent, "/")
	if !slices.Contains(programs, program) {
		return "", false, nil
	}
	uri, err := url.Parse(e.RequestURI)
	if err != nil {
		return "", false, fmt.Errorf("audit log: %w", err)
	}
	what := uri.Path
	if e.ObjectRef != nil {
		what = strings.TrimPrefix(path.Join(e.ObjectRef.APIGroup, e.ObjectRef.Resource, e.ObjectRef.Subresource), "/")
	}
	line := program + " " + e.Verb + " " + what
	for _, key := range []string{"labelSelector", "fieldSelector", "sendInitialEvents", "limit"} {
		if value := uri.Query().Get(key); value != "" {
			line += " " + key + "=" + nodeSelector.ReplaceAllString(value, "${1}NODE")
		}
	}
	if e.Verb == "watch" && !strings.Contains(line, "sendInitialEvents") {
		// A watch that goes on where one has ended, which depends on how long the log is.
		return "", false, nil
	}
	return line, true, nil
}

// printAudit prints the list of a log, for testdata.
func printAudit(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	lines, err := readAudit(file)
	if err != nil {
		return err
	}
	_, err = fmt.Println(strings.Join(lines, "\n"))
	return err
}

// compare plays some nodes and a few claims with the API server's audit log, and compares what they ask for with what the real programs
// have asked for, which is in testdata.
func compare(ctx context.Context, o options) (err error) {
	want, err := readList("testdata/node.txt")
	if err != nil {
		return err
	}
	s, err := startServers(ctx, o.binaries, auditPolicy)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	c, err := newCluster(ctx, s, sidecarMode{o.central.helm})
	if err != nil {
		return err
	}
	playing, end := context.WithCancel(ctx)
	defer end()
	o.grow, o.live = 1, 5*time.Second
	churn, err := play(playing, o, sidecarMode{o.central.helm}, c, 3)
	if err != nil {
		return err
	}
	churning, endChurn := context.WithTimeout(ctx, 20*time.Second)
	defer endChurn()
	churn.run(churning, "claim", 1)
	if err := churn.drain(ctx, time.Minute); err != nil {
		return err
	}
	file, err := os.Open(s.auditLog)
	if err != nil {
		return err
	}
	defer file.Close()
	got, err := readAudit(file)
	if err != nil {
		return err
	}
	return difference(want, got)
}

// readList reads a list of testdata. Lines that begin with # are comments.
func readList(name string) ([]string, error) {
	data, err := testdata.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

// difference prints what only one of the lists has, and is an error where there is something. Programs that want has nothing of are not
// compared.
func difference(want, got []string) error {
	count := 0
	for _, line := range want {
		if !slices.Contains(got, line) {
			fmt.Println("- " + line)
			count++
		}
	}
	for _, line := range got {
		program, _, _ := strings.Cut(line, " ")
		compared := slices.ContainsFunc(want, func(line string) bool { return strings.HasPrefix(line, program+" ") })
		if compared && !slices.Contains(want, line) {
			fmt.Println("+ " + line)
			count++
		}
	}
	if count > 0 {
		return fmt.Errorf("the played programs differ from the real ones in %d kinds of requests", count)
	}
	fmt.Printf("The played programs make the %d kinds of requests that the real ones make, and no others.\n", len(want))
	return nil
}
