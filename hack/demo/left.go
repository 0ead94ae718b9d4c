package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// subnets are ranges of our own, by the tag: other crispds of this machine keep theirs.
func (w *world) subnets() string {
	a, b := hexByte(w.tag[0:2]), hexByte(w.tag[2:4])
	return fmt.Sprintf(`["10.%d.%d.0/24", "fd63:7269:%s::/64"]`, 128+a%64, b, w.tag[0:4])
}

func hexByte(s string) int {
	var n int
	fmt.Sscanf(s, "%x", &n)
	return n
}

// removeNetwork removes what crispd leaves by design when it ends, because pods
// may still run: the bridge and the nft table.
func (w *world) removeNetwork() error {
	var errs []error
	if l, err := netlink.LinkByName(w.bridge); err == nil {
		errs = append(errs, netlink.LinkDel(l))
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name == w.table {
			c.DelTable(t)
			errs = append(errs, c.Flush())
		}
	}
	return errors.Join(errs...)
}

// leftovers names everything of ours that is still there.
func (w *world) leftovers() (left []string) {
	for pid, start := range w.pids {
		if start != "" && startTime(pid) == start {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it just ended: no name
			left = append(left, fmt.Sprintf("process %d %q", pid, strings.ReplaceAll(string(cmdline), "\x00", " ")))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return append(left, err.Error())
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "crisp-demo-"+w.tag) {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return append(left, err.Error())
	}
	for _, l := range links {
		if l.Attrs().Name == w.bridge {
			left = append(left, "link "+l.Attrs().Name)
		}
	}
	addrs, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return append(left, err.Error())
	}
	range4, _, _ := strings.Cut(strings.TrimPrefix(w.subnets(), `["`), `"`)
	for _, r := range addrs {
		if r.Dst != nil && r.Dst.String() == range4 {
			left = append(left, "route "+range4)
		}
	}
	if c, err := nftables.New(); err == nil {
		if tables, err := c.ListTables(); err == nil {
			for _, t := range tables {
				if t.Name == w.table {
					left = append(left, "nft table "+t.Name)
				}
			}
		}
	}
	for _, dir := range ourCgroups(w.tag) {
		left = append(left, "cgroup "+dir)
	}
	for _, dir := range []string{w.state, w.runDir} {
		_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				left = append(left, "file "+path)
			}
			return nil // not there is what we want
		})
	}
	return left
}
