package main

import (
	"bufio"
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
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// floorTarget does the system calls that no runtime can avoid for such a pod,
// and nothing else: cgroups, one clone for the pod's namespaces, a veth pair on a
// bridge with an address, an overlay, one clone and execve for the container. No records, no checks,
// no seccomp, no logs.
type floorTarget struct {
	binary, root, lower, cgroups string
	bridge                       *netlink.Bridge
}

func newFloor(o options) (*floorTarget, error) {
	b := make([]byte, 3)
	rand.Read(b) // never fails (crypto/rand)
	tag := hex.EncodeToString(b)
	binary, err := filepath.Abs(o.floor)
	if err != nil {
		return nil, err
	}
	f := &floorTarget{binary: binary, root: "/var/tmp/crisp-floor-" + tag, cgroups: "/sys/fs/cgroup/crisp-floor-" + tag}
	f.lower = f.root + "/lower"
	if _, err := os.Stat("/sys/fs/cgroup/unified/cgroup.procs"); err == nil {
		f.cgroups = "/sys/fs/cgroup/unified/crisp-floor-" + tag
	}
	if err := errors.Join(os.MkdirAll(f.lower, 0o755), os.Mkdir(f.cgroups, 0o755), copyFile(o.payload, f.lower+"/payload")); err != nil {
		return nil, errors.Join(err, f.close())
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

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

func (f *floorTarget) name() string { return "floor" }

func (f *floorTarget) cycle(_ context.Context, i int, lap func(string)) (err error) {
	pod := fmt.Sprintf("%s/p%d", f.cgroups, i)
	if err := errors.Join(os.Mkdir(pod, 0o755), os.Mkdir(pod+"/init", 0o755)); err != nil {
		return err
	}
	cgroup, err := os.Open(pod + "/init")
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
	if err := cmd.Start(); err != nil {
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
	for _, d := range []string{dir, dir + "/upper", dir + "/work", dir + "/merged", pod + "/c"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	lap("create")
	pid, err := ask(dir + " " + pod + "/c " + f.lower)
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
	if err := errors.Join(os.RemoveAll(dir), os.Remove(pod+"/c"), os.Remove(pod+"/init"), os.Remove(pod)); err != nil {
		return err
	}
	lap("remove")
	return nil
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

// exec runs /payload true in the namespaces of pid: nsenter's work, by the pod's own binary.
func (f *floorTarget) exec(pid string) error {
	cmd := exec.Command("/usr/bin/nsenter", "--target", pid, "--pid", "--mount", "--net", "--ipc", "--uts", "/payload", "true")
	return cmd.Run()
}

func (f *floorTarget) hold(context.Context, int) (int64, error) { return 0, nil }

func (f *floorTarget) close() error {
	var errs []error
	if f.bridge != nil {
		errs = append(errs, netlink.LinkDel(f.bridge))
	}
	left, _ := filepath.Glob(f.cgroups + "/*/*") // the pattern is well-formed
	pods, _ := filepath.Glob(f.cgroups + "/*")
	for _, dir := range append(left, append(pods, f.cgroups)...) {
		_ = unix.Rmdir(dir) // control files match the pattern too; the last one tells
	}
	if _, err := os.Stat(f.cgroups); err == nil {
		errs = append(errs, fmt.Errorf("cgroup %s is still in use", f.cgroups))
	}
	return errors.Join(append(errs, os.RemoveAll(f.root))...)
}
