package main

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	verbs["probe"] = verb{"FIRST LAST (tries each system call of these numbers, with arguments that do nothing, in a process of its own; prints EPERM, ENOSYS or -)", probe}
	verbs["probe-one"] = verb{"NUMBER", probeOne}
	verbs["tree"] = verb{"DIR (each entry below: mode, owner, device numbers, link target)", func(args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		return filepath.WalkDir(args[0], func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := os.Lstat(path)
			if err != nil {
				return nil // gone meanwhile
			}
			st := info.Sys().(*syscall.Stat_t)
			fmt.Printf("%s %#o %d:%d", path, st.Mode, st.Uid, st.Gid)
			if info.Mode()&fs.ModeDevice != 0 {
				fmt.Printf(" dev %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
			}
			if to, err := os.Readlink(path); err == nil {
				fmt.Printf(" -> %s", to)
			}
			fmt.Println()
			return nil
		})
	}}
}

// hangs is how long a call may take before it counts as one that waits.
const hangs = 2 * time.Second

// probe runs a process for each call: some end it, one waits for ever.
func probe(args []string) error {
	if err := want(args, 2, 2); err != nil {
		return err
	}
	first, err := number(args, 0, 0)
	if err != nil {
		return err
	}
	last, err := number(args, 1, 0)
	if err != nil {
		return err
	}
	for n := first; n <= last; n++ {
		switch n {
		case unix.SYS_SYNC: // takes no argument, and as long as the disks of the host take
			continue
		case unix.SYS_LANDLOCK_RESTRICT_SELF: // EPERM without no_new_privs, whatever the arguments
			continue
		}
		verdict, err := probeIn(n)
		if err != nil {
			return err
		}
		fmt.Println(n, verdict)
	}
	return nil
}

func probeIn(n int) (verdict string, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return "", err
	}
	defer null.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{"payload", "probe-one", strconv.Itoa(n)}, &os.ProcAttr{Files: []*os.File{null, w, nil}})
	w.Close()
	if err != nil {
		return "", err
	}
	out := bufio.NewReader(r)
	if _, err := out.ReadString('\n'); err != nil { // it is about to
		return "", fmt.Errorf("call %d was not tried: %w", n, err)
	}
	if err := r.SetReadDeadline(time.Now().Add(hangs)); err != nil {
		return "", err
	}
	line, _ := out.ReadString('\n') // nothing: it has ended, or waits
	_ = p.Kill()                    // it may have ended
	if _, err := p.Wait(); err != nil {
		return "", err
	}
	if line = strings.TrimSpace(line); line != "EPERM" && line != "ENOSYS" {
		line = "-"
	}
	return line, nil
}

// probeOne's arguments are no descriptor, no address, no process, no set of flags.
func probeOne(args []string) error {
	n, err := number(args, 0, 0)
	if err != nil {
		return err
	}
	const bad = ^uintptr(0)
	fmt.Println("trying")
	r, _, errno := unix.RawSyscall6(uintptr(n), bad, bad, bad, bad, bad, bad)
	if (n == unix.SYS_FORK || n == unix.SYS_VFORK) && r == 0 && errno == 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0) // the child
	}
	fmt.Println(unix.ErrnoName(errno))
	return nil
}
