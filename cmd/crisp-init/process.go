package main

import (
	"errors"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// become turns the calling thread into the program p describes. It returns only when a step
// failed; then the process must end.
//
// The order, and why:
//
//  1. umask, rlimits, labels for the execve, session keyring: need the privileges we still have.
//  2. close every descriptor but stdio and the control socket: from here on a path like
//     /proc/self/fd/7 leads nowhere (CVE-2024-21626).
//  3. working directory: entered as root, again as the user where root may not (NFS root_squash).
//  4. without no_new_privs the seccomp filter is loaded now, while CAP_SYS_ADMIN is left;
//     with it, last, so that the filter need not allow what follows.
//  5. bounding set, then user and groups with the permitted set kept, then the exact sets.
//  6. startContainer hooks: programs of the container's image, so with the container's rights and under its filter, which
//     is loaded before them in any case. (Package spawn refuses them where one of them could take us over.)
//  7. execve; in a successor, if next is not nil (successor.go).
//
// Needs: to be root in the user namespace. Runs on: the locked main thread; identity,
// capabilities and filters are that thread's alone, and execve keeps it. Trust: arguments come from
// the daemon; the file that is executed comes from the container.
func become(p *initproto.Process, hooks *initproto.Hooks, labels *labels, control *initproto.Conn, next *succession, warnings []string) *step {
	unix.Umask(int(p.Umask))
	for _, l := range p.Rlimits {
		warning, err := setRlimit(l)
		if err != nil {
			return failed("set rlimit "+strconv.Itoa(int(l.Resource)), err)
		}
		if warning != "" {
			warnings = append(warnings, warning)
		}
	}
	if s := labels.apply(); s != nil {
		return s
	}
	if p.Keyring != "" {
		// ENOSYS, EPERM: no keyrings in this kernel or under this filter; nobody needs ours then.
		_, err := unix.KeyctlJoinSessionKeyring(p.Keyring)
		if err == unix.EDQUOT {
			return &step{name: "make session keyring", err: err, text: "quota of keys exceeded: raise kernel.keys.maxkeys"}
		}
		if err != nil && err != unix.ENOSYS && err != unix.EPERM && err != unix.EACCES {
			return failed("make session keyring", err)
		}
	}
	first := uint(controlFD + 1)
	if next != nil {
		first = statusFD + 1
	}
	if err := unix.CloseRange(first, ^uint(0), 0); err != nil {
		return failed("close descriptors", &sys.Error{Op: "close_range", Err: err})
	}
	cwdErr := enter(p.Cwd)
	if cwdErr != nil && !errors.Is(cwdErr, unix.EACCES) {
		return failed("enter working directory "+p.Cwd, cwdErr)
	}
	if len(p.Seccomp) > 0 && !p.NoNewPrivs {
		if err := loadSeccomp(p.Seccomp, p.SeccompFlags); err != nil {
			return failed("load seccomp filter", err)
		}
	}
	if s := setIdentity(p); s != nil {
		return s
	}
	if cwdErr != nil {
		if err := enter(p.Cwd); err != nil {
			return failed("enter working directory "+p.Cwd, err)
		}
	}
	if p.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return failed("set no_new_privs", err)
		}
	}
	path, s := lookPath(p)
	if s != nil {
		return s
	}
	if next != nil {
		return next.fork(p, path, warnings)
	}
	filterLast := len(p.Seccomp) > 0 && p.NoNewPrivs
	if len(hooks.StartContainer) > 0 {
		if filterLast {
			if err := loadSeccomp(p.Seccomp, p.SeccompFlags); err != nil {
				return failed("load seccomp filter", err)
			}
			filterLast = false
		}
		if s := runHooks("startContainer", hooks.StartContainer, hooks.State, "created", ""); s != nil {
			return s
		}
	}
	// From here we may still fail, and then say so; EOF without a failure means that execve succeeded.
	done := initproto.Started{Warnings: warnings}
	if err := control.Send(initproto.Message{Type: initproto.TypeDone, Body: done.Encode()}); err != nil {
		return failed("tell the pod init", err)
	}
	if filterLast {
		if err := loadSeccomp(p.Seccomp, p.SeccompFlags); err != nil {
			return failed("load seccomp filter", err)
		}
	}
	// syscall.Exec gives back the soft RLIMIT_NOFILE that the Go runtime raised at start.
	err := syscall.Exec(path, p.Args, p.Env)
	return failed("exec "+strconv.Quote(path), err)
}

func setRlimit(l initproto.Rlimit) (warning string, err error) {
	want := syscall.Rlimit{Cur: l.Soft, Max: l.Hard}
	// Package syscall's, not unix's: it also tells the runtime not to restore RLIMIT_NOFILE at exec.
	err = syscall.Setrlimit(int(l.Resource), &want)
	if err != syscall.EPERM {
		return "", err
	}
	// Without CAP_SYS_RESOURCE a hard limit cannot be raised: take what there is.
	var have syscall.Rlimit
	if err := syscall.Getrlimit(int(l.Resource), &have); err != nil {
		return "", err
	}
	want.Max = min(want.Max, have.Max)
	want.Cur = min(want.Cur, want.Max)
	return "rlimit " + strconv.Itoa(int(l.Resource)) + " was lowered to the hard limit of this host", syscall.Setrlimit(int(l.Resource), &want)
}

// enter changes to the working directory and makes sure that it lies below our root: a
// directory outside has no path (getcwd(3) gives "(unreachable)…").
func enter(dir string) error {
	if err := unix.Chdir(dir); err != nil {
		return &sys.Error{Op: "chdir", Err: err}
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil {
		return &sys.Error{Op: "getcwd", Err: err}
	}
	if n < 1 || buf[0] != '/' {
		return errors.New("the directory is outside the container's root")
	}
	return nil
}

// setIdentity sets groups, ids and capabilities(7) of this thread.
func setIdentity(p *initproto.Process) *step {
	last := lastCapability()
	for c := 0; c <= last; c++ {
		if p.Bounding&(1<<c) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			return failed("drop capability "+strconv.Itoa(c)+" from the bounding set", err)
		}
	}
	// Without this the change to a user other than root would clear the permitted set
	// before the exact sets are written.
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return failed("keep capabilities", err)
	}
	if err := setGroups(p.Groups); err != nil {
		return failed("set supplementary groups", err)
	}
	if err := setID(unix.SYS_SETRESGID, p.GID); err != nil {
		return failed("set group "+strconv.FormatUint(uint64(p.GID), 10), err)
	}
	if err := setID(unix.SYS_SETRESUID, p.UID); err != nil {
		return failed("set user "+strconv.FormatUint(uint64(p.UID), 10), err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	known := uint64(1)<<(last+1) - 1
	e, pr, i := p.Effective&known, p.Permitted&known, p.Inheritable&known
	data := [2]unix.CapUserData{
		{Effective: uint32(e), Permitted: uint32(pr), Inheritable: uint32(i)},
		{Effective: uint32(e >> 32), Permitted: uint32(pr >> 32), Inheritable: uint32(i >> 32)},
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return failed("set capabilities", &sys.Error{Op: "capset", Err: err})
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return failed("clear ambient capabilities", err)
	}
	for c := 0; c <= last; c++ {
		if p.Ambient&(1<<c) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
			return failed("raise ambient capability "+strconv.Itoa(c), err)
		}
	}
	return nil
}

// lastCapability is the highest capability this kernel knows: PR_CAPBSET_READ refuses the next.
func lastCapability() int {
	for c := 0; c < 64; c++ {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err != nil {
			return c - 1
		}
	}
	return 63
}

// lookPath finds the program as a shell would, with the container's PATH and as the container's user.
func lookPath(p *initproto.Process) (string, *step) {
	name := p.Args[0]
	if strings.Contains(name, "/") {
		return name, nil
	}
	search := ""
	for _, kv := range p.Env { // the last one wins
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			search = v
		}
	}
	denied := false
	for _, dir := range strings.Split(search, ":") {
		if dir == "" {
			dir = "."
		}
		path := dir + "/" + name
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		// The kernel checks with the effective ids at execve; here they equal the real ones.
		if err := unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, 0); err != nil {
			denied = true
			continue
		}
		return path, nil
	}
	s := &step{name: "exec " + strconv.Quote(name), err: unix.ENOENT, text: "executable file not found in $PATH"}
	if denied {
		s.err, s.text = unix.EACCES, "found in $PATH, but not executable for this user"
	}
	return "", s
}
