package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// makeRoot makes one of crisp's root directories, for root only: below are
// set-uid files of images and pods' secrets (CVE-2021-41103).
func makeRoot(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chmod(dir, 0o700)
}

// listen makes the CRI socket, mode 0660. A socket that a dead crispd left is
// replaced, one that somebody serves is not.
//
// It changes the process's umask for a moment, so nothing else may make files meanwhile.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("cannot listen: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	// Between bind and chmod it would have the umask's mode.
	old := unix.Umask(0o117)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %w", err)
	}
	return l, nil
}

// passed is the CRI socket that systemd has opened for us (crisp.socket, sd_listen_fds(3)), nil when it has not. Its file is
// systemd's: it stays when we end, so that whoever connects meanwhile waits for the next crispd.
func passed(path string) (*net.UnixListener, error) {
	files := activation.Files(true)
	for _, f := range files {
		defer f.Close() // FileListener duplicates
	}
	switch len(files) {
	case 0:
		return nil, nil
	case 1:
	default:
		return nil, fmt.Errorf("cannot serve %d sockets of systemd's: crisp.socket may have one ListenStream", len(files))
	}
	l, err := net.FileListener(files[0])
	if err != nil {
		return nil, fmt.Errorf("cannot serve what systemd passed: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok || u.Addr().String() != path {
		l.Close()
		return nil, fmt.Errorf("cannot serve %s, which systemd passed: the configuration's socket is %s; make crisp.socket's ListenStream the same", l.Addr(), path)
	}
	return u, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something that is no socket")
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return errors.New("another process serves it")
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}
