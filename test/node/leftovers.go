package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const cgroupRoot = "/sys/fs/cgroup"

// Remove takes the whole node away: its pods, if crispd still runs, then
// crispd, and what outlives it by design because pods may run: bridge, nft table and
// cgroup parents; last the directories. It may be called in any state, twice too.
func (n *Node) Remove() error {
	var errs []error
	if n.process != nil {
		n.Remember()
		errs = append(errs, n.RemovePods(), n.Stop())
	}
	errs = append(errs, n.removeNetwork(), n.removeCgroups(), n.removeDirs())
	return errors.Join(errs...)
}

// RemovePods removes every pod through the CRI.
func (n *Node) RemovePods() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range list.Items {
		_, err := n.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (n *Node) removeDirs() error {
	// The directory of network namespaces is a mount point of its own (package netns). One that still has
	// pins is busy: that is a leak and stays one.
	if err := unix.Unmount(n.RunDir+"/netns", 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "umount", Path: n.RunDir + "/netns", Err: err}
	}
	return errors.Join(os.RemoveAll(n.StateDir), os.RemoveAll(n.RunDir))
}

func (n *Node) removeNetwork() error {
	var errs []error
	if l, err := netlink.LinkByName(n.Bridge); err == nil {
		errs = append(errs, netlink.LinkDel(l))
	}
	c, tables, err := n.nftTables()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, t := range tables {
		c.DelTable(t)
		errs = append(errs, c.Flush())
	}
	return errors.Join(errs...)
}

func (n *Node) nftTables() (*nftables.Conn, []*nftables.Table, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, nil, err
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, nil, fmt.Errorf("list nft tables: %w", err)
	}
	return c, slices.DeleteFunc(tables, func(t *nftables.Table) bool { return t.Name != n.Table }), nil
}

// CgroupDirs are all directories of the node's cgroups, in every hierarchy, deepest first.
func (n *Node) CgroupDirs() (dirs []string) {
	_ = filepath.WalkDir(cgroupRoot, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(path, n.Cgroups) {
			dirs = append(dirs, path)
		}
		return nil // a cgroup that vanished meanwhile is no leftover
	})
	slices.Reverse(dirs)
	return dirs
}

func (n *Node) removeCgroups() error {
	var errs []error
	for _, dir := range n.CgroupDirs() {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Remember notes crispd and the processes in the node's cgroups now, for
// Leftovers to look for. Call it while there are pods.
func (n *Node) Remember() {
	pids := []int{n.PID}
	for _, dir := range n.CgroupDirs() {
		data, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // gone: none in it
		for _, f := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	for _, pid := range pids {
		n.seen[pid] = startTime(pid)
	}
}

// startTime is field 22 of /proc/PID/stat, "" when there is no such process or
// a zombie. With the pid it names a process for ever.
func startTime(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:])) // from field 3
	if len(f) < 20 || f[0] == "Z" {
		return ""
	}
	return f[19]
}

// Leftovers names everything of the node that is there, also what Remove would
// still take away; after Remove there must be nothing.
func (n *Node) Leftovers() (left []string, err error) {
	for pid, start := range n.seen {
		if start != "" && startTime(pid) == start {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it just ended: no name
			left = append(left, fmt.Sprintf("process %d %s", pid, strings.ReplaceAll(string(cmdline), "\x00", " ")))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, n.Tag) {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	bridge, err := netlink.LinkByName(n.Bridge)
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
	case err != nil:
		return nil, err
	default:
		left = append(left, "link "+n.Bridge)
		links, err := netlink.LinkList()
		if err != nil {
			return nil, err
		}
		for _, l := range links {
			if l.Attrs().MasterIndex == bridge.Attrs().Index {
				left = append(left, "link "+l.Attrs().Name)
			}
		}
	}
	_, tables, err := n.nftTables()
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		left = append(left, "nft table "+t.Name)
	}
	for _, dir := range n.CgroupDirs() {
		left = append(left, "cgroup "+dir)
	}
	for _, dir := range []string{n.StateDir, n.RunDir} {
		_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				left = append(left, "file "+path)
			}
			return nil // that it is not there is what we want
		})
	}
	return left, nil
}
