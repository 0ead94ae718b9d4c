package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// unified says whether the host has cgroup v2 only.
func unified() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// controllerDir is where path is in the hierarchy of a controller.
func controllerDir(controller, path string) string {
	if unified() {
		return cgroupRoot + path
	}
	return filepath.Join(cgroupRoot, controller, path)
}

// makePodCgroup makes root/pod with limits, as the kubelet does before it calls
// RunPodSandbox, and returns the cgroup_parent to send.
func makePodCgroup(root string, memory, pids int64) (parent string, err error) {
	parent = root + "/pod"
	settings := []struct{ controller, v1, v2, value string }{
		{"memory", "memory.limit_in_bytes", "memory.max", strconv.FormatInt(memory, 10)},
		{"pids", "pids.max", "pids.max", strconv.FormatInt(pids, 10)},
	}
	if unified() {
		for _, dir := range []string{"/", root} {
			if err := os.MkdirAll(cgroupRoot+dir, 0o755); err != nil {
				return "", err
			}
			if err := os.WriteFile(cgroupRoot+dir+"/cgroup.subtree_control", []byte("+cpu +memory +pids"), 0); err != nil {
				return "", err
			}
		}
	}
	for _, s := range settings {
		dir, file := controllerDir(s.controller, parent), s.v1
		if unified() {
			file = s.v2
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(s.value), 0); err != nil {
			return "", err
		}
	}
	return parent, nil
}

func (p *pod) showCgroups(context.Context) error {
	base := controllerDir("memory", p.Cgroups+"/pod")
	rows := [][]string{{"cgroup", "memory", "of", "tasks", "of", "cpu", "is"}}
	err := filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		below := strings.TrimPrefix(path, base)
		cgroup := p.Cgroups + "/pod" + below
		name := "pod"
		if below != "" {
			name = strings.Repeat("  ", strings.Count(below, "/")) + short(filepath.Base(below))
		}
		rows = append(rows, append([]string{name}, usage(cgroup, p.role(filepath.Base(below)))...))
		return nil
	})
	if err != nil {
		return err
	}
	if len(rows) < 4 {
		return fmt.Errorf("got %d cgroups, want those of the pod, its init and two containers", len(rows)-1)
	}
	out.table(rows)
	return nil
}

// role says in words what the cgroup of that name is for.
func (p *pod) role(name string) string {
	switch {
	case name == ".":
		return "made by the kubelet (here: the demo)"
	case strings.Contains(name, p.web):
		return "container web"
	case strings.Contains(name, p.other):
		return "container other"
	case strings.Contains(name, p.id) || strings.Contains(name, "init"):
		return "the pod init"
	}
	return ""
}

func short(name string) string {
	if len(name) > 20 {
		return name[:20] + "…"
	}
	return name
}

// usage reads memory and its limit, tasks and their limit, and CPU time of a cgroup.
func usage(cgroup, role string) []string {
	files := map[string][2]string{ // controller, file
		"use": {"memory", "memory.usage_in_bytes"}, "limit": {"memory", "memory.limit_in_bytes"},
		"tasks": {"pids", "pids.current"}, "most": {"pids", "pids.max"}, "cpu": {"cpuacct", "cpuacct.usage"},
	}
	if unified() {
		files["use"], files["limit"], files["cpu"] = [2]string{"", "memory.current"}, [2]string{"", "memory.max"}, [2]string{"", "cpu.stat"}
	}
	value := func(key string) string {
		data, err := os.ReadFile(filepath.Join(controllerDir(files[key][0], cgroup), files[key][1]))
		if err != nil {
			return "-"
		}
		return strings.TrimSpace(string(data))
	}
	cpu := value("cpu")
	if unified() {
		if f := strings.Fields(cpu); len(f) > 1 {
			cpu = f[1] + "000" // usage_usec
		}
	}
	return []string{size(value("use")), size(value("limit")), value("tasks"), value("most"), millis(cpu), role}
}

func size(text string) string {
	n, err := strconv.ParseUint(text, 10, 64)
	switch {
	case err != nil:
		return text
	case n > 1<<60: // v1's way to say no limit
		return "max"
	case n < 10<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

func millis(text string) string {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return text
	}
	return fmt.Sprintf("%.1f ms", float64(n)/1e6)
}
