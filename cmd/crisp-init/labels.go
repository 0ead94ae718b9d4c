package main

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// ownAttributes are the security attributes of the calling thread, proc_pid_attr(5), in the base mount namespace's procfs: the
// container's own could be anything (CVE-2016-9962's kin CVE-2019-16884, CVE-2019-19921).
const ownAttributes = "/proc/thread-self/attr"

// labels are what a security module is to be told before execve: files that were opened while that procfs was at hand, and
// what is written to them when the time has come. Both belong to the calling thread.
//
// AppArmor and SELinux change the label at the execve, of whatever file: neither policy need know how our init gets there, and
// what we still do is not yet confined. A fork in between has it, too (hooks, successor.go).
type labels struct{ todo []labelWrite }

type labelWrite struct {
	fd         int
	what, text string
}

// openLabels opens what p needs below dir.
func openLabels(dir string, p *initproto.Process) (*labels, *step) {
	l := &labels{}
	for _, w := range []struct{ what, text, label, first, second string }{
		// Since Linux 5.8 each module has its own; before, the first of them had the one.
		{"apply AppArmor profile ", "exec " + p.AppArmor, p.AppArmor, "/apparmor/exec", "/exec"},
		{"apply SELinux label ", p.SELinux, p.SELinux, "/selinux/exec", "/exec"},
		// The session keyring that we make belongs to the container.
		{"apply SELinux label to keys ", p.SELinux, p.SELinux, "/selinux/keycreate", "/keycreate"},
	} {
		if w.label == "" {
			continue
		}
		fd, err := open(dir + w.first)
		if errors.Is(err, unix.ENOENT) {
			fd, err = open(dir + w.second)
		}
		if errors.Is(err, unix.ENOENT) {
			return nil, &step{name: w.what + w.label, err: unix.ENOENT, text: "this kernel has no such security module"}
		}
		if err != nil {
			return nil, failed(w.what+w.label, err)
		}
		l.todo = append(l.todo, labelWrite{fd, w.what + w.label, w.text})
	}
	return l, nil
}

func open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &sys.Error{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// apply tells the modules. Runs on: the thread that opened, which must be the one that executes.
func (l *labels) apply() *step {
	for _, w := range l.todo {
		n, err := unix.Write(w.fd, []byte(w.text))
		if err == nil && n < len(w.text) {
			err = unix.EIO
		}
		if errors.Is(err, unix.ENOENT) {
			return &step{name: w.what, err: err, text: "it is not loaded"}
		}
		if err != nil {
			return failed(w.what, &sys.Error{Op: "write", Err: err})
		}
	}
	return nil
}
