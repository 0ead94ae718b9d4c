package cgroup

import (
	"fmt"
	"strings"
	"testing"
)

const (
	hybridMounts = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset,clone_children
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/systemd/systemd-cgroups-agent,name=systemd
42 31 0:40 / /sys/fs/cgroup/elogind rw,relatime - cgroup cgroup rw,name=elogind
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
`
	hybridOwn = `12:name=elogind:/1
9:name=systemd:/user.slice
6:freezer:/
5:devices:/
4:memory:/process_api/1
3:cpuset:/
1:cpu,cpuacct:/a:b
0::/x
`
)

func TestParseLayout(t *testing.T) {
	legacyMounts := strings.Join(strings.SplitAfter(hybridMounts, "\n")[:8], "")
	legacyOwn := strings.ReplaceAll(hybridOwn, "0::/x\n", "")
	for _, c := range []struct {
		name, mounts, own string
		want              string // mode, then name(controllers) of each hierarchy; "" : error
	}{
		{"unified", "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n", "0::/init.scope\n",
			`unified "" v2 at /sys/fs/cgroup`},
		{"unified elsewhere", "30 23 0:26 / /mnt/cg rw - cgroup2 none rw\n", "0::/\n", `unified "cg" v2 at /mnt/cg`},
		{"hybrid", hybridMounts, hybridOwn, `hybrid "unified" v2 at /sys/fs/cgroup/unified; "cpuset"[cpuset]; "devices"[devices]; "memory"[memory]; "cpu,cpuacct"[cpu cpuacct]; "freezer"[freezer]; "systemd"[name=systemd]`},
		{"legacy", legacyMounts, legacyOwn, `legacy "cpuset"[cpuset]; "devices"[devices]; "memory"[memory]; "cpu,cpuacct"[cpu cpuacct]; "freezer"[freezer]; "systemd"[name=systemd]`},
		{"a container's bind mounts of the same", "50 23 0:32 /docker/1 /var/lib/x/memory ro - cgroup cgroup rw,memory\n" + hybridMounts, hybridOwn,
			`hybrid "unified" v2 at /sys/fs/cgroup/unified; "cpuset"[cpuset]; "devices"[devices]; "memory"[memory]; "cpu,cpuacct"[cpu cpuacct]; "freezer"[freezer]; "systemd"[name=systemd]`},
		{"only somebody's named one besides v2", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n42 31 0:40 / /x rw - cgroup cgroup rw,name=elogind\n", "1:name=elogind:/\n0::/\n",
			`unified "" v2 at /sys/fs/cgroup`},
		{"none", "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n", hybridOwn, ""},
		{"garbage", "garbage\n", "", ""},
	} {
		l, err := parseLayout(strings.NewReader(c.mounts), []byte(c.own))
		if c.want == "" {
			if err == nil {
				t.Errorf("%s: no error", c.name)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var parts []string
		for _, h := range l.trees {
			if h.v2 {
				parts = append(parts, fmt.Sprintf("%q v2 at %s", h.name, h.dir))
			} else {
				parts = append(parts, fmt.Sprintf("%q%v", h.name, h.controllers))
			}
		}
		if got := l.mode.String() + " " + strings.Join(parts, "; "); got != c.want {
			t.Errorf("%s: got\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
}

func TestHomes(t *testing.T) {
	for _, c := range []struct {
		l          layout
		controller string
		want       string // hierarchy's name, "-": none
	}{
		{unifiedLayout, "memory", ""}, {unifiedLayout, "freezer", "-"},
		{hybridLayout, "memory", "memory"}, {hybridLayout, "cpuacct", "cpu,cpuacct"},
		{hybridLayout, "hugetlb", "-"}, // cgroup2's controllers are not used there
		{legacyLayout, "hugetlb", "hugetlb"},
	} {
		got := "-"
		if i := c.l.home(c.controller); i != absent {
			got = c.l.trees[i].name
		}
		if got != c.want {
			t.Errorf("%v: home of %s is %q, want %q", c.l.mode, c.controller, got, c.want)
		}
	}
	for _, c := range []struct {
		l                layout
		tracker, devices string
	}{{unifiedLayout, "", ""}, {hybridLayout, "unified", "devices"}, {legacyLayout, "freezer", "devices"}} {
		if got := c.l.trees[c.l.tracker()].name; got != c.tracker {
			t.Errorf("%v: tracker %q, want %q", c.l.mode, got, c.tracker)
		}
		if got := c.l.trees[c.l.devices()].name; got != c.devices {
			t.Errorf("%v: devices in %q, want %q", c.l.mode, got, c.devices)
		}
	}
}

func TestDetect(t *testing.T) {
	mode, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Detect()
	if err != nil || again != mode || mode < Unified || mode > Legacy {
		t.Errorf("Detect: %v, then %v, %v", mode, again, err)
	}
}

func FuzzParseLayout(f *testing.F) {
	f.Add(hybridMounts, []byte(hybridOwn))
	f.Add("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", []byte("0::/\n"))
	f.Fuzz(func(t *testing.T, mounts string, own []byte) {
		l, err := parseLayout(strings.NewReader(mounts), own)
		if err != nil {
			return
		}
		if len(l.trees) == 0 || l.tracker() < 0 || l.tracker() >= len(l.trees) {
			t.Fatalf("%+v", l)
		}
		for i, h := range l.trees {
			if h.v2 != (i == 0 && l.mode != Legacy) || !h.v2 && len(h.controllers) == 0 {
				t.Fatalf("%v hierarchy %d: %+v", l.mode, i, h)
			}
		}
	})
}
