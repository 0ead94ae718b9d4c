package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// floorTarget does the system calls that no runtime can avoid for such a pod on
// this host, and nothing else: a pod-level cgroup and one each for init and container, in every
// hierarchy, with the limits and device rules that the pod asks for; one clone for the pod's
// namespaces, a veth pair on a bridge with an address, an overlay, one clone and execve for the
// container. No records, no checks, no seccomp, no logs. A bare one leaves out limits and all hierarchies but cgroup2.
type floorTarget struct {
	binary, root, lower string
	v2                  string   // cgroup of ours in cgroup2
	v1                  []string // and in the other hierarchies
	bridge              *netlink.Bridge
}

func newFloor(o options) (*floorTarget, error) {
	b := make([]byte, 3)
	rand.Read(b) // never fails (crypto/rand)
	tag := hex.EncodeToString(b)
	binary, err := filepath.Abs(o.floor)
	if err != nil {
		return nil, err
	}
	f := &floorTarget{binary: binary, root: "/var/tmp/crisp-floor-" + tag, v2: "/sys/fs/cgroup/crisp-floor-" + tag}
	f.lower = f.root + "/lower"
	if _, err := os.Stat("/sys/fs/cgroup/unified/cgroup.procs"); err == nil {
		f.v2 = "/sys/fs/cgroup/unified/crisp-floor-" + tag
	}
	if !o.bare {
		files, _ := filepath.Glob("/sys/fs/cgroup/*/tasks") // the pattern is well-formed
		for _, file := range files {
			dir := filepath.Dir(file)
			if at, err := filepath.EvalSymlinks(dir); err == nil && at == dir { // cpuacct may be a link to cpu,cpuacct
				f.v1 = append(f.v1, dir+"/crisp-floor-"+tag)
			}
		}
	}
	if err := errors.Join(os.MkdirAll(f.lower, 0o755), f.mkdir(""), copyFile(o.payload, f.lower+"/payload"), copyFile(o.trivial, f.lower+"/true")); err != nil {
		return nil, errors.Join(err, f.close())
	}
	for _, dir := range f.v1 {
		// cpusets of children are filled by the kernel.
		if err := os.WriteFile(dir+"/cgroup.clone_children", []byte("1"), 0); err != nil {
			return nil, errors.Join(err, f.close())
		}
		for _, file := range []string{"/cpuset.cpus", "/cpuset.mems"} {
			if data, err := os.ReadFile(filepath.Dir(dir) + file); err == nil {
				if err := os.WriteFile(dir+file, data, 0); err != nil {
					return nil, errors.Join(err, f.close())
				}
			}
		}
	}
	f.bridge = &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "floor-" + tag}}
	if err := netlink.LinkAdd(f.bridge); err != nil {
		return nil, errors.Join(err, f.close())
	}
	if err := netlink.LinkSetUp(f.bridge); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// mkdir makes the cgroup below ours in every hierarchy.
func (f *floorTarget) mkdir(below string) error {
	for _, dir := range append([]string{f.v2}, f.v1...) {
		if err := os.Mkdir(dir+below, 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (f *floorTarget) rmdir(below string) error {
	for _, dir := range append([]string{f.v2}, f.v1...) {
		if err := unix.Rmdir(dir + below); err != nil {
			return &os.PathError{Op: "rmdir", Path: dir + below, Err: err}
		}
	}
	return nil
}

// tasks are the v1 files that a thread writes to to enter the cgroup.
func (f *floorTarget) tasks(below string) (files []string) {
	for _, dir := range f.v1 {
		files = append(files, dir+below+"/tasks")
	}
	return files
}

// limit sets what the measured pods ask for.
func (f *floorTarget) limit(below string) error {
	for _, l := range []struct {
		controller, file string
		lines            []string
	}{
		{"cpu", "cpu.shares", []string{"256"}},
		{"memory", "memory.limit_in_bytes", []string{"134217728"}},
		{"devices", "devices.deny", []string{"a"}},
		{"devices", "devices.allow", []string{"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm"}},
	} {
		for _, dir := range f.v1 {
			if filepath.Base(filepath.Dir(dir)) != l.controller {
				continue
			}
			file, err := os.OpenFile(dir+below+"/"+l.file, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			for _, line := range l.lines {
				if _, err := file.WriteString(line); err != nil {
					return errors.Join(err, file.Close())
				}
			}
			if err := file.Close(); err != nil {
				return err
			}
		}
	}
	return nil
}

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

func (f *floorTarget) name() string { return "floor" }

func (f *floorTarget) cycle(_ context.Context, i int, lap func(string)) (err error) {
	pod := fmt.Sprintf("/p%d", i)
	if err := errors.Join(f.mkdir(pod), f.mkdir(pod+"/init")); err != nil {
		return err
	}
	cgroup, err := os.Open(f.v2 + pod + "/init")
	if err != nil {
		return err
	}
	defer cgroup.Close()
	cmd := exec.Command(f.binary, "init")
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNS,
		UseCgroupFD: true, CgroupFD: int(cgroup.Fd()),
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := bornIn(f.tasks(pod+"/init"), f.tasks("/.."), cmd.Start); err != nil {
		return err
	}
	ended := false
	end := func() error {
		in.Close()
		ended = true
		return cmd.Wait()
	}
	defer func() {
		if !ended {
			_ = end() // the first error is the one that matters
		}
	}()
	answers := bufio.NewReader(out)
	ask := func(line string) (string, error) {
		if line != "" {
			if _, err := io.WriteString(in, line+"\n"); err != nil {
				return "", err
			}
		}
		answer, err := answers.ReadString('\n')
		return strings.TrimSpace(answer), err
	}
	// The link is made while the init starts, as crispd could.
	host, err := f.link(cmd.Process.Pid, i)
	if err != nil {
		return err
	}
	if _, err := ask(""); err != nil {
		return err
	}
	lap("run")

	dir := fmt.Sprintf("%s/c%d", f.root, i)
	for _, d := range []string{dir, dir + "/upper", dir + "/work", dir + "/merged"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := errors.Join(f.mkdir(pod+"/c"), f.limit(pod+"/c")); err != nil {
		return err
	}
	lap("create")
	pid, err := ask(strings.Join([]string{dir, f.v2 + pod + "/c", cmp.Or(strings.Join(f.tasks(pod+"/c"), ","), "-"), f.lower}, " "))
	if err != nil {
		return err
	}
	lap("start")
	if err := f.exec(pid); err != nil {
		return err
	}
	lap("exec")
	if _, err := ask("-"); err != nil {
		return err
	}
	if err := netlink.LinkDel(host); err != nil {
		return err
	}
	lap("stop")
	if err := end(); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(dir), f.rmdir(pod+"/c"), f.rmdir(pod+"/init"), f.rmdir(pod)); err != nil {
		return err
	}
	lap("remove")
	return nil
}

// bornIn runs start on a thread that has entered the v1 cgroups of the tasks files: what it starts is born there. It
// leaves them for those of home, as the end of a thread is not waited for, and a cgroup with one can't be removed.
func bornIn(tasks, home []string, start func() error) error {
	if len(tasks) == 0 {
		return start()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		for _, file := range tasks {
			if err := os.WriteFile(file, []byte("0"), 0); err != nil {
				done <- err
				return
			}
		}
		err := start()
		for _, file := range home {
			err = errors.Join(err, os.WriteFile(file, []byte("0"), 0))
		}
		done <- err
	}()
	return <-done
}

// link makes a veth pair, its peer eth0 in the pod with an address and a default route.
func (f *floorTarget) link(pid, i int) (netlink.Link, error) {
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("flr%s%d", f.root[len(f.root)-6:], i), MasterIndex: f.bridge.Index, Flags: net.FlagUp},
		PeerName:  "eth0", PeerNamespace: netlink.NsPid(pid),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()))
	if err != nil {
		return nil, err
	}
	defer h.Close()
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	addr, err := netlink.ParseAddr("10.255.0.2/24")
	if err != nil {
		return nil, err
	}
	gateway := net.IPv4(10, 255, 0, 1)
	return veth, errors.Join(h.AddrAdd(eth0, addr), h.LinkSetUp(eth0), h.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: gateway}))
}

// cpu is ours and our children's: while the floor has its turn nobody else uses any of it, and crispd, a child, has not ended.
func (f *floorTarget) cpu() (time.Duration, error) {
	sum := time.Duration(0)
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum, nil
}

// exec runs /true in the namespaces of pid: nsenter's work, by the pod's own binary.
func (f *floorTarget) exec(pid string) error {
	cmd := exec.Command("/usr/bin/nsenter", "--target", pid, "--pid", "--mount", "--net", "--ipc", "--uts", "/true")
	return cmd.Run()
}

func (f *floorTarget) close() error {
	var errs []error
	if f.bridge != nil {
		errs = append(errs, netlink.LinkDel(f.bridge))
	}
	for _, dir := range append([]string{f.v2}, f.v1...) {
		left, _ := filepath.Glob(dir + "/*/*") // the pattern is well-formed
		pods, _ := filepath.Glob(dir + "/*")
		for _, d := range append(left, append(pods, dir)...) {
			_ = unix.Rmdir(d) // control files match the pattern too; the last one tells
		}
		if _, err := os.Stat(dir); err == nil {
			errs = append(errs, fmt.Errorf("cgroup %s is still in use", dir))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(f.root))...)
}
