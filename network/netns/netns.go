// Package netns makes, enters, pins and lists network namespaces.
//
// [Do] runs a function inside a namespace; [New] makes one that lives as long as
// the returned file; [Dir] is a directory like /run/netns in which namespaces are
// visible by name, for ip-netns(8) and for CNI daemons.
//
// This is the only package below network/ that moves threads. It knows
// nothing of links, addresses or pods.
//
// Version ledger: setns(2) 3.0; /proc/thread-self 3.17; open_tree(2) and
// move_mount(2) 5.2.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// threadNS names the network namespace of the calling thread. /proc/self would
// name the main thread's, which need not be the same.
const threadNS = "/proc/thread-self/ns/net"

// errExited is returned by Do when fn ended its goroutine (runtime.Goexit, as
// testing.T.FailNow does) instead of returning.
var errExited = errors.New("function ended its goroutine")

// Do runs fn on a thread of its own that is inside ns, waits for it, and returns
// its error. A nil ns means the namespace the process is in: fn then simply runs
// in the caller's goroutine.
//
// A file or socket that fn opens stays in ns; goroutines that it starts do not.
// If the thread cannot be moved back it is not unlocked, so that it dies with its
// goroutine and no other goroutine ever runs in the wrong namespace.
//
// Needs: CAP_SYS_ADMIN in the user namespace that owns ns, and in our own (setns(2)).
// Runs on: any goroutine. Undo: none needed. Trust: ns must be a network
// namespace; setns checks it.
func Do(ns *os.File, fn func() error) error {
	if ns == nil {
		return fn()
	}
	// One result, written once: buffered, so that the goroutine never waits.
	done := make(chan error, 1)
	go func() {
		err := errExited
		defer func() { done <- err }()
		err = doLocked(ns, fn)
	}()
	err := <-done
	runtime.KeepAlive(ns)
	return err
}

// doLocked is Do on the goroutine made for it.
func doLocked(ns *os.File, fn func() error) (err error) {
	runtime.LockOSThread()
	home, err := unix.Open(threadNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread() // The thread has not moved.
		return &os.PathError{Op: "open", Path: threadNS, Err: err}
	}
	defer func() { _ = unix.Close(home) }() // Read-only: nothing can be lost.
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread() // The thread has not moved.
		return fmt.Errorf("enter network namespace %s: setns: %w", ns.Name(), err)
	}
	// From here the thread is elsewhere: it is unlocked only after it is back.
	defer func() {
		if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
			err = errors.Join(err, fmt.Errorf("leave network namespace %s: setns: %w", ns.Name(), back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
}

// New makes a network namespace with nothing in it but a loopback device that is
// down. It lives until the returned file is closed and nothing else refers to it.
//
// Needs: CAP_SYS_ADMIN. Runs on: a thread of its own. Undo: Close.
func New() (*os.File, error) {
	type result struct {
		ns  *os.File
		err error
	}
	done := make(chan result, 1) // Written once.
	go func() {
		ns, err := newLocked()
		done <- result{ns, err}
	}()
	r := <-done
	return r.ns, r.err
}

// newLocked is New on the goroutine made for it. As in doLocked, a thread that
// cannot be moved back dies. (Only then: if it is the process's first thread, the
// Go runtime cannot end it, and /proc/self would show the wrong namespace.)
func newLocked() (ns *os.File, err error) {
	runtime.LockOSThread()
	home, err := unix.Open(threadNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread() // The thread has not moved.
		return nil, &os.PathError{Op: "open", Path: threadNS, Err: err}
	}
	defer func() { _ = unix.Close(home) }() // Read-only: nothing can be lost.
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread() // The thread has not moved.
		return nil, fmt.Errorf("cannot make a network namespace: unshare: %w", err)
	}
	ns, err = os.Open(threadNS)
	if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
		return ns, errors.Join(err, fmt.Errorf("leave new network namespace: setns: %w", back))
	}
	runtime.UnlockOSThread()
	return ns, err
}

// Current opens the network namespace of the process.
func Current() (*os.File, error) { return os.Open(threadNS) }

// Same reports whether a and b are the same namespace.
func Same(a, b *os.File) (bool, error) {
	ai, err := a.Stat()
	if err != nil {
		return false, err
	}
	bi, err := b.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(ai, bi), nil
}
