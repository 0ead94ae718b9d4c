package netns

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// usesPerProc is how many namespaces one procfs serves: the price of making and
// dropping one (0.4 ms) is shared by so many.
const usesPerProc = 64

// Sysctls writes network settings of many short-lived namespaces. The zero value is
// ready; Close it. It is safe for concurrent use.
//
// /proc/sys/net shows every thread the settings of its own namespace, and the
// kernel keeps a directory entry of "ipv6" for each namespace that was ever looked
// at, all in one hash chain (proc_sys_compare): with n pods, opening a setting
// takes time in proportion to n (0.2 ms with 200 pods on the development machine,
// 0.03 ms without any). Sysctls therefore looks at them through a procfs of its
// own, which is mounted nowhere and is replaced every 64 pods.
type Sysctls struct {
	mu      sync.Mutex
	current *proc
}

// proc is one procfs.
type proc struct {
	fd         int // of the detached mount; unix.AT_FDCWD where there is only /proc
	uses, busy int // how often it was used, and how many use it now; guarded by Sysctls.mu
	retired    bool
}

// Write sets name ("ipv6/conf/eth0/accept_ra") in the network namespace of the
// calling thread, usually within Do.
//
// Needs: CAP_NET_ADMIN in the namespace's user namespace; without CAP_SYS_ADMIN in
// our own, or before Linux 5.2, it is slow as described. Trust: name comes from us.
func (s *Sysctls) Write(name, value string) error {
	p := s.take()
	defer s.put(p)
	path := "sys/net/" + name
	if p.fd == unix.AT_FDCWD {
		path = "/proc/" + path
	}
	fd, err := unix.Openat(p.fd, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		_ = unix.Close(fd) // A setting is taken by write(2), or not at all.
	}
	if err != nil {
		return fmt.Errorf("set net/%s to %s: %w", name, value, err)
	}
	return nil
}

// Close drops the procfs. No Write may be running, or follow.
func (s *Sysctls) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil {
		s.retireLocked(s.current)
		s.current = nil
	}
	return nil
}

func (s *Sysctls) take() *proc {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil && s.current.uses >= usesPerProc {
		s.retireLocked(s.current)
		s.current = nil
	}
	if s.current == nil {
		s.current = newProc()
	}
	s.current.uses++
	s.current.busy++
	return s.current
}

func (s *Sysctls) put(p *proc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.busy--
	if p.retired {
		s.retireLocked(p)
	}
}

// retireLocked closes p now, or lets its last user do so.
func (s *Sysctls) retireLocked(p *proc) {
	p.retired = true
	if p.busy == 0 && p.fd != unix.AT_FDCWD {
		_ = unix.Close(p.fd) // Nothing is written through it.
		p.fd = unix.AT_FDCWD
	}
}

// newProc makes a procfs, or falls back to the one on /proc.
func newProc() *proc {
	fallback := &proc{fd: unix.AT_FDCWD}
	config, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fallback
	}
	defer func() { _ = unix.Close(config) }() // Of no more use.
	if err := unix.FsconfigCreate(config); err != nil {
		return fallback
	}
	fd, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return fallback
	}
	if err := unix.Faccessat(fd, "sys/net", unix.R_OK, 0); err != nil {
		_ = unix.Close(fd) // Of no use.
		return fallback
	}
	return &proc{fd: fd}
}
