// Command floor is the other half of the benchmark's floor: the bare system
// calls for a pod and a container, without a runtime. It imports next to nothing, so
// that its own start costs as little as a Go program can.
//
//	floor init            PID 1 of nothing: holds the namespaces it was cloned into. For each line
//	                      "ROOT CGROUP TASKS LOWER" on stdin it starts a container, born in the cgroup2
//	                      directory CGROUP and the v1 cgroups of TASKS (files, joined by commas), answers its pid on stdout
//	                      when the program runs, and kills and reaps it at the next line "-".
//	floor container ROOT LOWER   overlay, /proc, /sys, /dev, pivot_root, execve /payload sleep
package main

import (
	"bufio"
	"errors"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == "init":
		err = initPod()
	case len(os.Args) == 4 && os.Args[1] == "container":
		runtime.LockOSThread()
		err = container(os.Args[2], os.Args[3])
	default:
		err = errors.New("usage: floor init | floor container ROOT LOWER")
	}
	if err != nil {
		os.Stderr.WriteString("floor: " + err.Error() + "\n")
		os.Exit(1)
	}
}

func initPod() error {
	if err := loUp(); err != nil {
		return err
	}
	os.Stdout.WriteString("ready\n")
	in := bufio.NewScanner(os.Stdin)
	var child *os.Process
	for in.Scan() {
		if in.Text() == "-" {
			if err := child.Kill(); err != nil {
				return err
			}
			if _, err := child.Wait(); err != nil {
				return err
			}
			os.Stdout.WriteString("gone\n")
			continue
		}
		f := strings.Fields(in.Text())
		cgroup, err := os.Open(f[1])
		if err != nil {
			return err
		}
		var tasks []string
		if f[2] != "-" {
			tasks = strings.Split(f[2], ",")
		}
		r, w, err := os.Pipe() // closed by the container's execve: then the program runs
		if err != nil {
			return err
		}
		err = bornIn(tasks, func() (err error) {
			child, err = os.StartProcess("/proc/self/exe", []string{"floor", "container", f[0], f[3]}, &os.ProcAttr{
				Files: []*os.File{nil, nil, os.Stderr, w},
				Env:   []string{"GOMAXPROCS=1"},
				Sys: &syscall.SysProcAttr{
					Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP,
					UseCgroupFD: true, CgroupFD: int(cgroup.Fd()),
				},
			})
			return err
		})
		if err != nil {
			return err
		}
		w.Close()
		cgroup.Close()
		if _, err := r.Read(make([]byte, 1)); err == nil {
			return errors.New("the container wrote to its pipe")
		}
		r.Close()
		os.Stdout.WriteString(strconv.Itoa(child.Pid) + "\n")
	}
	return in.Err()
}

// bornIn runs start on a thread that has entered the v1 cgroups of the tasks files and ends with it.
func bornIn(tasks []string, start func() error) error {
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
		done <- start()
	}()
	return <-done
}

// loUp is SIOCSIFFLAGS on lo.
func loUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

func container(root, lower string) error {
	unix.CloseOnExec(3)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	options := "lowerdir=" + lower + ",upperdir=" + root + "/upper,workdir=" + root + "/work,volatile"
	at := root + "/merged"
	if err := unix.Mount("overlay", at, "overlay", 0, options); err != nil {
		return err
	}
	for _, m := range []struct {
		kind, at string
		flags    uintptr
	}{
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY},
		{"tmpfs", "/dev", unix.MS_NOSUID},
	} {
		if err := unix.Mkdir(at+m.at, 0o755); err != nil && err != unix.EEXIST {
			return err
		}
		if err := unix.Mount(m.kind, at+m.at, m.kind, m.flags, ""); err != nil {
			return err
		}
	}
	if err := unix.Mknod(at+"/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		return err
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	return unix.Exec("/payload", []string{"/payload", "sleep"}, nil)
}
