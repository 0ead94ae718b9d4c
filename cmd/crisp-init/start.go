package main

import (
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/logs"
	"github.com/crisp-cri/crisp/runtime/sys"
)

func itoa(n int) string { return strconv.Itoa(n) }

// container is the pod init's part of a container. The daemon decides what happens to it; here
// is what must outlive the daemon. Guarded by pod.mu.
type container struct {
	id    string
	state initproto.ContainerState
	// msg is the Create message until the start: its descriptors are the root file system and the
	// volumes, which exist nowhere else.
	msg  initproto.Message
	plan *initproto.Container
	// prepared is its init, which waits at its hooks; nil but in that state.
	prepared *starting

	pid    initproto.PIDMode
	procfs *procfs // of the PID namespace it is in, nil if that is unknown or ours; its own if pid is PIDNew

	sink      *logs.Sink
	child     *child
	init      *child // child, or the one whose successor that is
	startedAt time.Time
	stdin     *os.File // our end, nil without
	terminal  *os.File // pty master, nil without; also in outputs

	outputs []*os.File // what is copied into the log
	taps    []*tap     // attached clients
	copying sync.WaitGroup
}

// create takes over everything a container needs. Nothing runs yet.
func (p *pod) create(m *initproto.Message) initproto.Message {
	plan, err := initproto.DecodeContainer(m.Body, len(m.FDs))
	if err != nil {
		return failure(initproto.FailStart, "read container", err)
	}
	var log *os.File
	if plan.LogFD >= 0 {
		log = os.NewFile(uintptr(m.TakeFD(plan.LogFD)), "log")
	}
	c := &container{id: plan.ID, state: initproto.StateCreated, plan: plan, pid: plan.PID, sink: logs.NewSink(log)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.containers[c.id] != nil {
		_ = c.sink.Close() // unused
		return failure(initproto.FailState, "create container", unix.EEXIST)
	}
	c.msg, m.FDs = *m, nil
	p.containers[c.id] = c
	return done()
}

// prepare brings a created container to its hooks. m has the descriptors that they need.
func (p *pod) prepare(id string, m *initproto.Message) initproto.Message {
	const what = "prepare container"
	if len(m.FDs) != hookFDs {
		return failure(initproto.FailStart, what, initproto.ErrMalformed)
	}
	c, reply := p.claim(id, what, initproto.StateCreated)
	if c == nil {
		return reply
	}
	if !c.plan.Hooks.View {
		return p.settle(c, failure(initproto.FailStart, what, initproto.ErrMalformed))
	}
	l, reply := p.clone(c, m.FDs)
	if l != nil {
		_, reply = p.follow(l, untilHooks)
	}
	if reply.Type == initproto.TypeFailed {
		return p.settle(c, reply)
	}
	p.mu.Lock()
	c.prepared, c.state = l, initproto.StatePrepared
	p.settled.Broadcast()
	p.mu.Unlock()
	return reply
}

// claim takes a container that is in one of the states, to start it; nil and the answer if it is not.
func (p *pod) claim(id, what string, in ...initproto.ContainerState) (*container, initproto.Message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.containers[id]
	if c == nil {
		return nil, failure(initproto.FailNotFound, what, unix.ESRCH)
	}
	if !slices.Contains(in, c.state) {
		return nil, failure(initproto.FailState, what, unix.EALREADY)
	}
	c.state = initproto.StateStarting
	return c, initproto.Message{}
}

// giveUpPrepared ends a prepared container that is not to start. Idempotent.
func (p *pod) giveUpPrepared(id string) initproto.Message {
	c, reply := p.claim(id, "give container up", initproto.StatePrepared)
	if c == nil {
		p.mu.Lock()
		ended := p.containers[id] != nil && p.containers[id].state == initproto.StateExited
		p.mu.Unlock()
		if ended {
			return done()
		}
		return reply
	}
	_ = p.children.signal(c.prepared.child, unix.SIGKILL) // ESRCH: dead already
	_, reply = p.follow(c.prepared, untilExec)            // which fails: it waits for a Done that never came
	p.settle(c, reply)
	return done()
}

// start brings a created or prepared container to its execve.
func (p *pod) start(id string) initproto.Message {
	c, reply := p.claim(id, "start container", initproto.StateCreated, initproto.StatePrepared)
	if c == nil {
		return reply
	}
	l := c.prepared
	switch {
	case l != nil:
		_ = l.conn.Send(done()) // EPIPE: it is dead, and follow says of what
	case c.plan.Hooks.View:
		reply = failure(initproto.FailStart, "start container", initproto.ErrMalformed) // was to be prepared first
	default:
		l, reply = p.clone(c, nil)
	}
	if l != nil {
		reply = p.launch(c, l)
	}
	return p.settle(c, reply)
}

// settle ends a start, with its outcome: what it needed goes.
func (p *pod) settle(c *container, reply initproto.Message) initproto.Message {
	failed := reply.Type == initproto.TypeFailed
	p.mu.Lock()
	msg := c.msg
	c.msg, c.plan, c.prepared = initproto.Message{}, nil, nil
	if failed { // else launch has said that it runs, and watch may have said since that it does not any more
		c.state = initproto.StateExited
	}
	p.settled.Broadcast()
	p.mu.Unlock()
	msg.Close() // the last of a mount may go here, and its disk may hang: not under the lock
	if failed {
		c.closeIO()
	}
	return reply
}

func oomArgument(p *initproto.Process) string {
	if !p.SetOOMScoreAdj {
		return ""
	}
	return strconv.FormatInt(p.OOMScoreAdj, 10)
}

// stdio are the two ends of a child's standard streams.
type stdio struct {
	child [3]int // given to it, closed by us after the fork
	ours  [3]int // what we read and write; -1: none
}

// pipes makes stdio for a child without a terminal.
func pipes(stdin bool) (s stdio, err error) {
	s = stdio{child: [3]int{-1, -1, -1}, ours: [3]int{-1, -1, -1}}
	for i := range 3 {
		if i == 0 && !stdin {
			// Descriptor 0 of ours is the null device, on a read-only mount (spawn.openNull). It is opened anew: flags
			// and locks belong to the open file, and containers share none.
			if s.child[0], err = unix.Open("/proc/self/fd/0", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				break
			}
			continue
		}
		var fds [2]int
		if err = unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			break
		}
		read, write := fds[0], fds[1]
		s.child[i], s.ours[i] = write, read
		if i == 0 {
			s.child[i], s.ours[i] = read, write
		}
		if err = unix.SetNonblock(s.ours[i], true); err != nil {
			break
		}
	}
	if err != nil {
		s.closeChild()
		closeAll(s.ours[:])
		return stdio{}, &sys.Error{Op: "make pipes", Err: err}
	}
	return s, nil
}

func (s *stdio) closeChild() { closeAll(s.child[:]) }

func closeAll(fds []int) {
	for i, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd) // pipes and the null device: nothing buffered
			fds[i] = -1
		}
	}
}

// clone clones the container's init and hands it the plan, and after the plan's descriptors those of hooks. On error there
// is the answer instead.
func (p *pod) clone(c *container, hooks []int) (*starting, initproto.Message) {
	s, err := pipes(c.plan.Stdin && !c.plan.Process.Terminal)
	if err != nil {
		return nil, failure(initproto.FailStart, "make stdio", err)
	}
	b := birth{role: "container", title: "crisp-init: container " + short(c.id), clone: unix.CLONE_NEWNS, cgroupFD: -1}
	b.oomScore = oomArgument(&c.plan.Process)
	if c.plan.CgroupFD >= 0 {
		b.cgroupFD = c.msg.FDs[c.plan.CgroupFD]
	}
	if c.plan.Tasks > 0 {
		b.tasks = c.msg.FDs[c.plan.TasksFD:][:c.plan.Tasks]
	}
	run := initproto.Message{Type: initproto.TypeRun, Body: c.msg.Body, FDs: slices.Clone(c.msg.FDs)}
	if c.plan.LogFD >= 0 { // taken by the sink; its place must stay filled
		run.FDs[c.plan.LogFD] = 0
	}
	run.FDs = append(run.FDs, hooks...)
	switch {
	case c.plan.PID == initproto.PIDNew:
		b.clone |= unix.CLONE_NEWPID
	case c.plan.PID.Joins():
		j, err := p.join(c.plan)
		if err == nil {
			defer j.close()
			p.mu.Lock()
			c.procfs, c.pid = j.of, j.pid
			p.mu.Unlock()
			b.heir, err = newHeir()
		}
		if err != nil {
			s.closeChild()
			closeAll(s.ours[:])
			return nil, failStep("enter PID namespace", err)
		}
		added := [joinFDs]int{joinPIDNS: j.ns, joinStatus: b.heir.write, joinPage: b.heir.page, joinProcfs: j.procfs}
		run.FDs = append(run.FDs, added[:]...)
	}
	return p.begin(b, s, run)
}

// launch waits until the container's init has become the container's program or failed.
func (p *pod) launch(c *container, s *starting) initproto.Message {
	l, reply := p.follow(s, untilExec)
	if reply.Type == initproto.TypeFailed {
		return reply
	}
	p.mu.Lock()
	c.adopt(l, &s.stdio)
	c.child, c.init, c.startedAt, c.state = l.child, l.init, l.at, initproto.StateRunning
	if l.procfs != nil {
		c.procfs = l.procfs
	}
	p.mu.Unlock()
	go p.watch(c) // the only one that says it has exited
	return reply
}

// launched is a child that has become the program it was meant to be.
type launched struct {
	child    *child
	init     *child // child, or the one whose successor that is
	at       time.Time
	console  int // pty master, -1 without
	procfs   *procfs
	warnings []string
}

// starting is a child between its clone and its execve, or its successor's.
type starting struct {
	child   *child
	conn    *initproto.Conn // to it
	stdio   stdio           // our ends
	heir    *heir           // nil: it will have no successor
	console int             // pty master, -1 without
	procfs  *procfs
	sendErr error // of what it was sent
}

// begin forks a child and hands it m. It takes over s and b.heir. On error there is the answer instead.
func (p *pod) begin(b birth, s stdio, m initproto.Message) (*starting, initproto.Message) {
	l := &starting{stdio: s, heir: b.heir, console: -1}
	ours, theirs, err := initproto.Pair()
	if err != nil {
		s.closeChild()
		l.close()
		return nil, failure(initproto.FailStart, "make socket", err)
	}
	b.files = [4]int{s.child[0], s.child[1], s.child[2], theirs}
	ch, err := p.children.fork(b)
	_ = unix.Close(theirs) // the child has it
	s.closeChild()
	conn, cerr := initproto.NewConn(ours)
	if err == nil {
		err = cerr
	}
	if err != nil {
		if cerr == nil {
			_ = conn.Close() // nothing was said
		}
		if ch != nil && b.heir != nil {
			p.children.settle()
		}
		l.close()
		return nil, failStep("clone process", err)
	}
	// A child that dies early does not read: EPIPE here, and the reason is follow's.
	l.child, l.conn, l.sendErr = ch, conn, conn.Send(m)
	if b.heir != nil {
		b.heir.given()
	}
	return l, initproto.Message{}
}

// close closes what we have of a child that is not to run.
func (s *starting) close() {
	closeAll(s.stdio.ours[:])
	closeAll([]int{s.console})
	s.console = -1
	s.procfs.close()
	if s.heir != nil {
		s.heir.close()
	}
}

// stage is how far follow goes.
type stage uint8

const (
	untilHooks stage = iota // the child waits for Done there
	untilExec               // or its successor's, if it has one
)

// follow speaks with the child until it has come so far, or has failed: then it is dead, and s closed. It answers
// Started or Failed. It may be called again only if the child waits at its hooks.
func (p *pod) follow(s *starting, to stage) (*launched, initproto.Message) {
	ch, conn := s.child, s.conn
	l := &launched{child: ch, init: ch, console: s.console, procfs: s.procfs}
	expecting := s.heir != nil
	over := func() { // with the child as such
		if expecting {
			p.children.settle()
		}
		_ = conn.Close() // all was said
	}
	giveUp := func(f initproto.Message) (*launched, initproto.Message) {
		over()
		s.console, s.procfs = l.console, l.procfs
		s.close()
		return nil, f
	}
	execing := false
	for {
		r, err := conn.Recv()
		if err != nil {
			break
		}
		switch r.Type {
		case initproto.TypeAtHooks:
			if to == untilHooks {
				s.console, s.procfs = l.console, l.procfs
				started := initproto.Started{PID: ch.pid, At: time.Now().UnixNano()}
				return nil, initproto.Message{Type: initproto.TypeStarted, Body: started.Encode()}
			}
		case initproto.TypeConsole:
			if len(r.FDs) == 1 {
				l.console = r.TakeFD(0)
			}
		case initproto.TypeDone:
			if st, err := initproto.DecodeStarted(r.Body); err == nil {
				l.warnings, execing = st.Warnings, true
			}
		case initproto.TypeProcfs:
			if len(r.FDs) == 1 && l.procfs == nil {
				l.procfs = &procfs{mount: r.TakeFD(0)}
			}
		case initproto.TypeForking:
			f, err := initproto.DecodeForking(r.Body)
			if err != nil || !expecting {
				break
			}
			expecting = false
			successor, failed := p.children.succeed(s.heir, ch, f.Program)
			if failed != nil {
				return giveUp(failed.message())
			}
			if successor != nil { // else it has died, which EOF will say
				l.child, l.warnings, execing = successor, f.Warnings, true
			}
		case initproto.TypeFailed:
			<-ch.done
			return giveUp(initproto.Message{Type: initproto.TypeFailed, Body: r.Body})
		}
		r.Close()
	}
	if !execing {
		<-ch.done
		f := initproto.Failure{Kind: initproto.FailStart, Step: "set up process"}
		switch {
		case ch.status.Signaled():
			f.Text = "the init was killed by signal " + itoa(int(ch.status.Signal())) + " before it could run the command"
			if ch.status.Signal() == unix.SIGKILL {
				f.Errno = uint32(unix.ENOMEM) // nobody else kills it: the memory limit did
			}
		case s.sendErr != nil:
			f.Text = s.sendErr.Error()
		default:
			f.Text = "the init ended with status " + itoa(ch.status.ExitStatus()) + " before it could run the command"
		}
		return giveUp(initproto.Message{Type: initproto.TypeFailed, Body: f.Encode()})
	}
	over()
	if s.heir != nil {
		s.heir.close()
	}
	l.at = time.Now()
	started := initproto.Started{PID: l.child.pid, At: l.at.UnixNano(), Warnings: l.warnings}
	return l, initproto.Message{Type: initproto.TypeStarted, Body: started.Encode()}
}

// failStep reports an error of ours that may be a *sys.Error.
func failStep(what string, err error) initproto.Message { return failed(what, err).message() }

// adopt takes over our ends of a started container's streams and begins to log. Caller holds pod.mu.
func (c *container) adopt(l *launched, s *stdio) {
	if l.console >= 0 {
		closeAll(s.ours[:])
		_ = unix.SetNonblock(l.console, true) // F_SETFL on a descriptor we own
		c.terminal = os.NewFile(uintptr(l.console), "terminal")
		c.copy(c.terminal, logs.Stdout)
		return
	}
	if s.ours[0] >= 0 {
		c.stdin = os.NewFile(uintptr(s.ours[0]), "stdin")
	}
	c.copy(os.NewFile(uintptr(s.ours[1]), "stdout"), logs.Stdout)
	c.copy(os.NewFile(uintptr(s.ours[2]), "stderr"), logs.Stderr)
}

// watch waits for the end of a running container: journal first, then what is left of the output,
// then the event, then the attached clients (who wait for the log's disk, should that hang).
func (p *pod) watch(c *container) {
	<-c.child.done
	x := initproto.Exited{ContainerID: c.id, Status: uint32(c.child.status), At: c.child.at.UnixNano()}
	p.journal.record(&x)
	if c.pid == initproto.PIDNew {
		c.procfs.close() // with its first process a PID namespace ends
	}
	c.drain()
	<-c.init.done // it is in the cgroup that the daemon removes when it hears
	p.mu.Lock()
	c.state = initproto.StateExited
	taps := c.taps
	c.taps = nil
	p.settled.Broadcast()
	p.mu.Unlock()
	p.exited(&x)
	c.detach(taps)
}

// journal is the append-only file of exits.
type journal struct {
	fd int

	mu   sync.Mutex // held for writes, which do not wait: the run root is a tmpfs
	torn bool       // the file ends within a line
}

// record writes the exit of a container. A full run root may take a part of the line, or nothing: the listing still has it.
func (j *journal) record(x *initproto.Exited) {
	j.mu.Lock()
	defer j.mu.Unlock()
	line := initproto.JournalLine(x)
	if j.torn {
		line = append([]byte{'\n'}, line...) // ends the torn one, which readers leave out
	}
	for {
		n, err := unix.Write(j.fd, line)
		if err == unix.EINTR {
			continue
		}
		if n > 0 {
			j.torn = n < len(line)
		}
		return
	}
}

// signal sends a signal to a container's first process.
func (p *pod) signal(id string, sig unix.Signal) initproto.Message {
	p.mu.Lock()
	c := p.containers[id]
	var ch *child
	if c != nil {
		ch = c.child
	}
	p.mu.Unlock()
	if c == nil {
		return failure(initproto.FailNotFound, "signal container", unix.ESRCH)
	}
	if ch == nil {
		return failure(initproto.FailState, "signal container", unix.ESRCH)
	}
	if err := p.children.signal(ch, sig); err != nil {
		return failure(initproto.FailState, "signal container", err)
	}
	return done()
}

// remove forgets a container that does not run. One that was killed while it was started, or just now, is waited
// for: who killed it may know of it before we have settled that.
func (p *pod) remove(id string) initproto.Message {
	p.mu.Lock()
	c := p.containers[id]
	for c != nil && (c.state == initproto.StateStarting || c.state == initproto.StateRunning && c.child.dead()) {
		p.settled.Wait()
		c = p.containers[id]
	}
	if c != nil && c.state != initproto.StateCreated && c.state != initproto.StateExited {
		p.mu.Unlock()
		return failure(initproto.FailState, "remove container", unix.EBUSY)
	}
	delete(p.containers, id)
	p.mu.Unlock()
	if c != nil {
		c.msg.Close()
		c.closeIO()
	}
	return done()
}

// reopen gives a container's log a new file.
func (p *pod) reopen(id string, m *initproto.Message) initproto.Message {
	p.mu.Lock()
	c := p.containers[id]
	p.mu.Unlock()
	if c == nil {
		return failure(initproto.FailNotFound, "reopen log", unix.ESRCH)
	}
	if len(m.FDs) != 1 {
		return failure(initproto.FailStart, "reopen log", initproto.ErrMalformed)
	}
	if err := c.sink.Swap(os.NewFile(uintptr(m.TakeFD(0)), "log")); err != nil {
		return failStep("reopen log", err)
	}
	return done()
}

// list is for a daemon that comes back.
func (p *pod) list() []initproto.ContainerInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := make([]initproto.ContainerInfo, 0, len(p.containers))
	for _, c := range p.containers {
		i := initproto.ContainerInfo{ID: c.id, State: c.state}
		if c.child != nil {
			i.PID, i.StartedAt = c.child.pid, c.startedAt.UnixNano()
			if c.state == initproto.StateExited {
				i.Status, i.ExitedAt = uint32(c.child.status), c.child.at.UnixNano()
			}
		}
		st := c.sink.Stats()
		i.LogBytes, i.LogDropped = st.Bytes, st.Dropped
		l = append(l, i)
	}
	return l
}

// exec runs one more process in a running container.
func (p *pod) exec(m *initproto.Message) initproto.Message {
	x, err := initproto.DecodeExec(m.Body, len(m.FDs))
	if err != nil {
		return failure(initproto.FailStart, "read exec", err)
	}
	c, notRunning := p.running(x.ContainerID, "exec")
	if c == nil {
		return notRunning
	}
	var ns [3]int // pid, mnt, cgroup
	for i, name := range []string{"pid", "mnt", "cgroup"} {
		if ns[i], err = p.children.namespace(c.child, name); err != nil {
			closeAll(ns[:i])
			return failure(initproto.FailState, "exec: the container has exited", err)
		}
	}
	defer closeAll(ns[:])
	h, err := newHeir()
	if err != nil {
		return failStep("prepare process", err)
	}
	b := birth{role: "exec", title: "crisp-init: exec in " + short(c.id), cgroupFD: -1, heir: h}
	b.oomScore = oomArgument(&x.Process)
	if x.CgroupFD >= 0 {
		b.cgroupFD = m.FDs[x.CgroupFD]
	}
	if x.Tasks > 0 {
		b.tasks = m.FDs[x.TasksFD:][:x.Tasks]
	}
	fds := []int{execMountNS: ns[1], execCgroupNS: ns[2], execPIDNS: ns[0], execStatus: h.write, execPage: h.page}
	inner := *x
	inner.CgroupFD, inner.TasksFD, inner.Tasks = -1, -1, 0
	if x.ProcsFD >= 0 {
		fds, inner.ProcsFD = append(fds, m.FDs[x.ProcsFD]), execProcs
	}
	s := stdio{child: [3]int{m.TakeFD(0), m.TakeFD(1), m.TakeFD(2)}, ours: [3]int{-1, -1, -1}}
	var l *launched
	starting, reply := p.begin(b, s, initproto.Message{Type: initproto.TypeRun, Body: inner.Encode(), FDs: fds})
	if starting != nil {
		l, reply = p.follow(starting, untilExec)
	}
	if reply.Type == initproto.TypeFailed {
		// With the container's first process the kernel ends its PID namespace: clone(2) says ENOMEM then, and who
		// was born before is killed. Both look like a want of memory.
		if f, err := initproto.DecodeFailure(reply.Body); err == nil && f.Errno == uint32(unix.ENOMEM) && c.child.ends(drainTime) {
			return failure(initproto.FailState, "exec: the container has exited", unix.ESRCH)
		}
		return reply
	}
	if l.console >= 0 { // the daemon serves this terminal; it ends with the daemon
		reply.FDs = []int{l.console}
	}
	go func() {
		<-l.child.done
		<-l.init.done // it is in the cgroup that the daemon removes now
		p.exited(&initproto.Exited{ContainerID: x.ContainerID, ExecID: x.ExecID, Status: uint32(l.child.status), At: l.child.at.UnixNano()})
	}()
	return reply
}

// startReaper makes the PID namespace that the pod's containers share. It does not wait for the reaper: the pod may
// go on, its first container waits (pidNamespace).
func (p *pod) startReaper() *step {
	ours, theirs, err := initproto.Pair()
	if err != nil {
		return failed("start reaper", err)
	}
	ch, err := p.children.fork(birth{
		role: "reaper", title: "crisp-init: reaper", clone: unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		files: [4]int{0, 0, 0, theirs}, cgroupFD: -1,
	})
	_ = unix.Close(theirs) // the child has it
	if err != nil {
		_ = unix.Close(ours) // nothing was said
		return failed("start reaper", err)
	}
	p.reaper, p.reaperReady = ch, make(chan struct{})
	conn, err := initproto.NewConn(ours)
	if err != nil {
		return failed("start reaper", err)
	}
	go func() { // ends when the reaper is ready or dead
		for {
			m, err := conn.Recv()
			if err != nil { // EOF: it has its empty root and its handlers, or it is dead, which its namespace will tell
				break
			}
			if m.Type == initproto.TypeProcfs && len(m.FDs) == 1 && p.reaperProcfs == nil {
				p.reaperProcfs = &procfs{mount: m.TakeFD(0)}
			}
			m.Close()
		}
		_ = conn.Close()
		close(p.reaperReady)
	}()
	return nil
}

// stopReaper ends the shared PID namespace, with all that is left in it, and waits: else the dead reaper would be
// left to the host's PID 1.
func (p *pod) stopReaper() {
	if p.reaper == nil {
		return
	}
	_ = p.children.signal(p.reaper, unix.SIGKILL) // ESRCH: dead already
	<-p.reaper.done
}

func short(id string) string { return id[:min(len(id), 12)] }
