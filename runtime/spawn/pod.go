package spawn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
)

// Pod is the daemon's end of a pod init. Safe for concurrent use. Every call on a
// pod whose init died returns ErrGone.
type Pod struct {
	handle Handle
	proc   *process
	null   *os.File // this and the next: the Spawner's
	thread *thread
	onExit func(Exit)

	owned   sync.WaitGroup // goroutines of ours: reader, deliverer
	closing chan struct{}  // closed by Close

	ready    chan struct{} // closed when the init has set itself up, or failed to
	settled  sync.Once
	readyErr error // valid when ready is closed

	// mu guards what follows. It is held for no system call.
	mu      sync.Mutex
	conn    *initproto.Conn // nil when broken
	closed  bool            // as closing is
	nextReq uint32
	waiting map[uint32]chan initproto.Message // replies by request; cap 1
	execs   map[string]chan initproto.Exited  // exits of exec'd processes; cap 1

	exits     []Exit // to be delivered, in order
	delivered *sync.Cond
}

func (s *Spawner) newPod(h Handle, proc *process, conn *initproto.Conn, onExit func(Exit)) *Pod {
	p := &Pod{
		handle: h, proc: proc, null: s.null, thread: s.thread, onExit: onExit, conn: conn,
		ready: make(chan struct{}), closing: make(chan struct{}),
		waiting: map[uint32]chan initproto.Message{}, execs: map[string]chan initproto.Exited{},
	}
	p.delivered = sync.NewCond(&p.mu)
	p.owned.Add(2) // the reader of conn, the deliverer of exits
	go p.read(conn)
	go p.deliver()
	return p
}

// Ready waits until the init has set up the pod's namespaces (hostname, sysctls, /dev/shm, the reaper). An error is the step that
// failed, or ErrGone with what the init last said; then the pod is of no use and wants Shutdown.
func (p *Pod) Ready(ctx context.Context) error {
	select {
	case <-p.ready:
		return p.readyErr
	case <-ctx.Done():
		return fmt.Errorf("pod init %d does not get ready: %w", p.handle.PID, context.Cause(ctx))
	}
}

// settle ends the waiting for the init, once.
func (p *Pod) settle(err error) {
	p.settled.Do(func() {
		p.readyErr = err
		close(p.ready)
	})
}

// Handle finds the pod init again after a restart.
func (p *Pod) Handle() Handle { return p.handle }

// Done is closed when the pod init has died.
func (p *Pod) Done() <-chan struct{} { return p.proc.done }

// PID of the pod init, in the host's PID namespace.
func (p *Pod) PID() int { return p.handle.PID }

// NetNS opens the pod's network namespace. The caller closes it.
func (p *Pod) NetNS() (*os.File, error) { return p.namespace("net") }

// UserNS opens the pod's user namespace; nil, nil if it is the host's. The caller closes it.
func (p *Pod) UserNS() (*os.File, error) {
	if !p.handle.Userns {
		return nil, nil
	}
	return p.namespace("user")
}

func (p *Pod) namespace(name string) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", p.handle.PID, name))
	if !p.proc.alive() { // the pid may have been somebody else's
		if err == nil {
			f.Close()
		}
		return nil, ErrGone
	}
	return f, err
}

// Close ends the daemon's side; the pod lives on.
func (p *Pod) Close() error {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.closing)
	}
	conn := p.conn
	p.conn = nil
	p.delivered.Broadcast()
	p.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
	p.proc.close()
	p.owned.Wait()
	return nil
}

// read receives until the connection ends. If the init is alive then (it drops a daemon that does not read)
// it connects again and replays the journal.
func (p *Pod) read(conn *initproto.Conn) {
	defer p.owned.Done()
	for conn != nil {
		m, err := conn.Recv()
		if err != nil {
			conn = p.reconnect(conn)
			continue
		}
		if m.Req == 0 && m.Type == initproto.TypeReady {
			m.Close() // comes with none
			p.settle(nil)
			continue
		}
		if m.Req == 0 && m.Type == initproto.TypeFailed {
			m.Close() // comes with none
			p.settle(fmt.Errorf("set up pod init: %w", asError(m.Body)))
			continue
		}
		if m.Type == initproto.TypeExited {
			m.Close() // comes with none
			if x, err := initproto.DecodeExited(m.Body); err == nil {
				p.exited(x)
			}
			continue
		}
		p.mu.Lock()
		ch := p.waiting[m.Req]
		delete(p.waiting, m.Req)
		if ch != nil {
			ch <- m // cap 1, one reply: never waits. Under the lock, so that a caller who gives up finds it or has been forgotten
		} else {
			m.Close() // its caller is gone
		}
		p.mu.Unlock()
	}
}

// reconnectPause is between attempts that failed of something at our own end, such as a want of descriptors: no event tells its end.
const reconnectPause = time.Second

// reconnect tries until the init is dead or we are closed: then it returns nil. An init that is stopped or slow is waited for,
// else the exits of its containers would never be heard of.
func (p *Pod) reconnect(old *initproto.Conn) *initproto.Conn {
	old.Close()
	p.settle(errors.Join(ErrGone, lastWords(p.handle.RunDir)))
	p.mu.Lock()
	p.conn = nil
	for req, ch := range p.waiting { // their replies are lost
		close(ch)
		delete(p.waiting, req)
	}
	for id, ch := range p.execs {
		close(ch)
		delete(p.execs, id)
	}
	p.mu.Unlock()
	for {
		conn, err := p.greetAgain()
		if err == nil {
			return conn
		}
		pause := time.NewTimer(reconnectPause)
		select {
		case <-pause.C:
		case <-p.proc.done:
			pause.Stop()
			return nil
		case <-p.closing:
			pause.Stop()
			return nil
		}
	}
}

// greetAgain makes one attempt to connect. The journal is read once the init sends its events to the new connection, and before
// anybody can use that.
func (p *Pod) greetAgain() (*initproto.Conn, error) {
	ctx, cancel := context.WithCancel(context.Background())
	var waiter sync.WaitGroup
	waiter.Go(func() {
		defer cancel()
		select {
		case <-p.proc.done:
		case <-p.closing:
		case <-ctx.Done():
		}
	})
	conn, err := greet(ctx, p.handle.RunDir)
	cancel()
	waiter.Wait()
	if err != nil {
		return nil, err
	}
	if err := p.replay(); err != nil {
		conn.Close()
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		conn.Close()
		return nil, os.ErrClosed
	}
	p.conn = conn
	return conn, nil
}

// replay queues every exit of the journal.
func (p *Pod) replay() error {
	l, err := ReadJournal(p.handle.RunDir)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.exits = append(p.exits, l...)
	p.delivered.Broadcast()
	return nil
}

func (p *Pod) exited(x *initproto.Exited) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if x.ExecID != "" {
		if ch := p.execs[x.ExecID]; ch != nil {
			delete(p.execs, x.ExecID)
			ch <- *x
		}
		return
	}
	p.exits = append(p.exits, asExit(x))
	p.delivered.Broadcast()
}

// deliver calls onExit, outside the lock and outside the reader, so that it may call us.
func (p *Pod) deliver() {
	defer p.owned.Done()
	for {
		p.mu.Lock()
		for len(p.exits) == 0 && !p.closed {
			p.delivered.Wait()
		}
		l := p.exits
		p.exits = nil
		closed := p.closed
		p.mu.Unlock()
		if closed {
			return
		}
		for _, x := range l {
			p.onExit(x)
		}
	}
}

func asExit(x *initproto.Exited) Exit {
	e := Exit{ContainerID: x.ContainerID, At: time.Unix(0, x.At)}
	e.Code, e.Signal = asCode(unix.WaitStatus(x.Status))
	return e
}

// asCode is the shell's convention: 128+n for a process killed by signal n.
func asCode(s unix.WaitStatus) (code, signal int) {
	if s.Signaled() {
		return 128 + int(s.Signal()), int(s.Signal())
	}
	return s.ExitStatus(), 0
}

// asError turns a Failure into ours.
func asError(body []byte) error {
	f, err := initproto.DecodeFailure(body)
	if err != nil {
		return err
	}
	var cause error
	switch {
	case f.Text != "" && f.Errno != 0:
		cause = &explained{text: f.Text, err: unix.Errno(f.Errno)}
	case f.Errno != 0:
		cause = unix.Errno(f.Errno)
	default:
		cause = errors.New(f.Text)
	}
	switch f.Kind {
	case initproto.FailNotFound:
		return fmt.Errorf("%s: %w", f.Step, ErrNotFound)
	case initproto.FailState:
		return fmt.Errorf("%s: %w (%w)", f.Step, ErrState, cause)
	}
	return &StartError{Step: f.Step, Err: cause}
}

// explained is an errno with a text that says more.
type explained struct {
	text string
	err  unix.Errno
}

func (e *explained) Error() string { return e.text }
func (e *explained) Unwrap() error { return e.err }

// call sends a request and waits for its reply. A ctx that ends stops the waiting, not
// what was asked for; the sending is bounded by sendTimeout.
func (p *Pod) call(ctx context.Context, m initproto.Message) (initproto.Message, error) {
	if err := p.Ready(ctx); err != nil {
		return initproto.Message{}, err
	}
	ch := make(chan initproto.Message, 1)
	p.mu.Lock()
	conn := p.conn
	if conn == nil {
		p.mu.Unlock()
		return initproto.Message{}, ErrGone
	}
	p.nextReq++
	m.Req = p.nextReq
	p.waiting[m.Req] = ch
	p.mu.Unlock()
	if err := conn.Send(m); err != nil {
		p.mu.Lock()
		delete(p.waiting, m.Req)
		p.mu.Unlock()
		if errors.Is(err, unix.EPIPE) || errors.Is(err, os.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
			return initproto.Message{}, ErrGone
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			conn.Close() // it may have got a part; the reader connects anew
			return initproto.Message{}, fmt.Errorf("pod init %d does not read its requests: %w", p.handle.PID, err)
		}
		return initproto.Message{}, err
	}
	select {
	case r, ok := <-ch:
		if !ok {
			return initproto.Message{}, ErrGone
		}
		if r.Type == initproto.TypeFailed {
			return r, asError(r.Body)
		}
		return r, nil
	case <-ctx.Done():
		p.mu.Lock()
		delete(p.waiting, m.Req)
		p.mu.Unlock()
		select {
		case r := <-ch: // it came in between
			r.Close()
		default:
		}
		return initproto.Message{}, context.Cause(ctx)
	}
}

func (p *Pod) target(ctx context.Context, t initproto.Type, id string, number int64, fds ...int) (initproto.Message, error) {
	return p.call(ctx, initproto.Message{Type: t, Body: (&initproto.Target{ID: id, Number: number}).Encode(), FDs: fds})
}

// Create hands a container to the pod init; nothing runs yet.
//
// It opens the sources of the mounts: a source on a dead network mount hangs that call only, until
// ctx ends, and leaks one thread for as long as the mount is dead.
func (p *Pod) Create(ctx context.Context, a ContainerArgs) error {
	defer runtime.KeepAlive(&a) // we go on with the numbers of its files
	c, err := compile(&a, p.handle.Userns)
	if err != nil {
		return err
	}
	userns, err := p.UserNS()
	if err != nil {
		return fmt.Errorf("open user namespace: %w", err)
	}
	body, fds, err := p.openSources(ctx, c, userns)
	if userns != nil {
		userns.Close()
	}
	if err != nil {
		return err
	}
	defer closeFDs(fds)
	all := append([]int(nil), fds...)
	all = append(all, c.donated...)
	_, err = p.call(ctx, initproto.Message{Type: initproto.TypeCreate, Body: body, FDs: all})
	return err
}

// Start runs a created or prepared container. A *StartError says that its process could not be started; the container
// is exited then.
func (p *Pod) Start(ctx context.Context, id string) (pid int, startedAt time.Time, err error) {
	r, err := p.target(ctx, initproto.TypeStart, id, 0)
	if err != nil {
		return 0, time.Time{}, err
	}
	s, err := initproto.DecodeStarted(r.Body)
	if err != nil {
		return 0, time.Time{}, err
	}
	warn(ctx, id, s.Warnings)
	return s.PID, time.Unix(0, s.At), nil
}

// Signal sends a signal to a running container's first process.
func (p *Pod) Signal(ctx context.Context, id string, sig unix.Signal) error {
	_, err := p.target(ctx, initproto.TypeSignal, id, int64(sig))
	return err
}

// Remove makes the pod init forget a created or exited container. Idempotent.
func (p *Pod) Remove(ctx context.Context, id string) error {
	_, err := p.target(ctx, initproto.TypeRemove, id, 0)
	return err
}

// ReopenLog gives a container's log a new file. When it returns no byte goes to the old one. The file stays the caller's.
func (p *Pod) ReopenLog(ctx context.Context, id string, log *os.File) error {
	_, err := p.target(ctx, initproto.TypeReopen, id, 0, int(log.Fd()))
	runtime.KeepAlive(log)
	return err
}

// Attach gives a running container's output, from now on, to the pipes stdout and stderr (nil: not wanted; a terminal's
// output is all stdout), which should be big: an end that is full when output comes is closed, the container never waits. They stay
// the caller's. Both are closed at the container's end.
//
// With stdin set it returns our end of the container's stdin or its terminal, which the caller closes; nil if it has neither.
func (p *Pod) Attach(ctx context.Context, id string, stdin bool, stdout, stderr *os.File) (*os.File, error) {
	var bits int64
	var fds []int
	if stdin {
		bits |= initproto.AttachStdin
	}
	if stdout != nil {
		bits |= initproto.AttachStdout
		fds = append(fds, int(stdout.Fd()))
	}
	if stderr != nil {
		bits |= initproto.AttachStderr
		fds = append(fds, int(stderr.Fd()))
	}
	r, err := p.target(ctx, initproto.TypeAttach, id, bits, fds...)
	runtime.KeepAlive(stdout)
	runtime.KeepAlive(stderr)
	if err != nil || len(r.FDs) == 0 {
		return nil, err
	}
	return openStream(r.TakeFD(0), "stdin")
}

// CloseStdin ends a container's stdin (stdin_once). Idempotent.
func (p *Pod) CloseStdin(ctx context.Context, id string) error {
	_, err := p.target(ctx, initproto.TypeCloseStdin, id, 0)
	return err
}

// openStream makes a file of a received pipe or terminal whose reads and writes wait in the poller.
func openStream(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl "+name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// ContainerInfo is what the pod init says of a container it holds.
type ContainerInfo struct {
	ID        string
	State     InitState
	PID       int
	StartedAt time.Time
	Exit      Exit // when exited after it had started
	// LogBytes were written to the log, LogDropped lost to a full or broken disk.
	LogBytes, LogDropped uint64
}

// InitState is the pod init's view of a container.
type InitState uint8

const (
	InitCreated InitState = InitState(initproto.StateCreated)
	// InitStarting: between Start and execve.
	InitStarting InitState = InitState(initproto.StateStarting)
	InitRunning  InitState = InitState(initproto.StateRunning)
	InitExited   InitState = InitState(initproto.StateExited)
	// InitPrepared: between Prepare and Start.
	InitPrepared InitState = InitState(initproto.StatePrepared)
)

// List returns all containers the pod init holds.
func (p *Pod) List(ctx context.Context) ([]ContainerInfo, error) {
	r, err := p.call(ctx, initproto.Message{Type: initproto.TypeList})
	if err != nil {
		return nil, err
	}
	infos, err := initproto.DecodeListing(r.Body)
	if err != nil {
		return nil, err
	}
	l := make([]ContainerInfo, 0, len(infos))
	for _, i := range infos {
		c := ContainerInfo{ID: i.ID, State: InitState(i.State), PID: i.PID, LogBytes: i.LogBytes, LogDropped: i.LogDropped}
		if i.StartedAt != 0 {
			c.StartedAt = time.Unix(0, i.StartedAt)
		}
		if i.ExitedAt != 0 {
			c.Exit = asExit(&initproto.Exited{ContainerID: i.ID, Status: i.Status, At: i.ExitedAt})
		}
		l = append(l, c)
	}
	return l, nil
}

// politeTime is how long a pod init may take to end by itself.
const politeTime = 2 * time.Second

// Shutdown ends the pod init and waits for its death. Containers must be dead before: in a PID namespace of
// their own they would outlive it.
func (p *Pod) Shutdown(ctx context.Context) error {
	// Asked first, so that it can end and reap its reaper; an init that does not answer is killed.
	polite, cancel := context.WithTimeout(ctx, politeTime)
	defer cancel()
	if _, err := p.call(polite, initproto.Message{Type: initproto.TypeShutdown}); err == nil {
		select { // it exits right after its reply
		case <-p.proc.done:
			return nil
		case <-polite.Done():
		}
	}
	if err := p.proc.kill(); err != nil {
		return err
	}
	select {
	case <-p.proc.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("pod init %d does not die: %w", p.handle.PID, context.Cause(ctx))
	}
}

// Exec is a process that was started in a container.
type Exec struct {
	pid      int
	exit     chan initproto.Exited
	done     <-chan struct{}
	terminal *os.File // until taken
}

// Exec starts one more process in a running container. A *StartError says that it could not be started.
func (p *Pod) Exec(ctx context.Context, a ExecArgs) (*Exec, error) {
	defer runtime.KeepAlive(&a) // we go on with the numbers of its files
	x, fds, closeNull, err := compileExec(&a, p.null)
	if err != nil {
		return nil, err
	}
	defer closeNull()
	exit := make(chan initproto.Exited, 1)
	p.mu.Lock()
	p.execs[a.ExecID] = exit // before it can end
	p.mu.Unlock()
	r, err := p.call(ctx, initproto.Message{Type: initproto.TypeExec, Body: x.Encode(), FDs: fds})
	var s *initproto.Started
	if err == nil {
		s, err = initproto.DecodeStarted(r.Body)
	}
	if err != nil {
		p.mu.Lock()
		delete(p.execs, a.ExecID)
		p.mu.Unlock()
		r.Close()
		return nil, err
	}
	e := &Exec{pid: s.PID, exit: exit, done: p.proc.done}
	if len(r.FDs) == 1 {
		if e.terminal, err = openStream(r.TakeFD(0), "terminal"); err != nil {
			p.mu.Lock()
			delete(p.execs, a.ExecID)
			p.mu.Unlock()
			return nil, err
		}
	}
	return e, nil
}

// TakeTerminal hands the master of the process's terminal to the caller; nil without one, or when it was taken.
func (e *Exec) TakeTerminal() *os.File {
	t := e.terminal
	e.terminal = nil
	return t
}

// PID of the process, in the host's PID namespace. It may be gone.
func (e *Exec) PID() int { return e.pid }

// Wait waits for the end of the process; code is 0–255, 128+n when killed by signal n. It can be called once.
func (e *Exec) Wait(ctx context.Context) (code int, err error) {
	select {
	case x, ok := <-e.exit:
		if !ok {
			return 0, ErrGone
		}
		code, _ = asCode(unix.WaitStatus(x.Status))
		return code, nil
	case <-e.done:
		return 0, ErrGone
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}
