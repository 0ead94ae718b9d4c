package main

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// selfFD is our own binary, a sealed memfd, which every child gets to start from.
const selfFD = controlFD + 1

// sendTimeout is how long a daemon may leave its socket full before we drop it.
const sendTimeout = 10 * time.Second

// acceptPause is how long a connection waits for descriptors or memory before we look again.
const acceptPause = 100 * time.Millisecond

// pod is the pod init's whole state.
type pod struct {
	journal  journal
	listener int

	children children
	// reaper is PID 1 of the shared PID namespace, nil without; reaperReady is closed when it may have company, and
	// then reaperProcfs is valid.
	reaper       *child
	reaperReady  chan struct{}
	reaperProcfs *procfs

	makePlaces func() error // once
	places     atomic.Int64 // names given in podPIDs

	// mu guards the containers' table and states, and which daemon we talk to. It is held for no
	// system call that can wait.
	mu         sync.Mutex
	containers map[string]*container
	daemon     *initproto.Conn
	settled    *sync.Cond // of mu: a start came to its end, or a container did
}

// runPod is the pod's first process. Its life holds the namespaces: it ends when the
// daemon says Shutdown, or by a signal that nobody but the host's root can send. It ignores SIGTERM and its kin: a host that shuts
// down stops pods through the daemon.
func runPod() {
	conn, err := initproto.NewConn(controlFD)
	if err != nil {
		fatal("control socket", err)
	}
	m, err := conn.Recv()
	if err != nil {
		fatal("receive set-up", err)
	}
	setup, err := initproto.DecodeSetup(m.Body)
	if err != nil || len(m.FDs) != 2 {
		fatal("read set-up", initproto.ErrMalformed)
	}
	p := &pod{listener: m.FDs[0], journal: journal{fd: m.FDs[1]}, containers: map[string]*container{}, makePlaces: sync.OnceValue(makePlaces)}
	p.settled = sync.NewCond(&p.mu)
	p.children.init()
	if s := p.setUp(setup); s != nil {
		_ = conn.Send(s.message()) // if the daemon is gone nobody waits
		os.Exit(1)
	}
	go p.children.reap()
	if setup.SharedPID {
		if s := p.startReaper(); s != nil {
			_ = conn.Send(s.message()) // as above
			os.Exit(1)
		}
	}
	// The main goroutine keeps the main thread, so that none of those that children.bornIn moves is it: the process's
	// memory is charged to its main thread's cgroup.
	p.talkTo(conn)
	go p.serve(conn)
	p.accept()
}

// setUp brings the pod's namespaces into shape.
//
// Needs: root in the pod's user namespace. Runs on: any thread of the pod init.
func (p *pod) setUp(s *initproto.Setup) *step {
	// Orphans of exec'd processes and of containers in the host's PID namespace come to us, not to the host's PID 1.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return failed("become subreaper", err)
	}
	if !s.HostNet {
		if err := sys.LinkUp("lo"); err != nil { // it is, but in a user namespace: spawn.Spawner.Prepare
			return failed("set lo up", err)
		}
	}
	if s.Hostname != "" {
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return failed("set hostname "+s.Hostname, err)
		}
	}
	for _, kv := range s.Sysctls {
		if err := setSysctl(kv[0], kv[1]); err != nil {
			return failed("set sysctl "+kv[0]+"="+kv[1], err)
		}
	}
	if s.ShmSize > 0 {
		options := [][2]string{{"size", strconv.FormatUint(s.ShmSize, 10)}, {"mode", "1777"}}
		if s.Label != "" {
			options = append(options, [2]string{"context", s.Label})
		}
		shm, err := sys.CreateMount("tmpfs", options,
			unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
		if err == nil {
			err = attachAt(shm, podShm)
			_ = unix.Close(shm) // attached, or dissolved by this
		}
		if err != nil {
			return failed("mount pod /dev/shm", err)
		}
	}
	return nil
}

// setSysctl writes a sysctl of our namespaces. The daemon has checked that the key is a
// namespaced one; dots and slashes are interchangeable, sysctl(8): a key's first separator decides.
func setSysctl(key, value string) error {
	if key == "kernel.domainname" {
		// Its file belongs to the host's root; the system call asks who owns the namespace.
		err := unix.Setdomainname([]byte(value))
		if err != nil {
			return &sys.Error{Op: "setdomainname", Err: err}
		}
		return nil
	}
	path := key
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		path = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, key)
	}
	dir, err := unix.Open("/proc/sys", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &sys.Error{Op: "open", Path: "/proc/sys", Err: err}
	}
	defer unix.Close(dir)
	fd, err := sys.OpenInRoot(dir, path, unix.O_WRONLY, sys.RefuseLinks)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	n, err := unix.Write(fd, []byte(value))
	if err == nil && n < len(value) {
		err = unix.EINVAL
	}
	if err != nil {
		return &sys.Error{Op: "write", Err: err}
	}
	return nil
}

// accept takes connections from daemons that start later; only the host's root reaches the
// socket (its directory is 0700). The newest is the one we talk to.
func (p *pod) accept() {
	for {
		fd, _, err := unix.Accept4(p.listener, unix.SOCK_CLOEXEC)
		switch err {
		case nil:
		case unix.EINTR, unix.ECONNABORTED:
			continue
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			// A limit, ours, the pod's or the host's: the connection waits in the backlog, and there is no event for
			// its end. It is not worth the pod's life.
			time.Sleep(acceptPause) // there is no event for the end of a shortage of descriptors or memory
			continue
		default:
			fatal("accept", err) // the listener is our life line: without it no daemon could ever find us
		}
		conn, err := initproto.NewConn(fd)
		if err != nil {
			continue
		}
		p.talkTo(conn) // here, so that the newest connection stays
		go p.serve(conn)
	}
}

// talkTo makes conn the daemon we talk to.
func (p *pod) talkTo(conn *initproto.Conn) {
	conn.SendTimeout = sendTimeout
	p.mu.Lock()
	former := p.daemon
	p.daemon = conn
	p.mu.Unlock()
	if former != nil {
		_ = former.Close() // it is replaced; what it has not read is in the journal
	}
}

// serve talks to one daemon until it goes away or another takes its place.
func (p *pod) serve(conn *initproto.Conn) {
	ready := initproto.Started{PID: os.Getpid(), At: initproto.Version}
	if conn.Send(initproto.Message{Type: initproto.TypeReady, Body: ready.Encode()}) == nil {
		for {
			m, err := conn.Recv()
			if err != nil {
				break
			}
			// Each request has a goroutine of its own, which ends with its reply: a start that hangs on a dead
			// volume must not keep others from being stopped.
			go p.handle(conn, m)
		}
	}
	_ = conn.Close() // nothing left to say
	p.mu.Lock()
	if p.daemon == conn {
		p.daemon = nil
	}
	p.mu.Unlock()
}

// handle answers one request.
func (p *pod) handle(conn *initproto.Conn, m initproto.Message) {
	defer m.Close() // what was not taken
	reply := p.answer(&m)
	reply.Req = m.Req
	err := conn.Send(reply)
	reply.Close()
	if m.Type == initproto.TypeShutdown && reply.Type == initproto.TypeDone {
		os.Exit(0)
	}
	_ = err // the daemon is gone; the next one asks again
}

func (p *pod) answer(m *initproto.Message) initproto.Message {
	switch m.Type {
	case initproto.TypeCreate:
		return p.create(m)
	case initproto.TypeExec:
		return p.exec(m)
	case initproto.TypeList:
		return initproto.Message{Type: initproto.TypeListing, Body: initproto.EncodeListing(p.list())}
	case initproto.TypeShutdown:
		p.stopReaper()
		return done()
	}
	t, err := initproto.DecodeTarget(m.Body)
	if err != nil {
		return failure(initproto.FailStart, "read request", err)
	}
	switch m.Type {
	case initproto.TypePrepare:
		return p.prepare(t.ID, m)
	case initproto.TypeStart:
		if t.Number == 1 {
			return p.giveUpPrepared(t.ID)
		}
		return p.start(t.ID)
	case initproto.TypeSignal:
		return p.signal(t.ID, unix.Signal(t.Number))
	case initproto.TypeRemove:
		return p.remove(t.ID)
	case initproto.TypeReopen:
		return p.reopen(t.ID, m)
	case initproto.TypeAttach:
		return p.attach(t.ID, t.Number, m)
	case initproto.TypeCloseStdin:
		return p.closeStdin(t.ID)
	}
	return failure(initproto.FailStart, "read request of type "+strconv.Itoa(int(m.Type)), initproto.ErrMalformed)
}

func done() initproto.Message { return initproto.Message{Type: initproto.TypeDone} }

func failure(kind initproto.FailKind, what string, err error) initproto.Message {
	f := initproto.Failure{Kind: kind, Step: what}
	if errno, ok := err.(unix.Errno); ok {
		f.Errno = uint32(errno)
	} else if err != nil {
		f.Text = err.Error()
	}
	return initproto.Message{Type: initproto.TypeFailed, Body: f.Encode()}
}

// exited tells the daemon, if there is one. A daemon that does not read is dropped rather than waited for: it
// finds everything in the journal and the listing when it comes back.
func (p *pod) exited(x *initproto.Exited) {
	p.mu.Lock()
	conn := p.daemon
	p.mu.Unlock()
	if conn == nil {
		return
	}
	if err := conn.Send(initproto.Message{Type: initproto.TypeExited, Body: x.Encode()}); err != nil {
		_ = conn.Close() // serve sees it and forgets the connection
	}
}
