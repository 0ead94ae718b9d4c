package podsandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// world is a kernel in memory, with a network and images. It outlives the Managers
// that run over it, as the kernel does daemons.
//
// Every operation on it, and every write of the store, has a name and a number: a test can let one of them
// fail, make the daemon die at one (from there on nothing it does has an effect), or hold it up.
type world struct {
	t   *testing.T
	dir string

	mu    sync.Mutex
	count int
	ops   []string // names of the operations so far
	// fail are the numbers of the operations that fail, once each.
	fail map[int]error
	// crash is the number of the operation at which the daemon dies; 0: never.
	crash int
	// crashLater is crash for a script that first prepares something.
	crashLater int
	dead       bool
	hooks      map[string]func(ctx context.Context) error // by name, called without mu

	inits   map[int]*fakeInit         // by pid, living
	all     []*fakeInit               // also the dead
	journal map[string][]spawn.Exit   // by run directory
	cgroups map[string]*fakeCgroupDir // by path
	pins    map[string]bool
	lastPID int
	oom     map[string]uint64 // by cgroup path

	// noted are things done, and whether they were done for a user namespace.
	noted map[string]bool

	images  *fakeImages
	network *fakeNetwork
	ran     ranHooks
}

var (
	errInjected = errors.New("injected fault")
	errCrashed  = errors.New("the daemon is dead")
)

func newWorld(t *testing.T) *world {
	w := &world{
		t: t, dir: t.TempDir(), fail: map[int]error{}, hooks: map[string]func(context.Context) error{},
		inits: map[int]*fakeInit{}, journal: map[string][]spawn.Exit{}, cgroups: map[string]*fakeCgroupDir{},
		pins: map[string]bool{}, noted: map[string]bool{}, lastPID: 1000, oom: map[string]uint64{},
	}
	lower := filepath.Join(w.dir, "layer")
	if err := os.MkdirAll(filepath.Join(lower, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(lower, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.images, w.network = newFakeImages(lower), newFakeNetwork()
	w.images.world, w.network.world = w, w
	t.Cleanup(func() { // processes that a test left alone
		w.mu.Lock()
		l := slices.Collect(maps.Values(w.inits))
		w.mu.Unlock()
		for _, i := range l {
			i.die()
		}
	})
	return w
}

// op is called at the beginning of every operation.
func (w *world) op(ctx context.Context, name string) error {
	w.mu.Lock()
	w.count++
	n := w.count
	w.ops = append(w.ops, name)
	if n == w.crash {
		w.dead = true
	}
	dead, err, hook := w.dead, w.fail[n], w.hooks[name]
	w.mu.Unlock()
	switch {
	case dead:
		return fmt.Errorf("%s: %w", name, errCrashed)
	case err != nil:
		return fmt.Errorf("%s: %w", name, err)
	case hook != nil:
		return hook(ctx)
	}
	return ctx.Err()
}

func (w *world) note(what string, userns bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noted[what] = userns
}

// reset begins to count anew, without faults.
func (w *world) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count, w.ops, w.crash, w.dead = 0, nil, 0, false
	clear(w.fail)
}

// did is how often the operation was done since the last reset.
func (w *world) did(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, o := range w.ops {
		if o == name {
			n++
		}
	}
	return n
}

func (w *world) failAt(numbers ...int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range numbers {
		w.fail[n] = errInjected
	}
}

func (w *world) crashAt(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.crash = n
}

func (w *world) hook(name string, f func(ctx context.Context) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if f == nil {
		delete(w.hooks, name)
	} else {
		w.hooks[name] = f
	}
}

// total is how many operations there were since the last reset.
func (w *world) total() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count
}

// heal ends all faults.
func (w *world) heal() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.fail)
}

// describe is operation n.
func (w *world) describe(n int) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n < 1 || n > len(w.ops) {
		return fmt.Sprintf("operation %d", n)
	}
	return fmt.Sprintf("operation %d (%s)", n, w.ops[n-1])
}

func (w *world) config() Config {
	return Config{
		StateDir: filepath.Join(w.dir, "state"), RunDir: filepath.Join(w.dir, "run"),
		Spawner: w, Cgroups: fakeCgroups{w}, NetNS: fakeNetNS{w}, Images: w.images, Network: w.network, RunHooks: w.runHooks,
		BootID: "boot-1",
	}
}

// manager is a daemon: it ends with the test.
func (w *world) manager(change func(*Config)) *Manager {
	w.t.Helper()
	cfg := w.config()
	if change != nil {
		change(&cfg)
	}
	w.images.mu.Lock()
	clear(w.images.holders) // pins die with the daemon
	w.images.mu.Unlock()
	m, err := NewManager(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	m.patience = 200 * time.Millisecond
	m.store.fault = func(what string) error { return w.op(context.Background(), what) }
	if err := m.Recover(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = m.Close() }) // of a test that failed
	return m
}

// leftovers is everything that exists but what is named in except: pod and container ids.
func (w *world) leftovers(except ...string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var l []string
	add := func(kind, name string) {
		if !slices.ContainsFunc(except, func(id string) bool { return strings.Contains(name, id) }) {
			l = append(l, kind+" "+name)
		}
	}
	for _, i := range w.inits {
		add("init", i.args.ID)
	}
	for p := range w.cgroups {
		if p != "/" && p != "/root" && !strings.HasPrefix(p, "/kubepods") || strings.Contains(p, "crisp-") {
			add("cgroup", p)
		}
	}
	for n := range w.pins {
		add("netns", n)
	}
	for ip, id := range w.network.reserved {
		add("address", ip.String()+" of "+id)
	}
	for id := range w.network.up {
		add("network", id)
	}
	for id := range w.images.holders {
		add("image", id)
	}
	for _, d := range []string{"state", "run"} {
		_ = filepath.WalkDir(filepath.Join(w.dir, d, podsDir), func(p string, e os.DirEntry, err error) error {
			if err == nil && isID(filepath.Base(p)) {
				add("directory", p)
			}
			return nil
		})
	}
	slices.Sort(l)
	return l
}

// --- Spawner ---

func (w *world) Prepare(spawn.PodArgs) *spawn.Namespaces { return nil }

func (w *world) StartPod(ctx context.Context, a spawn.PodArgs, onExit func(spawn.Exit)) (PodInit, error) {
	if err := w.op(ctx, "spawn.StartPod"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lastPID++
	i := &fakeInit{world: w, args: a, pid: w.lastPID, done: make(chan struct{}), containers: map[string]*fakeContainer{}}
	w.inits[i.pid] = i
	w.all = append(w.all, i)
	w.journal[a.RunDir] = nil
	if d := w.cgroups[w.leaf("pod-"+a.ID)]; d != nil {
		d.inits = append(d.inits, i)
	}
	return i.connect(onExit), nil
}

// leaf is the path of the cgroup with that name. The caller holds mu.
func (w *world) leaf(name string) string {
	for p := range w.cgroups {
		if path.Base(p) == cgroup.LeafPrefix+name {
			return p
		}
	}
	return ""
}

func (w *world) Attach(ctx context.Context, h spawn.Handle, onExit func(spawn.Exit)) (PodInit, error) {
	if err := w.op(ctx, "spawn.Attach"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	i := w.inits[h.PID]
	if i == nil {
		return nil, spawn.ErrGone
	}
	c := i.connect(onExit)
	for _, x := range w.journal[i.args.RunDir] {
		c.exits <- x
	}
	return c, nil
}

func (w *world) MountRootfs(ctx context.Context, r spawn.RootfsArgs) (*os.File, error) {
	w.note("rootfs", r.UserNS != nil)
	if err := w.op(ctx, "spawn.MountRootfs"); err != nil {
		return nil, err
	}
	for _, d := range append([]string{r.Upper, r.Work}, r.Lower...) {
		if _, err := os.Stat(d); err != nil {
			return nil, err
		}
	}
	return os.Open(r.Lower[0])
}

func (w *world) MountImage(ctx context.Context, a spawn.ImageArgs) (*os.File, error) {
	w.note("image", a.UserNS != nil)
	if err := w.op(ctx, "spawn.MountImage"); err != nil {
		return nil, err
	}
	return os.Open(filepath.Join(a.Lower[0], a.SubPath))
}

func (w *world) ReadJournal(runDir string) ([]spawn.Exit, error) {
	if err := w.op(context.Background(), "spawn.ReadJournal"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := os.Stat(runDir); err != nil {
		return nil, nil
	}
	return slices.Clone(w.journal[runDir]), nil
}

// fakeInit is a pod's init.
type fakeInit struct {
	world *world
	args  spawn.PodArgs
	pid   int
	done  chan struct{}
	// guarded by world.mu
	containers map[string]*fakeContainer
	client     *fakeClient // the newest
	mute       bool        // it does not tell of exits
}

// fakeContainer is a container as the init has it.
type fakeContainer struct {
	args  spawn.ContainerArgs
	state spawn.InitState
	pid   int
	start time.Time
	exit  spawn.Exit
	log   string
}

// fakeClient is a daemon's connection to an init.
type fakeClient struct {
	*fakeInit
	unused // what nobody calls panics
	exits  chan spawn.Exit
	closed chan struct{}
	ended  chan struct{}
	once   sync.Once
}

// unused are the methods of a PodInit that a fake does not have itself; they lie deeper than those it has.
type (
	unused  struct{ unused2 }
	unused2 struct{ PodInit }
)

// connect: the caller holds world.mu.
func (i *fakeInit) connect(onExit func(spawn.Exit)) *fakeClient {
	c := &fakeClient{fakeInit: i, exits: make(chan spawn.Exit, 1000), closed: make(chan struct{}), ended: make(chan struct{})}
	i.client = c
	go func() {
		defer close(c.ended)
		for {
			select {
			case x := <-c.exits:
				onExit(x)
			case <-c.closed:
				return
			}
		}
	}()
	return c
}

func (c *fakeClient) Close() error {
	c.once.Do(func() { close(c.closed) })
	<-c.ended
	return nil
}

// die ends the init.
func (i *fakeInit) die() {
	i.world.mu.Lock()
	defer i.world.mu.Unlock()
	i.dieLocked()
}

func (i *fakeInit) dieLocked() {
	if i.world.inits[i.pid] != nil {
		delete(i.world.inits, i.pid)
		close(i.done)
	}
}

func (i *fakeInit) Ready(ctx context.Context) error {
	if err := i.begin(ctx, "init.Ready"); err != nil {
		return err
	}
	i.world.mu.Unlock()
	return nil
}

func (i *fakeInit) Handle() spawn.Handle {
	return spawn.Handle{PID: i.pid, StartTime: uint64(i.pid), BootID: "boot-1", RunDir: i.args.RunDir}
}

func (i *fakeInit) Done() <-chan struct{} { return i.done }

func (i *fakeInit) NetNS() (*os.File, error) { return os.Open(os.DevNull) }

func (i *fakeInit) UserNS() (*os.File, error) {
	if i.args.Userns == nil {
		return nil, nil
	}
	return os.Open(os.DevNull)
}

// begin is op, for an init that must be alive. It returns with world.mu held if there was no error.
func (i *fakeInit) begin(ctx context.Context, name string) error {
	if err := i.world.op(ctx, name); err != nil {
		return err
	}
	i.world.mu.Lock()
	if i.world.inits[i.pid] == nil {
		i.world.mu.Unlock()
		return spawn.ErrGone
	}
	return nil
}

func (i *fakeInit) Create(ctx context.Context, a spawn.ContainerArgs) error {
	if err := i.begin(ctx, "init.Create"); err != nil {
		return err
	}
	defer i.world.mu.Unlock()
	c := &fakeContainer{args: a, state: spawn.InitCreated}
	if a.Log != nil {
		c.log = a.Log.Name()
	}
	i.containers[a.ID] = c
	return nil
}

func (i *fakeInit) Start(ctx context.Context, id string) (int, time.Time, error) {
	if err := i.begin(ctx, "init.Start"); err != nil {
		return 0, time.Time{}, err
	}
	defer i.world.mu.Unlock()
	c := i.containers[id]
	if c == nil {
		return 0, time.Time{}, spawn.ErrNotFound
	}
	if c.state != spawn.InitCreated && c.state != spawn.InitPrepared || spawn.NeedsPrepare(c.args.Spec) != (c.state == spawn.InitPrepared) {
		return 0, time.Time{}, spawn.ErrState
	}
	if c.args.Spec.Process.Args[0] == "/missing" {
		c.state = spawn.InitExited
		return 0, time.Time{}, &spawn.StartError{Step: "exec /missing", Err: unix.ENOENT}
	}
	i.world.lastPID++
	c.state, c.pid, c.start = spawn.InitRunning, i.world.lastPID, time.Now()
	return c.pid, c.start, nil
}

func (i *fakeInit) Prepare(ctx context.Context, id string, config []byte) (int, error) {
	if err := i.begin(ctx, "init.Prepare"); err != nil {
		return 0, err
	}
	defer i.world.mu.Unlock()
	c := i.containers[id]
	if c == nil || c.state != spawn.InitCreated || !json.Valid(config) {
		return 0, spawn.ErrState
	}
	i.world.lastPID++
	c.state, c.pid = spawn.InitPrepared, i.world.lastPID
	return c.pid, nil
}

func (i *fakeInit) Abandon(ctx context.Context, id string) error {
	if err := i.begin(ctx, "init.Abandon"); err != nil {
		return err
	}
	defer i.world.mu.Unlock()
	if c := i.containers[id]; c != nil && c.state == spawn.InitPrepared {
		c.state = spawn.InitExited
	}
	return nil
}

// exit ends a container's process.
func (i *fakeInit) exit(id string, code int) {
	i.world.mu.Lock()
	defer i.world.mu.Unlock()
	i.exitLocked(id, code)
}

func (i *fakeInit) exitLocked(id string, code int) {
	c := i.containers[id]
	if c == nil || c.state != spawn.InitRunning {
		return
	}
	c.state = spawn.InitExited
	if i.world.inits[i.pid] == nil {
		return // nobody collects it
	}
	c.exit = spawn.Exit{ContainerID: id, Code: code, At: time.Now()}
	if code > 128 {
		c.exit.Signal = code - 128
	}
	i.world.journal[i.args.RunDir] = append(i.world.journal[i.args.RunDir], c.exit)
	if !i.world.dead && !i.mute {
		i.client.exits <- c.exit
	}
}

func (i *fakeInit) Signal(ctx context.Context, id string, sig unix.Signal) error {
	if err := i.begin(ctx, "init.Signal"); err != nil {
		return err
	}
	defer i.world.mu.Unlock()
	c := i.containers[id]
	switch {
	case c == nil:
		return spawn.ErrNotFound
	case c.state != spawn.InitRunning:
		return spawn.ErrState
	case c.args.Spec.Process.Args[0] != "/stubborn" || sig == unix.SIGKILL:
		i.exitLocked(id, 128+int(sig))
	}
	return nil
}

func (i *fakeInit) Remove(ctx context.Context, id string) error {
	if err := i.begin(ctx, "init.Remove"); err != nil {
		return err
	}
	defer i.world.mu.Unlock()
	if c := i.containers[id]; c != nil && c.state == spawn.InitRunning {
		return spawn.ErrState
	}
	delete(i.containers, id)
	return nil
}

func (i *fakeInit) ReopenLog(ctx context.Context, id string, log *os.File) error {
	if err := i.begin(ctx, "init.ReopenLog"); err != nil {
		return err
	}
	defer i.world.mu.Unlock()
	i.containers[id].log = log.Name()
	return nil
}

func (i *fakeInit) List(ctx context.Context) ([]spawn.ContainerInfo, error) {
	if err := i.begin(ctx, "init.List"); err != nil {
		return nil, err
	}
	defer i.world.mu.Unlock()
	var l []spawn.ContainerInfo
	for id, c := range i.containers {
		l = append(l, spawn.ContainerInfo{ID: id, State: c.state, PID: c.pid, StartedAt: c.start, Exit: c.exit})
	}
	return l, nil
}

func (i *fakeInit) Shutdown(ctx context.Context) error {
	if err := i.world.op(ctx, "init.Shutdown"); err != nil {
		return err
	}
	i.world.mu.Lock()
	defer i.world.mu.Unlock()
	for id, c := range i.containers {
		if c.state == spawn.InitRunning {
			i.world.t.Errorf("init of %s was shut down over its running container %s", i.args.ID, id)
		}
	}
	i.dieLocked()
	return nil
}

// fakeExec is an exec'd process.
type fakeExec struct {
	Exec                    // what nobody calls panics
	stdout, stderr *os.File // ours to close
	killed, exited chan struct{}
	once           sync.Once
	code           int
}

func (x *fakeExec) PID() int { return 1 }

func (x *fakeExec) Wait(ctx context.Context) (int, error) {
	select {
	case <-x.exited:
		return x.code, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

func (x *fakeExec) kill() { x.once.Do(func() { close(x.killed) }) }

// Exec runs the program of that name in execs.
func (i *fakeInit) Exec(ctx context.Context, a spawn.ExecArgs) (Exec, error) {
	if err := i.begin(ctx, "init.Exec"); err != nil {
		return nil, err
	}
	defer i.world.mu.Unlock()
	program, ok := execs[a.Process.Args[0]]
	if !ok {
		return nil, &spawn.StartError{Step: "exec " + a.Process.Args[0], Err: unix.ENOENT}
	}
	x := &fakeExec{stdout: dup(i.world.t, a.Stdout), stderr: dup(i.world.t, a.Stderr), killed: make(chan struct{}), exited: make(chan struct{})}
	for p, d := range i.world.cgroups {
		if path.Base(p) == "exec-"+a.ExecID {
			d.execs = append(d.execs, x)
		}
	}
	go program(x)
	return x, nil
}

func dup(t *testing.T, f *os.File) *os.File {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Error(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// execs are the programs that can be exec'd. A program closes its files, and sets exited.
var execs = map[string]func(x *fakeExec){
	"echo": func(x *fakeExec) {
		fmt.Fprint(x.stdout, "out")
		fmt.Fprint(x.stderr, "err")
		x.end(3)
	},
	"flood": func(x *fakeExec) {
		b := make([]byte, 1<<20)
		for range 40 {
			if _, err := x.stdout.Write(b); err != nil {
				break
			}
		}
		x.end(0)
	},
	"hang": func(x *fakeExec) {
		<-x.killed
		x.end(137)
	},
	"background much": func(x *fakeExec) {
		_, _ = x.stdout.Write(muchOutput()) // who reads sees what is missing
		close(x.exited)
		<-x.killed
		x.stdout.Close()
		x.stderr.Close()
	},
	// Ends, but leaves a child that holds its output.
	"background": func(x *fakeExec) {
		fmt.Fprint(x.stdout, "parent")
		close(x.exited)
		<-x.killed
		x.stdout.Close()
		x.stderr.Close()
	},
}

func (x *fakeExec) end(code int) {
	x.stdout.Close()
	x.stderr.Close()
	x.code = code
	close(x.exited)
}

// --- cgroups ---

type fakeCgroupDir struct {
	inits     []*fakeInit
	execs     []*fakeExec
	resources *specs.LinuxResources
	stubborn  bool // Kill does not help
}

type fakeCgroups struct{ *world }

func (f fakeCgroups) ValidateParent(p string) error {
	if p != "" && !path.IsAbs(p) {
		return cgroup.ErrInvalid
	}
	return nil
}

func (f fakeCgroups) PodPath(parent, podID string) string {
	if parent == "" {
		return "/root/pod" + podID
	}
	return parent
}

func (f fakeCgroups) InitPath(podPath, podID string) string {
	return path.Join(podPath, cgroup.LeafPrefix+"pod-"+podID)
}

func (f fakeCgroups) ContainerPath(podPath, id string) string {
	return path.Join(podPath, cgroup.LeafPrefix+id)
}

func (f fakeCgroups) CreatePod(ctx context.Context, p string) (bool, error) {
	if err := f.op(ctx, "cgroup.CreatePod"); err != nil {
		return false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cgroups[p] != nil {
		return false, nil
	}
	f.cgroups[p] = &fakeCgroupDir{}
	return true, nil
}

func (f fakeCgroups) Adopt(ctx context.Context, p cgroup.PodInit) error {
	if err := f.op(ctx, "cgroup.Adopt"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if leaf := f.cgroups[f.InitPath(p.PodPath, p.PodID)]; leaf == nil {
		return fmt.Errorf("%w: %s has no leaf", cgroup.ErrNotFound, p.PodPath)
	}
	return nil
}

func (f fakeCgroups) Owned(p string) bool { return path.Dir(p) == "/root" }

func (f fakeCgroups) OwnPods() (map[string]string, error) {
	names, err := f.Children("/root")
	own := map[string]string{}
	for _, name := range names {
		own[strings.TrimPrefix(name, "pod")] = path.Join("/root", name)
	}
	return own, err
}

func (f fakeCgroups) ValidPodPath(p string) bool { return path.IsAbs(p) }

func (f fakeCgroups) RemovePod(ctx context.Context, p string) error {
	if err := f.op(ctx, "cgroup.RemovePod"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for q := range f.cgroups {
		if strings.HasPrefix(q, p+"/") {
			return fmt.Errorf("%w: %s", cgroup.ErrBusy, q)
		}
	}
	delete(f.cgroups, p)
	return nil
}

func (f fakeCgroups) Children(p string) ([]string, error) {
	if err := f.op(context.Background(), "cgroup.Children"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []string
	for q := range f.cgroups {
		if path.Dir(q) == p {
			l = append(l, path.Base(q))
		}
	}
	return l, nil
}

func (f fakeCgroups) Open(p string) Cgroup { return fakeCgroup{f.world, p} }

type fakeCgroup struct {
	*world
	path string
}

func (c fakeCgroup) Create(ctx context.Context, r *specs.LinuxResources) error {
	if err := c.op(ctx, "cgroup.Create"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cgroups[path.Dir(c.path)] == nil {
		return cgroup.ErrNotFound
	}
	if c.cgroups[c.path] == nil {
		c.cgroups[c.path] = &fakeCgroupDir{}
	}
	c.cgroups[c.path].resources = r
	return nil
}

func (c fakeCgroup) Join(how cgroup.Entry) (*cgroup.Join, error) {
	what := "join container"
	if strings.HasPrefix(path.Base(c.path), cgroup.LeafPrefix+"pod-") {
		what = "join pod"
	}
	c.note(what, how == cgroup.ByWriting)
	if err := c.op(context.Background(), "cgroup.Join"); err != nil {
		return nil, err
	}
	return &cgroup.Join{}, nil
}

func (c fakeCgroup) Exec(name string, how cgroup.Entry) (Cgroup, *cgroup.Join, error) {
	c.note("exec", how == cgroup.ByWriting)
	if err := c.op(context.Background(), "cgroup.Exec"); err != nil {
		return nil, nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cgroups[c.path] == nil {
		return nil, nil, cgroup.ErrNotFound
	}
	e := fakeCgroup{c.world, path.Join(c.path, name)}
	c.cgroups[e.path] = &fakeCgroupDir{}
	return e, &cgroup.Join{}, nil
}

func (c fakeCgroup) Update(ctx context.Context, r *specs.LinuxResources) error {
	if err := c.op(ctx, "cgroup.Update"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cgroups[c.path].resources = merged(c.cgroups[c.path].resources, r)
	return nil
}

func (c fakeCgroup) Applied() (cgroup.Applied, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.cgroups[c.path]
	if d == nil {
		return cgroup.Applied{}, cgroup.ErrNotFound
	}
	a := cgroup.Applied{MemoryLimit: -1}
	if d.resources != nil && d.resources.Memory != nil && d.resources.Memory.Limit != nil {
		a.MemoryLimit = *d.resources.Memory.Limit
	}
	return a, nil
}

func (c fakeCgroup) Stats() (*cgroup.Stats, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cgroups[c.path] == nil {
		return nil, cgroup.ErrNotFound
	}
	return &cgroup.Stats{At: time.Now()}, nil
}

func (c fakeCgroup) OOMKills() (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cgroups[c.path] == nil {
		return 0, cgroup.ErrNotFound
	}
	return c.oom[c.path], nil
}

func (c fakeCgroup) Procs() ([]int, error) { return nil, nil }

// below calls f for the cgroup and all below it. The caller holds mu.
func (c fakeCgroup) below(f func(p string, d *fakeCgroupDir)) {
	for p, d := range c.cgroups {
		if p == c.path || strings.HasPrefix(p, c.path+"/") {
			f(p, d)
		}
	}
}

func (c fakeCgroup) Kill(ctx context.Context) error {
	if err := c.op(ctx, "cgroup.Kill"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	c.below(func(p string, d *fakeCgroupDir) {
		if d.stubborn {
			err = fmt.Errorf("%w: a process in state D", cgroup.ErrBusy)
			return
		}
		for _, i := range d.inits {
			i.dieLocked()
		}
		for _, x := range d.execs {
			x.kill()
		}
		for _, i := range c.all {
			i.exitLocked(strings.TrimPrefix(path.Base(p), cgroup.LeafPrefix), 137)
		}
	})
	return err
}

func (c fakeCgroup) Remove(ctx context.Context) error {
	if err := c.op(ctx, "cgroup.Remove"); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	busy := false
	c.below(func(p string, d *fakeCgroupDir) {
		for _, i := range d.inits {
			busy = busy || c.inits[i.pid] != nil
		}
		for _, x := range d.execs {
			select {
			case <-x.killed:
			case <-x.exited:
				busy = busy || x.stdout != nil && x.code == 0 && !isClosed(x.stdout)
			default:
				busy = true
			}
		}
		for _, i := range c.all {
			if k := i.containers[strings.TrimPrefix(path.Base(p), cgroup.LeafPrefix)]; k != nil && k.state == spawn.InitRunning {
				busy = true
			}
		}
	})
	if busy {
		return cgroup.ErrBusy
	}
	c.below(func(p string, _ *fakeCgroupDir) { delete(c.cgroups, p) })
	return nil
}

func isClosed(f *os.File) bool {
	_, err := f.Stat()
	return errors.Is(err, os.ErrClosed)
}

func (c fakeCgroup) BindSources() map[string]string { return nil }

// --- network namespaces ---

type fakeNetNS struct{ *world }

func (f fakeNetNS) Path(name string) string { return "/run/netns/" + name }

func (f fakeNetNS) Pin(name string, _ *os.File) (string, error) {
	if err := f.op(context.Background(), "netns.Pin"); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pins[name] = true
	return f.Path(name), nil
}

func (f fakeNetNS) Unpin(name string) error {
	if err := f.op(context.Background(), "netns.Unpin"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pins, name)
	return nil
}

func (f fakeNetNS) Open(name string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.pins[name] {
		return nil, os.ErrNotExist
	}
	return os.Open(os.DevNull)
}

func (f fakeNetNS) List(prefix string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []string
	for n := range f.pins {
		if strings.HasPrefix(n, prefix) {
			l = append(l, n)
		}
	}
	return l, nil
}

// --- images ---

// fakeImages has one image for every id.
type fakeImages struct {
	image.Images // what podsandbox does not use panics
	world        *world
	lower        string

	mu      sync.Mutex
	holders map[string]bool
}

func newFakeImages(lower string) *fakeImages {
	return &fakeImages{lower: lower, holders: map[string]bool{}}
}

func (f *fakeImages) Acquire(id, holder string) (image.Layers, error) {
	if f.world != nil {
		if err := f.world.op(context.Background(), "images.Acquire"); err != nil {
			return image.Layers{}, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holders[holder] = true
	return image.Layers{ImageID: id, Lower: []string{f.lower}}, nil
}

func (f *fakeImages) Release(holder string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.holders, holder)
}

func (f *fakeImages) CollectGarbage(context.Context) error { return nil }

// --- network ---

// fakeNetwork gives out addresses and counts.
type fakeNetwork struct {
	network.Network // what podsandbox does not use panics
	world           *world

	mu       sync.Mutex
	reserved map[netip.Addr]string // pod id
	up       map[string]bool       // pod ids
}

func newFakeNetwork() *fakeNetwork {
	return &fakeNetwork{reserved: map[netip.Addr]string{}, up: map[string]bool{}}
}

func (f *fakeNetwork) op(ctx context.Context, name string) error {
	if f.world == nil {
		return nil
	}
	return f.world.op(ctx, name)
}

func (f *fakeNetwork) Name() string { return "fake" }

func (f *fakeNetwork) Plan(ctx context.Context, p network.Pod) (network.Result, error) {
	if err := f.op(ctx, "network.Plan"); err != nil {
		return network.Result{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	ip := netip.MustParseAddr("10.0.0.1")
	for f.reserved[ip] != "" {
		ip = ip.Next()
	}
	f.reserved[ip] = p.ID
	return network.Result{IPs: []netip.Addr{ip}}, nil
}

func (f *fakeNetwork) Setup(ctx context.Context, p network.Pod, r network.Result) (network.Result, error) {
	if err := f.op(ctx, "network.Setup"); err != nil {
		return network.Result{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.up[p.ID] = true
	return r, nil
}

func (f *fakeNetwork) Teardown(ctx context.Context, p network.Pod, r network.Result) error {
	if err := f.op(ctx, "network.Teardown"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.up, p.ID)
	for _, ip := range r.IPs {
		if holder := f.reserved[ip]; holder == p.ID {
			delete(f.reserved, ip)
		} else if holder != "" && f.world != nil {
			f.world.t.Errorf("pod %s gave back %s, which is %s's", p.ID, ip, holder)
		}
	}
	return nil
}

func (f *fakeNetwork) Restore(ctx context.Context, pods map[string]network.Restored) error {
	if err := f.op(ctx, "network.Restore"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reserved = map[netip.Addr]string{}
	for id, p := range pods {
		for _, ip := range p.Result.IPs {
			f.reserved[ip] = id
		}
	}
	for id := range f.up {
		if _, ok := pods[id]; !ok {
			delete(f.up, id)
		}
	}
	return nil
}
