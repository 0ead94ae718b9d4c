package check

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

var cgroupProbes = []Probe{
	{"cgroups", "layout", Required, "there is no cgroup hierarchy at /sys/fs/cgroup", askLayout},
	{"cgroups", "controllers", Required, "limits of that kind cannot be set", askControllers},
	{"cgroups", "other controllers", Info, "limits of that kind cannot be set", askOtherControllers},
	{"cgroups", "clone into cgroup", Wanted, "processes are moved into their cgroup after birth", askCloneIntoCgroup},
	{"cgroups", "cgroup.kill", Wanted, "containers are killed process by process", askCgroupKill},
	{"cgroups", "swap accounting", Wanted, "swap limits cannot be set", askSwapAccounting},
	{"cgroups", "systemd driver", Info, "pods' cgroups are directories that systemd knows nothing of (cgroup.driver: cgroupfs)", askSystemd},
	{"cgroups", "pressure (PSI)", Info, "statistics have no pressure", askPSI},
}

const cgroupRoot = "/sys/fs/cgroup"

// unifiedDir is where cgroup2 is mounted, "" if nowhere.
func unifiedDir() string {
	for _, dir := range []string{cgroupRoot, cgroupRoot + "/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	return ""
}

func askLayout(*host) Answer {
	switch unifiedDir() {
	case cgroupRoot:
		return yes("unified (v2)")
	case cgroupRoot + "/unified":
		return yes("hybrid: v1 controllers, v2 at %s/unified", cgroupRoot)
	}
	if _, err := os.Stat(cgroupRoot + "/memory/cgroup.procs"); err == nil {
		return yes("legacy (v1)")
	}
	return no("nothing at %s", cgroupRoot)
}

// controllers are those that can be used, of either version.
func controllers() (names []string) {
	if dir := unifiedDir(); dir != "" {
		data, _ := os.ReadFile(dir + "/cgroup.controllers") // absent: none
		names = strings.Fields(string(data))
	}
	mounted, _ := filepath.Glob(cgroupRoot + "/*/cgroup.procs") // the pattern is well-formed
	for _, m := range mounted {
		name := filepath.Base(filepath.Dir(m))
		var st unix.Statfs_t
		if unix.Statfs(filepath.Dir(m), &st) == nil && st.Type == unix.CGROUP_SUPER_MAGIC {
			names = append(names, strings.Split(name, ",")...)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func askControllers(*host) Answer {
	have := controllers()
	var missing []string
	want := []string{"cpu", "cpuset", "memory", "pids"}
	for _, w := range want {
		if !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	if len(missing) > 0 {
		return no("no %s", strings.Join(missing, ", "))
	}
	return yes("%s", strings.Join(want, ", "))
}

func askOtherControllers(*host) Answer {
	have := controllers()
	var found, missing []string
	for _, w := range [][]string{{"hugetlb"}, {"io", "blkio"}} {
		if i := slices.IndexFunc(w, func(n string) bool { return slices.Contains(have, n) }); i >= 0 {
			found = append(found, w[i])
		} else {
			missing = append(missing, w[0])
		}
	}
	if len(missing) > 0 {
		return no("no %s", strings.Join(missing, ", "))
	}
	return yes("%s", strings.Join(found, ", "))
}

// scratchCgroup makes a cgroup2 directory of our own.
func scratchCgroup() (dir string, remove func(), err error) {
	parent := unifiedDir()
	if parent == "" {
		return "", nil, errors.New("cgroup2 is not mounted")
	}
	dir = filepath.Join(parent, fmt.Sprintf("crisp-check-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", nil, err
	}
	return dir, func() { _ = os.Remove(dir) }, nil // empty by now, or somebody else's process is in it
}

// bornIn starts a child in a scratch cgroup and hands both to use.
func bornIn(use func(dir string, child *helper) Answer) Answer {
	dir, remove, err := scratchCgroup()
	if err != nil {
		return unknown("%v", err)
	}
	defer remove()
	d, err := os.Open(dir)
	if err != nil {
		return unknown("%v", err)
	}
	defer d.Close()
	child, err := startHelper(&syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())})
	if err != nil {
		return no("clone3(CLONE_INTO_CGROUP): %v", err)
	}
	return use(dir, child)
}

func askCloneIntoCgroup(*host) Answer {
	return bornIn(func(dir string, child *helper) Answer {
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if endErr := child.end(); err == nil {
			err = endErr
		}
		if err != nil {
			return unknown("%v", err)
		}
		if string(trim(procs)) != fmt.Sprint(child.process.Pid) {
			return no("the child was born elsewhere")
		}
		return Answer{Verdict: Yes}
	})
}

func askCgroupKill(*host) Answer {
	return bornIn(func(dir string, child *helper) Answer {
		err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		if err != nil {
			_ = child.end() // it was not killed and ends by itself
			return no("%v", err)
		}
		defer child.stdin.Close()
		state, err := child.process.Wait()
		if err != nil {
			return unknown("%v", err)
		}
		if ws, ok := state.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
			return no("the child outlived it")
		}
		return Answer{Verdict: Yes}
	})
}

func askSwapAccounting(*host) Answer {
	if _, err := os.Stat(cgroupRoot + "/memory/memory.memsw.limit_in_bytes"); err == nil {
		return yes("memory.memsw")
	}
	if m, _ := filepath.Glob(cgroupRoot + "/*/memory.swap.max"); len(m) > 0 {
		return yes("memory.swap.max")
	}
	return no("neither memory.swap.max nor memory.memsw: not in this kernel, or off (swapaccount=1)")
}

// askSystemd looks for what the systemd driver needs (cgroup.UseSystemd, and a connection).
func askSystemd(*host) Answer {
	if unifiedDir() != cgroupRoot {
		return no("it needs cgroup v2 alone")
	}
	if info, err := os.Lstat("/run/systemd/system"); err != nil || !info.IsDir() {
		return no("systemd does not run here")
	}
	for _, socket := range []string{"/run/systemd/private", "/run/dbus/system_bus_socket"} {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return yes("by %s", socket)
		}
	}
	return no("neither systemd nor the system bus answers")
}

func askPSI(*host) Answer {
	// With psi=0 the file is there and reading answers EOPNOTSUPP.
	if _, err := os.ReadFile("/proc/pressure/cpu"); err != nil {
		return no("%v", err)
	}
	return Answer{Verdict: Yes}
}
