package initproto

// Type says what a message is.
type Type uint8

const (
	TypeSetup      Type = iota + 1 // daemon → pod init, first message; fds: listener, journal
	TypeReady                      // pod init → daemon: set up, or accepted a new connection
	TypeCreate                     // daemon → pod init: Container + fds
	TypeStart                      // daemon → pod init: ID
	TypeSignal                     // daemon → pod init: ID, signal
	TypeRemove                     // daemon → pod init: ID
	TypeReopen                     // daemon → pod init: ID + fd of the new log
	TypeExec                       // daemon → pod init: Exec + fds
	TypeList                       // daemon → pod init
	TypeShutdown                   // daemon → pod init: exit now
	TypeDone                       // reply: it is done
	TypeStarted                    // reply: pid, time
	TypeFailed                     // reply: Failure
	TypeListing                    // reply: []ContainerInfo
	TypeExited                     // pod init → daemon: a container or exec ended
	TypeRun                        // pod init → container init: Container + fds
	TypeConsole                    // container init → pod init: fd of the pty master
	TypeAttach                     // daemon → pod init: ID, Attach* bits + pipes for the wanted outputs; reply Done, with the stdin wanted
	TypeCloseStdin                 // daemon → pod init: ID
	TypeProcfs                     // first process of a PID namespace → pod init: fd of a detached procfs of it
	TypeForking                    // container init → pod init: Forking; its successor has no connection
	TypePrepare                    // daemon → pod init: ID + fds of the host's mount tree and of config.json; reply Started: it waits before pivot_root(2)
	TypeAtHooks                    // container init → pod init: waiting there; reply Done
)

// Setup is the body of TypeSetup.
type Setup struct {
	PodID     string
	Title     string // "namespace/name", for ps
	Hostname  string // "" leaves it (host UTS namespace)
	Sysctls   [][2]string
	ShmSize   uint64 // bytes; 0: no pod-wide /dev/shm
	HostNet   bool   // lo is not ours to bring up
	SharedPID bool   // start the reaper
	Label     string // SELinux label of /dev/shm; "": the policy's
}

// Encode returns the body.
func (s *Setup) Encode() []byte {
	e := &encoder{}
	e.string(s.PodID)
	e.string(s.Title)
	e.string(s.Hostname)
	list(e, s.Sysctls, func(e *encoder, kv [2]string) { e.string(kv[0]); e.string(kv[1]) })
	e.uint(s.ShmSize)
	e.bool(s.HostNet)
	e.bool(s.SharedPID)
	e.string(s.Label)
	return e.b
}

// DecodeSetup is the inverse of Encode.
func DecodeSetup(b []byte) (*Setup, error) {
	d := &decoder{b: b}
	s := &Setup{
		PodID:    d.string(),
		Title:    d.string(),
		Hostname: d.string(),
		Sysctls:  unlist(d, func(d *decoder) [2]string { return [2]string{d.string(), d.string()} }),
		ShmSize:  d.uint(), HostNet: d.bool(), SharedPID: d.bool(), Label: d.string(),
	}
	return s, d.end()
}

// Failure is the body of TypeFailed: which step failed and why. It keeps the
// errno, so that errors.Is works at the other end.
type Failure struct {
	Kind  FailKind
	Step  string
	Errno uint32 // 0: Text alone says why
	Text  string // what the errno alone would not say; may be empty
}

// FailKind tells classes of failures apart, independent of their text.
type FailKind uint8

const (
	FailStart    FailKind = iota + 1 // the process could not be brought to its first instruction
	FailNotFound                     // the pod init holds no such container
	FailState                        // container in the wrong state
)

// Encode returns the body.
func (f *Failure) Encode() []byte {
	e := &encoder{}
	e.uint(uint64(f.Kind))
	e.string(f.Step)
	e.uint(uint64(f.Errno))
	e.string(f.Text)
	return e.b
}

// DecodeFailure is the inverse of Encode.
func DecodeFailure(b []byte) (*Failure, error) {
	d := &decoder{b: b}
	f := &Failure{Kind: FailKind(d.uint()), Step: d.string(), Errno: uint32(d.uint()), Text: d.string()}
	return f, d.end()
}

// Bits of an Attach request.
const (
	AttachStdin  = 1 << iota // reply with our end of its stdin, or with its terminal
	AttachStdout             // a pipe comes along
	AttachStderr             // a pipe comes along, after that of stdout
)

// Target is the body of Start, Signal, Remove, Reopen, Attach, CloseStdin: a container, and a number
// whose meaning the type gives.
type Target struct {
	ID     string
	Number int64 // Signal: the signal; Attach: Attach* bits; Start: 1 gives a prepared container up
}

// Encode returns the body.
func (t *Target) Encode() []byte {
	e := &encoder{}
	e.string(t.ID)
	e.int(t.Number)
	return e.b
}

// DecodeTarget is the inverse of Encode.
func DecodeTarget(b []byte) (*Target, error) {
	d := &decoder{b: b}
	t := &Target{ID: d.string(), Number: d.int()}
	return t, d.end()
}

// Started is the body of TypeStarted.
type Started struct {
	PID int   // in the pod init's PID namespace, which is the daemon's
	At  int64 // ns since the epoch, when execve had succeeded
	// Warnings: what this host would not allow and the start went on without.
	Warnings []string
}

// Encode returns the body.
func (s *Started) Encode() []byte {
	e := &encoder{}
	e.uint(uint64(s.PID))
	e.int(s.At)
	e.strings(s.Warnings)
	return e.b
}

// DecodeStarted is the inverse of Encode.
func DecodeStarted(b []byte) (*Started, error) {
	d := &decoder{b: b}
	s := &Started{PID: int(d.uint()), At: d.int(), Warnings: d.strings()}
	return s, d.end()
}

// Forking is the body of TypeForking, the last message of an init that will have a successor.
type Forking struct {
	Program  string   // what will be executed
	Warnings []string // as Started's
}

// Encode returns the body.
func (f *Forking) Encode() []byte {
	e := &encoder{}
	e.string(f.Program)
	e.strings(f.Warnings)
	return e.b
}

// DecodeForking is the inverse of Encode.
func DecodeForking(b []byte) (*Forking, error) {
	d := &decoder{b: b}
	f := &Forking{Program: d.string(), Warnings: d.strings()}
	return f, d.end()
}

// Exited is the body of TypeExited.
type Exited struct {
	ContainerID string
	ExecID      string // "": the container's first process
	Status      uint32 // wait(2) status
	At          int64  // ns since the epoch
}

// Encode returns the body.
func (x *Exited) Encode() []byte {
	e := &encoder{}
	e.string(x.ContainerID)
	e.string(x.ExecID)
	e.uint(uint64(x.Status))
	e.int(x.At)
	return e.b
}

// DecodeExited is the inverse of Encode.
func DecodeExited(b []byte) (*Exited, error) {
	d := &decoder{b: b}
	x := &Exited{ContainerID: d.string(), ExecID: d.string(), Status: uint32(d.uint()), At: d.int()}
	return x, d.end()
}

// ContainerState is the pod init's view of a container.
type ContainerState uint8

const (
	StateCreated ContainerState = iota + 1
	StateStarting
	StateRunning
	StateExited
	StatePrepared // waits for Start, its hooks of the runtime namespace run
)

// ContainerInfo is one line of a Listing.
type ContainerInfo struct {
	ID         string
	State      ContainerState
	PID        int
	StartedAt  int64  // ns since the epoch, 0 before
	Status     uint32 // wait(2) status when exited
	ExitedAt   int64
	LogBytes   uint64 // written to the log since start
	LogDropped uint64 // lost to a full or broken log disk
}

// EncodeListing returns the body of TypeListing.
func EncodeListing(l []ContainerInfo) []byte {
	e := &encoder{}
	list(e, l, func(e *encoder, c ContainerInfo) {
		e.string(c.ID)
		e.uint(uint64(c.State))
		e.uint(uint64(c.PID))
		e.int(c.StartedAt)
		e.uint(uint64(c.Status))
		e.int(c.ExitedAt)
		e.uint(c.LogBytes)
		e.uint(c.LogDropped)
	})
	return e.b
}

// DecodeListing is the inverse of EncodeListing.
func DecodeListing(b []byte) ([]ContainerInfo, error) {
	d := &decoder{b: b}
	l := unlist(d, func(d *decoder) ContainerInfo {
		return ContainerInfo{
			ID: d.string(), State: ContainerState(d.uint()), PID: int(d.uint()), StartedAt: d.int(),
			Status: uint32(d.uint()), ExitedAt: d.int(), LogBytes: d.uint(), LogDropped: d.uint(),
		}
	})
	return l, d.end()
}
