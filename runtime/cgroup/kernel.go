package cgroup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // fills in cgroups.DevicesSetV1 and DevicesSetV2
	devices "github.com/opencontainers/cgroups/devices/config"
	"golang.org/x/sys/unix"
)

// kernel is the cgroup file systems, as far as the package touches them: its
// edge, so that tests can put a kernel of another layout behind it. A tree is an index into the
// layout's hierarchies; paths begin with "/" at that hierarchy's root.
//
// All errors are *fs.PathError with the absolute path.
type kernel interface {
	// read returns a file's content, which for every file but the lists of processes the kernel gives in one piece.
	read(tree int, path string) (string, error)
	write(tree int, path, value string) error
	mkdir(tree int, path string) error
	rmdir(tree int, path string) error
	// children names the child cgroups.
	children(tree int, path string) ([]string, error)
	// writeAll writes a file of a cgroup and of all below it.
	writeAll(tree int, path, file, value string) error
	// removeBelow removes all descendants of a cgroup, deepest first, as far as it can.
	removeBelow(tree int, path string) error
	// procs lists the processes in a cgroup and all below it; 0 stands for one of another PID namespace.
	procs(tree int, path string) ([]int, error)
	open(tree int, path string, flags int) (*os.File, error)
	// setDevices makes rules the complete device policy of a cgroup.
	setDevices(tree int, path string, rules []*devices.Rule) error
}

const (
	// maxFile bounds what is read of one file: 256 Ki processes, or any statistics.
	maxFile = 2 << 20
	// dirMode of cgroups we make, as the kubelet's and runc's.
	dirMode = 0o755
)

// cgroupfs is the real kernel. Paths are resolved below a descriptor of each
// hierarchy's root, without links and without leaving its file system: a container
// that may write its part of the tree can only make directories, and those lead nowhere else.
//
// Trust: names below a container's cgroup are chosen by the container when it is privileged.
type cgroupfs struct {
	trees []hierarchy
	roots []int // O_PATH descriptors, same order
}

const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

func openCgroupfs(trees []hierarchy) (*cgroupfs, error) {
	k := &cgroupfs{trees: trees}
	for _, t := range trees {
		fd, err := unix.Open(t.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			_ = k.close() // nothing was done with them
			return nil, &fs.PathError{Op: "open", Path: t.dir, Err: err}
		}
		k.roots = append(k.roots, fd)
	}
	return k, nil
}

func (k *cgroupfs) close() error {
	var errs []error
	for _, fd := range k.roots {
		errs = append(errs, unix.Close(fd))
	}
	k.roots = nil
	return errors.Join(errs...)
}

// host is the absolute path of a cgroup, for messages and for the device code.
func (k *cgroupfs) host(tree int, path string) string { return filepath.Join(k.trees[tree].dir, path) }

func relative(path string) string {
	if path = strings.TrimLeft(path, "/"); path == "" {
		return "."
	}
	return path
}

func (k *cgroupfs) openat(tree int, path string, flags int) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: beneath}
	for {
		fd, err := unix.Openat2(k.roots[tree], relative(path), &how)
		// EAGAIN: something was renamed meanwhile, openat2(2).
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: k.host(tree, path), Err: err}
		}
		return fd, nil
	}
}

func (k *cgroupfs) open(tree int, path string, flags int) (*os.File, error) {
	fd, err := k.openat(tree, path, flags)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), k.host(tree, path)), nil
}

func (k *cgroupfs) read(tree int, path string) (string, error) {
	fd, err := k.openat(tree, path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	// One read is enough when it did not fill the buffer: the kernel makes such a file's
	// content in one piece (single_start in kernfs_seq_start, fs/kernfs/file.c).
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	data, err := readUntil(fd, (*buf)[:0], func(n, space int) bool { return n < space })
	if err != nil {
		return "", &fs.PathError{Op: "read", Path: k.host(tree, path), Err: err}
	}
	return string(data), nil
}

// buffers are for read: measuring 30 containers reads 600 files, and most are a few bytes.
var buffers = sync.Pool{New: func() any {
	b := make([]byte, 0, 4096)
	return &b
}}

// readUntil reads into buf, or a larger one, until a read gives nothing, or enough says that its n bytes into a
// buffer of space were all.
func readUntil(fd int, buf []byte, enough func(n, space int) bool) ([]byte, error) {
	for {
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		space := cap(buf) - len(buf)
		buf = buf[:len(buf)+n]
		if n == 0 || enough(n, space) {
			return buf, nil
		}
		if len(buf) >= maxFile {
			return nil, unix.EFBIG
		}
		if len(buf) == cap(buf) {
			buf = append(make([]byte, 0, 4*cap(buf)), buf...)
		}
	}
}

func (k *cgroupfs) write(tree int, path, value string) error {
	fd, err := k.openat(tree, path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Files of several records, like io.max, take one at a time.
	for line := range strings.SplitSeq(strings.TrimSuffix(value, "\n"), "\n") {
		if line == "" {
			line = "\n" // an empty write never reaches the kernel's parser
		}
		for {
			_, err := unix.Write(fd, []byte(line))
			if err == unix.EINTR { // reclaim for a v1 memory limit gives up at any signal
				continue
			}
			if err != nil {
				return &fs.PathError{Op: "write", Path: k.host(tree, path), Err: err}
			}
			break
		}
	}
	return nil
}

func (k *cgroupfs) mkdir(tree int, path string) error {
	err := ignoringEINTR(func() error { return unix.Mkdirat(k.roots[tree], relative(path), dirMode) })
	if err != nil {
		return &fs.PathError{Op: "mkdir", Path: k.host(tree, path), Err: err}
	}
	return nil
}

func (k *cgroupfs) rmdir(tree int, path string) error {
	err := ignoringEINTR(func() error { return unix.Unlinkat(k.roots[tree], relative(path), unix.AT_REMOVEDIR) })
	if err != nil {
		return &fs.PathError{Op: "rmdir", Path: k.host(tree, path), Err: err}
	}
	return nil
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

func (k *cgroupfs) children(tree int, path string) ([]string, error) {
	fd, err := k.openat(tree, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	names, err := subdirectories(fd)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: k.host(tree, path), Err: err}
	}
	return names, nil
}

// subdirectories names the directories in fd; none if it was removed meanwhile.
func subdirectories(fd int) ([]string, error) {
	var names []string
	buf := make([]byte, 8<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ENOENT:
			return nil, nil
		case err != nil || n == 0:
			return names, err
		}
		names = append(names, direntDirectories(buf[:n])...)
	}
}

// direntDirectories picks the names of directories from what getdents64(2) gave:
// struct linux_dirent64 { u64 ino, off; u16 reclen; u8 type; char name[]; }.
// cgroupfs fills in the type always.
func direntDirectories(buf []byte) []string {
	const reclen, kind, head = 16, 18, 19
	var names []string
	for len(buf) > head {
		size := int(binary.NativeEndian.Uint16(buf[reclen:]))
		if size <= head || size > len(buf) {
			return names
		}
		name, _, _ := bytes.Cut(buf[head:size], []byte{0})
		if buf[kind] == unix.DT_DIR && string(name) != "." && string(name) != ".." {
			names = append(names, string(name))
		}
		buf = buf[size:]
	}
	return names
}

// walk calls visit with a descriptor of each cgroup below and including path,
// children first. It holds one descriptor a level and never joins names, so that
// a tree nested deeper than PATH_MAX can be walked, and removed, too.
func (k *cgroupfs) walk(tree int, path string, visit func(parent int, name string, fd int) error) error {
	fd, err := k.openat(tree, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := walkBelow(fd, visit); err != nil {
		return &fs.PathError{Op: "walk", Path: k.host(tree, path), Err: err}
	}
	if err := visit(-1, "", fd); err != nil {
		return &fs.PathError{Op: "walk", Path: k.host(tree, path), Err: err}
	}
	return nil
}

func walkBelow(dir int, visit func(parent int, name string, fd int) error) error {
	names, err := subdirectories(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT || err == unix.ENODEV { // removed meanwhile
			continue
		}
		if err != nil {
			return err
		}
		if err = walkBelow(fd, visit); err == nil {
			err = visit(dir, name, fd)
		}
		_ = unix.Close(fd) // a directory: nothing to lose
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *cgroupfs) writeAll(tree int, path, file, value string) error {
	return k.walk(tree, path, func(_ int, _ string, fd int) error {
		f, err := unix.Openat(fd, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = ignoringEINTR(func() error { _, err := unix.Write(f, []byte(value)); return err })
			_ = unix.Close(f) // the write said how it went
		}
		if err == unix.ENODEV || err == unix.ENOENT { // removed meanwhile
			return nil
		}
		return err
	})
}

func (k *cgroupfs) removeBelow(tree int, path string) error {
	return k.walk(tree, path, func(parent int, name string, _ int) error {
		if parent < 0 {
			return nil
		}
		err := ignoringEINTR(func() error { return unix.Unlinkat(parent, name, unix.AT_REMOVEDIR) })
		if err == unix.ENOENT {
			return nil
		}
		return err
	})
}

func (k *cgroupfs) procs(tree int, path string) ([]int, error) {
	var pids []int
	err := k.walk(tree, path, func(_ int, _ string, fd int) error {
		file, err := unix.Openat(fd, "cgroup.procs", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			var data []byte
			// A list may come in pieces of any size: until nothing comes.
			data, err = readUntil(file, make([]byte, 0, 4096), func(int, int) bool { return false })
			_ = unix.Close(file) // only read
			pids = appendPIDs(pids, data)
		}
		// EOPNOTSUPP: a threaded cgroup; its processes are listed by the domain above it
		// (cgroup-v2.rst, "Threads"). ENOENT, ENODEV: removed meanwhile.
		if err == unix.EOPNOTSUPP || err == unix.ENODEV || err == unix.ENOENT {
			return nil
		}
		return err
	})
	return pids, err
}

// appendPIDs parses cgroup.procs: one number a line.
func appendPIDs(pids []int, data []byte) []int {
	for line := range bytes.Lines(data) {
		if pid, err := strconv.Atoi(string(bytes.TrimSpace(line))); err == nil && pid >= 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// setDevices hands the rules to opencontainers/cgroups, which compares them with what the cgroup
// has, writes the difference and reads back whether it took (v1), or attaches an eBPF program (v2).
func (k *cgroupfs) setDevices(tree int, path string, rules []*devices.Rule) error {
	r := &cgroups.Resources{Devices: rules}
	if k.trees[tree].v2 {
		return cgroups.DevicesSetV2(k.host(tree, path), r)
	}
	return cgroups.DevicesSetV1(k.host(tree, path), r)
}
