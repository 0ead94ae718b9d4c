package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// namespaces in the order in which the demo shows them.
var namespaces = []string{"net", "ipc", "uts", "pid", "mnt", "cgroup", "user"}

func init() {
	file := func(path string) verb { return verb{"", func([]string) error { return copyFile(path) }} }
	verbs["status"] = file("/proc/self/status")
	verbs["mountinfo"] = file("/proc/self/mountinfo")
	verbs["cgroup"] = file("/proc/self/cgroup")
	verbs["limits"] = file("/proc/self/limits")
	verbs["cat"] = verb{"FILE…", func(args []string) error {
		for _, path := range args {
			if err := copyFile(path); err != nil {
				return err
			}
		}
		return nil
	}}
	verbs["id"] = verb{"", showID}
	verbs["env"] = verb{"[NAME]", showEnv}
	verbs["pwd"] = verb{"", func([]string) error {
		// Not os.Getwd, which believes PWD.
		buf := make([]byte, unix.PathMax)
		n, err := unix.Getcwd(buf)
		if err == nil {
			fmt.Println(string(buf[:n-1]))
		}
		return err
	}}
	verbs["hostname"] = verb{"", func([]string) error {
		name, err := os.Hostname()
		fmt.Println(name)
		return err
	}}
	verbs["args"] = verb{"ARGUMENT… (prints each quoted)", func(args []string) error {
		for _, a := range args {
			fmt.Printf("%q\n", a)
		}
		return nil
	}}
	verbs["ls"] = verb{"DIR…", listDirs}
	verbs["stat"] = verb{"FILE… (mode, owner, size, device numbers, link target)", statFiles}
	verbs["ns"] = verb{"(type and inode of each namespace)", func([]string) error {
		for _, ns := range namespaces {
			link, err := os.Readlink("/proc/self/ns/" + ns)
			if err != nil {
				return err
			}
			fmt.Printf("%s %s\n", ns, link[strings.IndexByte(link, '[')+1:len(link)-1])
		}
		return nil
	}}
	verbs["ps"] = verb{"(pid, parent and command line of each process)", listProcesses}
	verbs["fds"] = verb{"(number and target of each open file)", listFDs}
	verbs["umask"] = verb{"", func([]string) error {
		_, err := fmt.Printf("%04o\n", unix.Umask(0))
		return err
	}}
	verbs["statfs"] = verb{"PATH (type, size in bytes, read-only)", func(args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(args[0], &st); err != nil {
			return &os.PathError{Op: "statfs", Path: args[0], Err: err}
		}
		fmt.Printf("type=%#x size=%d readonly=%t\n", st.Type, uint64(st.Bsize)*st.Blocks, st.Flags&unix.ST_RDONLY != 0)
		return nil
	}}
}

func copyFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(os.Stdout, f)
	return err
}

func showID([]string) error {
	groups, err := os.Getgroups()
	if err != nil {
		return err
	}
	fmt.Printf("uid=%d euid=%d gid=%d egid=%d groups=%s\n", os.Getuid(), os.Geteuid(), os.Getgid(), os.Getegid(), strings.Trim(fmt.Sprint(groups), "[]"))
	return nil
}

func showEnv(args []string) error {
	if len(args) == 0 {
		fmt.Println(strings.Join(os.Environ(), "\n"))
		return nil
	}
	for _, name := range args {
		value, ok := os.LookupEnv(name)
		if !ok {
			return fmt.Errorf("%s is not set", name)
		}
		fmt.Println(value)
	}
	return nil
}

func listDirs(args []string) error {
	for _, dir := range args {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			fmt.Println(e.Name())
		}
	}
	return nil
}

func statFiles(args []string) error {
	for _, path := range args {
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		fmt.Printf("%s mode=%#o uid=%d gid=%d size=%d", path, st.Mode, st.Uid, st.Gid, st.Size)
		if info.Mode()&fs.ModeDevice != 0 {
			fmt.Printf(" rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Printf(" -> %s", target)
		}
		fmt.Println()
	}
	return nil
}

func listProcesses([]string) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		cmdline, err2 := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if errors.Join(err, err2) != nil {
			continue // it ended
		}
		// proc(5): pid (comm) state ppid …; comm may hold anything, the last ) ends it.
		after := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		fmt.Printf("%s %s %s\n", e.Name(), after[1], strings.TrimSpace(string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))))
	}
	return nil
}

func listFDs([]string) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasSuffix(target, "/fd") || strings.HasPrefix(filepath.Base(target), "cpu.") {
			continue // the directory just read, or Go's own: its poller, the cgroup files behind GOMAXPROCS
		}
		fmt.Printf("%s %s\n", e.Name(), target)
	}
	return nil
}
