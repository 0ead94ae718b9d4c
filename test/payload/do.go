package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	verbs["true"] = verb{"", func([]string) error { return nil }}
	verbs["echo"] = verb{"TEXT…", func(args []string) error {
		_, err := fmt.Println(strings.Join(args, " "))
		return err
	}}
	verbs["err"] = verb{"TEXT… (on stderr)", func(args []string) error {
		_, err := fmt.Fprintln(os.Stderr, strings.Join(args, " "))
		return err
	}}
	verbs["part"] = verb{"TEXT… (without a newline)", func(args []string) error {
		_, err := fmt.Print(strings.Join(args, " "))
		return err
	}}
	verbs["exit"] = verb{"STATUS", func(args []string) error {
		n, err := number(args, 0, 0)
		if err == nil {
			os.Exit(n)
		}
		return err
	}}
	verbs["sleep"] = verb{"[SECONDS] (none: for ever)", func(args []string) error {
		if len(args) == 0 {
			select {}
		}
		seconds, err := strconv.ParseFloat(args[0], 64)
		time.Sleep(time.Duration(seconds * float64(time.Second)))
		return err
	}}
	verbs["stdin"] = verb{"(copies stdin to stdout)", func([]string) error {
		_, err := io.Copy(os.Stdout, os.Stdin)
		return err
	}}
	verbs["take"] = verb{"BYTES (reads so many of stdin, and no more)", func(args []string) error {
		n, err := number(args, 0, 0)
		if err == nil {
			_, err = io.CopyN(io.Discard, os.Stdin, int64(n))
		}
		return err
	}}
	verbs["window"] = verb{"(prints rows and columns of the terminal on stdin, now and at each change, for ever)", window}
	verbs["spam"] = verb{"LINES [BYTES PER LINE] (numbered)", spam}
	verbs["trap"] = verb{"(prints each signal; ends after TERM, INT or QUIT; only as the first verb)", trap}
	verbs["ignore"] = verb{"(prints and ignores TERM and INT, for ever)", ignore}
	verbs["oom"] = verb{"[MiB] (allocates and touches; none: until killed)", oom}
	verbs["burn"] = verb{"SECONDS (of one CPU)", func(args []string) error {
		n, err := number(args, 0, 1)
		for end := time.Now().Add(time.Duration(n) * time.Second); time.Now().Before(end); {
		}
		return err
	}}
	verbs["fork"] = verb{"N (children that sleep for ever; prints their pids)", fork}
	verbs["daemonize"] = verb{"(a child that sleeps for ever, in a session of its own, holding stdout)", daemonize}
	verbs["mkfile"] = verb{"FILE TEXT", func(args []string) error {
		if err := want(args, 2, 2); err != nil {
			return err
		}
		return os.WriteFile(args[0], []byte(args[1]+"\n"), 0o644)
	}}
	verbs["mkdir"] = verb{"DIR…", each(func(dir string) error { return os.MkdirAll(dir, 0o755) })}
	verbs["rm"] = verb{"FILE…", each(os.RemoveAll)}
	verbs["touch"] = verb{"FILE…", each(func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	})}
	verbs["symlink"] = verb{"TARGET FILE", func(args []string) error {
		if err := want(args, 2, 2); err != nil {
			return err
		}
		return os.Symlink(args[0], args[1])
	}}
	verbs["fill"] = verb{"FILE MiB (a file of zeros)", fill}
	verbs["wait"] = verb{"FILE (until it is there)", waitFor}
	verbs["syscall"] = verb{"NUMBER [ARGUMENT…] (prints the errno's name, or ok)", systemCall}
	verbs["mknod"] = verb{"FILE MAJOR MINOR (a character device)", func(args []string) error {
		if err := want(args, 3, 3); err != nil {
			return err
		}
		major, err := strconv.ParseUint(args[1], 10, 32)
		minor, err2 := strconv.ParseUint(args[2], 10, 32)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		return os.NewSyscallError("mknod", unix.Mknod(args[0], unix.S_IFCHR|0o666, int(unix.Mkdev(uint32(major), uint32(minor)))))
	}}
	verbs["kill"] = verb{"PID SIGNAL-NUMBER", func(args []string) error {
		if err := want(args, 2, 2); err != nil {
			return err
		}
		pid, err := number(args, 0, 0)
		if err != nil {
			return err
		}
		sig, err := number(args, 1, 0)
		if err != nil {
			return err
		}
		return os.NewSyscallError("kill", unix.Kill(pid, unix.Signal(sig)))
	}}
	verbs["mount-tmpfs"] = verb{"DIR", each(func(dir string) error {
		return os.NewSyscallError("mount", unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	})}
	verbs["shm-write"] = verb{"KEY TEXT (System V shared memory)", shmWrite}
	verbs["shm-read"] = verb{"KEY", shmRead}
}

func each(do func(string) error) func([]string) error {
	return func(args []string) error {
		for _, a := range args {
			if err := do(a); err != nil {
				return err
			}
		}
		return nil
	}
}

// number is argument i, or fallback when there is none.
func number(args []string, i, fallback int) (int, error) {
	if len(args) <= i {
		return fallback, nil
	}
	return strconv.Atoi(args[i])
}

func spam(args []string) error {
	lines, err := number(args, 0, 1)
	if err != nil {
		return err
	}
	size, err := number(args, 1, 0)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(os.Stdout, 1<<20)
	for i := range lines {
		line := strconv.Itoa(i)
		out.WriteString(line)
		for n := len(line); n < size; n++ {
			out.WriteByte('.')
		}
		out.WriteByte('\n') // Flush reports the first error of all writes
	}
	return out.Flush()
}

func trap([]string) error {
	got := make(chan os.Signal, 64)
	signal.Notify(got)
	fmt.Println("ready")
	for s := range got {
		if s == syscall.SIGURG || s == syscall.SIGCHLD {
			continue // Go preempts its goroutines with the one; children send the other
		}
		fmt.Println("signal", int(s.(syscall.Signal)), unix.SignalName(s.(syscall.Signal)))
		if s == syscall.SIGTERM || s == syscall.SIGINT || s == syscall.SIGQUIT {
			return nil
		}
	}
	return nil
}

func window([]string) error {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	for {
		size, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return os.NewSyscallError("ioctl TIOCGWINSZ", err)
		}
		fmt.Println("window", size.Row, size.Col)
		<-changed
	}
}

func ignore([]string) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	fmt.Println("ready")
	select {}
}

func oom(args []string) error {
	most, err := number(args, 0, 1<<40)
	if err != nil {
		return err
	}
	var held [][]byte
	for i := range most {
		b, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return os.NewSyscallError("mmap", err)
		}
		for p := 0; p < len(b); p += os.Getpagesize() {
			b[p] = byte(i)
		}
		held = append(held, b)
	}
	fmt.Println("touched", len(held), "MiB")
	return nil
}

func fork(args []string) error {
	n, err := number(args, 0, 1)
	if err != nil {
		return err
	}
	for range n {
		child := exec.Command("/proc/self/exe", "sleep")
		if err := child.Start(); err != nil {
			return err
		}
		fmt.Println(child.Process.Pid)
	}
	return nil
}

func daemonize([]string) error {
	child := exec.Command("/proc/self/exe", "ignore")
	child.Stdout = os.Stdout
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		return err
	}
	return child.Process.Release()
}

func fill(args []string) error {
	if err := want(args, 2, 2); err != nil {
		return err
	}
	n, err := number(args, 1, 0)
	if err != nil {
		return err
	}
	f, err := os.Create(args[0])
	if err != nil {
		return err
	}
	zeros := make([]byte, 1<<20)
	for range n {
		if _, err := f.Write(zeros); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// waitFor watches the directory, so that nothing polls.
func waitFor(args []string) error {
	if err := want(args, 1, 1); err != nil {
		return err
	}
	in, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("inotify_init1", err)
	}
	defer unix.Close(in)
	if _, err := unix.InotifyAddWatch(in, filepath.Dir(args[0]), unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	buf := make([]byte, 64<<10)
	for {
		if _, err := os.Lstat(args[0]); err == nil {
			return nil
		}
		if _, err := unix.Read(in, buf); err != nil && err != unix.EINTR {
			return os.NewSyscallError("read inotify", err)
		}
	}
}

func systemCall(args []string) error {
	if err := want(args, 1, 7); err != nil {
		return err
	}
	var a [7]uintptr
	for i, s := range args {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			return err
		}
		a[i] = uintptr(n)
	}
	_, _, errno := unix.RawSyscall6(a[0], a[1], a[2], a[3], a[4], a[5], a[6])
	if errno == 0 {
		fmt.Println("ok")
	} else {
		fmt.Println(unix.ErrnoName(errno))
	}
	return nil
}

const shmSize = 4096

func attachShm(key string, flags int) ([]byte, error) {
	n, err := strconv.ParseInt(key, 0, 32)
	if err != nil {
		return nil, err
	}
	id, err := unix.SysvShmGet(int(n), shmSize, flags)
	if err != nil {
		return nil, os.NewSyscallError("shmget", err)
	}
	mem, err := unix.SysvShmAttach(id, 0, 0)
	return mem, os.NewSyscallError("shmat", err)
}

func shmWrite(args []string) error {
	if err := want(args, 2, 2); err != nil {
		return err
	}
	mem, err := attachShm(args[0], unix.IPC_CREAT|0o666)
	if err != nil {
		return err
	}
	n := copy(mem[:shmSize-1], args[1])
	mem[n] = 0
	return unix.SysvShmDetach(mem)
}

func shmRead(args []string) error {
	if err := want(args, 1, 1); err != nil {
		return err
	}
	mem, err := attachShm(args[0], 0)
	if err != nil {
		return err
	}
	text, _, _ := strings.Cut(string(mem), "\x00")
	fmt.Println(text)
	return unix.SysvShmDetach(mem)
}
