package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/overlay-csi/overlay-csi/test/bench/durations"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// gauges is what the driver has and takes at one time.
type gauges struct {
	// name is the heading of the column.
	name string
	// resident is in bytes.
	resident                         int64
	files, threads                   int
	mounts, loops, entries           int
	readMounts, driverCPU, systemCPU time.Duration
	followerCPU                      time.Duration
	followerReads                    int64
}

// read reads what the driver has and takes now.
func (b *bench) read(name string) (gauges, error) {
	g, err := b.readSystem(name)
	if err != nil {
		return g, err
	}
	proc := fmt.Sprintf("/proc/%d", b.node.PID())
	status, err := readStatus(proc)
	if err != nil {
		return g, err
	}
	files, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return g, err
	}
	loops, err := drivertest.LoopDevices(b.node.Dir)
	if err != nil {
		return g, err
	}
	g.resident, g.threads = int64(status["VmRSS"])<<10, status["Threads"]
	g.files, g.loops = len(files), len(loops)
	if g.driverCPU, err = processorTime(proc); err != nil {
		return g, err
	}
	for _, dir := range []string{b.node.DataRoot, filepath.Join(b.node.KubeletDir, "plugins")} {
		n, err := countEntries(dir)
		if err != nil {
			return g, err
		}
		g.entries += n
	}
	return g, nil
}

// readSystem reads what does not depend on the driver.
func (b *bench) readSystem(name string) (gauges, error) {
	g := gauges{name: name}
	begin := time.Now()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return g, err
	}
	g.readMounts, g.mounts = time.Since(begin), bytes.Count(table, []byte("\n"))
	g.followerCPU, g.followerReads = time.Duration(b.follower.cpu.Load()), b.follower.reads.Load()
	g.systemCPU, err = processorTime("/proc/1")
	return g, err
}

// isSystemd reports whether process 1 follows the mount table.
func isSystemd() bool {
	name, err := os.ReadFile("/proc/1/comm")
	return err == nil && strings.TrimSpace(string(name)) == "systemd"
}

// readStatus reads the numbers of a process's status (proc_pid_status(5)).
func readStatus(proc string) (map[string]int, error) {
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return nil, err
	}
	numbers := map[string]int{}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		if fields := strings.Fields(value); len(fields) > 0 {
			if n, err := strconv.Atoi(fields[0]); err == nil {
				numbers[key] = n
			}
		}
	}
	return numbers, nil
}

// processorTime returns how much processor time a process and the programs that it has run have taken (proc_pid_stat(5)).
func processorTime(proc string) (time.Duration, error) {
	stat, err := os.ReadFile(proc + "/stat")
	if err != nil {
		return 0, err
	}
	// The name of the program may have spaces in it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const utime, cstime, tick = 11, 14, 10 * time.Millisecond
	if len(fields) <= cstime {
		return 0, errors.New("the status of " + proc + " is too short")
	}
	var total time.Duration
	for _, field := range fields[utime : cstime+1] {
		ticks, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		total += time.Duration(ticks) * tick
	}
	return total, nil
}

// countEntries counts the files and directories beneath dir, of which others delete some meanwhile.
func countEntries(dir string) (n int, err error) {
	err = filepath.WalkDir(dir, func(_ string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		n++
		return err
	})
	return n, err
}

// printGauges prints a table with a column for each time.
func printGauges(all ...gauges) {
	fmt.Print("\n| what |")
	for _, g := range all {
		fmt.Printf(" %s |", g.name)
	}
	fmt.Print("\n| --- |", strings.Repeat(" ---: |", len(all)), "\n")
	row := func(name string, value func(gauges) string) {
		fmt.Printf("| %s |", name)
		for _, g := range all {
			fmt.Printf(" %s |", value(g))
		}
		fmt.Println()
	}
	ofDriver := func(name string, value func(gauges) string) {
		row(name, func(g gauges) string {
			if g.threads == 0 {
				return ""
			}
			return value(g)
		})
	}
	ofDriver("driver's resident memory", func(g gauges) string { return fmt.Sprintf("%.1f MiB", float64(g.resident)/(1<<20)) })
	ofDriver("driver's descriptors", func(g gauges) string { return strconv.Itoa(g.files) })
	ofDriver("driver's threads", func(g gauges) string { return strconv.Itoa(g.threads) })
	ofDriver("CPU time of the driver's process and its programs", func(g gauges) string { return seconds(g.driverCPU) })
	ofDriver("loop devices", func(g gauges) string { return strconv.Itoa(g.loops) })
	ofDriver("files and directories of the driver", func(g gauges) string { return strconv.Itoa(g.entries) })
	row("mounts", func(g gauges) string { return strconv.Itoa(g.mounts) })
	row("one read of the mount table", func(g gauges) string { return durations.Milliseconds(g.readMounts) })
	row("CPU time of a process that follows the mount table as systemd does, and its reads", func(g gauges) string {
		return fmt.Sprintf("%s, %d", seconds(g.followerCPU-all[0].followerCPU), g.followerReads-all[0].followerReads)
	})
	row("CPU time of process 1", func(g gauges) string {
		if !isSystemd() {
			return "not systemd"
		}
		return seconds(g.systemCPU)
	})
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
