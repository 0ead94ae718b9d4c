package unpack

import (
	"fmt"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// smallFile is the largest file, in bytes, that is read into memory whole so
	// that it can be made by another goroutine.
	smallFile = 64 << 10
	// fileQueue bounds how many of these wait, and so the memory: 4 MiB a layer.
	fileQueue = 48
)

// fileKey identifies a name in the tree whichever path led to it.
type fileKey struct {
	dir  uint64 // inode
	base string
}

// file is a small regular file to be made.
type file struct {
	dir  *dir
	base string
	meta meta
	data []byte
}

// makers make small files, several at a time. That is sound because the
// archive's goroutine waits (settle) before it does anything to a
// name that is still being made, or to a tree that may hold one.
type makers struct {
	queue   chan *file     // closed by close
	running sync.WaitGroup // the maker goroutines
	buffers sync.Pool      // of *[]byte, smallFile long

	mu      sync.Mutex
	idle    sync.Cond // pending has become empty
	pending map[fileKey]struct{}
	err     error // first failure; the others' are alike
}

func startMakers() *makers {
	m := &makers{queue: make(chan *file, fileQueue), pending: map[fileKey]struct{}{}}
	m.idle.L = &m.mu
	m.buffers.New = func() any { b := make([]byte, smallFile); return &b }
	// Making a file is half waiting for the file system's journal lock: a few
	// more goroutines than cores keep all busy.
	for range min(runtime.GOMAXPROCS(0)+1, 8) {
		m.running.Add(1) // one maker; ends when the queue is closed
		go m.run()
	}
	return m
}

func (m *makers) run() {
	defer m.running.Done()
	for f := range m.queue {
		err := makeFile(f)
		m.mu.Lock()
		if err != nil && m.err == nil {
			m.err = fmt.Errorf("entry %q: %w", clip(f.meta.name), err)
		}
		delete(m.pending, fileKey{f.dir.ino, f.base})
		if len(m.pending) == 0 {
			m.idle.Broadcast()
		}
		m.mu.Unlock()
		f.dir.done()
		buffer := f.data[:smallFile]
		m.buffers.Put(&buffer)
	}
}

// add queues a file of size bytes read from r. The name is free.
func (m *makers) add(d *dir, base string, meta meta, r io.Reader, size int64) error {
	f := &file{dir: d.use(), base: base, meta: meta, data: (*m.buffers.Get().(*[]byte))[:size]}
	if _, err := io.ReadFull(r, f.data); err != nil {
		f.dir.done()
		return err
	}
	m.mu.Lock()
	err := m.err
	m.pending[fileKey{d.ino, base}] = struct{}{}
	m.mu.Unlock()
	m.queue <- f
	return err
}

// busy reports whether the name is still being made.
func (m *makers) busy(d *dir, base string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.pending[fileKey{d.ino, base}]
	return ok
}

// settle waits until everything queued is made.
func (m *makers) settle() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.pending) > 0 {
		m.idle.Wait()
	}
	return m.err
}

// close ends the makers and waits for them.
func (m *makers) close() {
	close(m.queue)
	m.running.Wait()
}

// makeFile makes a new regular file. EEXIST if the name is taken, which would be our bug.
func makeFile(f *file) error {
	fd, err := createFile(f.dir, f.base)
	if err != nil {
		return err
	}
	for data := f.data; len(data) > 0 && err == nil; {
		var n int
		n, err = unix.Write(fd, data)
		if err == unix.EINTR {
			err = nil
		}
		data = data[max(n, 0):]
	}
	return closeFile(fd, f.meta, err)
}

func createFile(d *dir, base string) (int, error) {
	return unix.Openat(d.fd, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

// closeFile sets the attributes of a file just written, unless writing failed,
// and closes it. The order matters: chown(2) takes away set-id bits and
// capabilities; and the mode is set by fchmod because open's is subject to the
// process's umask.
func closeFile(fd int, meta meta, err error) error {
	if err == nil {
		err = unix.Fchown(fd, meta.uid, meta.gid)
	}
	if err == nil {
		err = unix.Fchmod(fd, meta.mode)
	}
	for _, x := range meta.xattrs {
		if err == nil {
			err = ignoreUserXattr(x.key, unix.Fsetxattr(fd, x.key, x.value, 0))
		}
	}
	if err == nil {
		err = unix.UtimesNanoAt(fd, "", meta.times[:], unix.AT_EMPTY_PATH)
	}
	if closeErr := unix.Close(fd); err == nil {
		err = closeErr
	}
	return err
}
