package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// daemon is a Manager over a world, with what tests do to it.
type daemon struct {
	*Manager
	*world
}

func newDaemon(t *testing.T) *daemon { return newWorld(t).daemon(nil) }

func (w *world) daemon(change func(*Config)) *daemon {
	return &daemon{Manager: w.manager(change), world: w}
}

// close ends the daemon; pods live on.
func (d *daemon) close() {
	d.t.Helper()
	if err := d.Manager.Close(); err != nil {
		d.t.Errorf("close: %v", err)
	}
}

func podConfig(name string) *PodConfig {
	return &PodConfig{
		Identity: Identity{Name: name, Namespace: "ns", UID: "uid-" + name},
		Hostname: name, Network: NamespacePod, PID: NamespaceContainer, IPC: NamespacePod,
		DNS: DNSConfig{Servers: []string{"192.0.2.1"}}, Echo: []byte("echo of " + name),
	}
}

func containerConfig(name string, args ...string) *ContainerConfig {
	if len(args) == 0 {
		args = []string{"/program"}
	}
	return &ContainerConfig{
		Name: name, ImageID: "sha256:image", Echo: []byte("echo of " + name),
		Spec: &specs.Spec{
			Process: &specs.Process{Args: args, Env: []string{"PATH=/bin"}},
			Linux:   &specs.Linux{Resources: &specs.LinuxResources{}},
		},
	}
}

// volumeConfig is a container with an image volume.
func volumeConfig(name string) *ContainerConfig {
	c := containerConfig(name)
	c.Volumes = []ImageVolume{{Source: spawn.ImageSource + "0", ImageID: "sha256:volume", Target: "/v"}}
	return c
}

func (d *daemon) run(name string) string {
	d.t.Helper()
	id, err := d.RunPod(context.Background(), podConfig(name))
	if err != nil {
		d.t.Fatal(err)
	}
	return id
}

func (d *daemon) create(pod, name string, args ...string) string {
	d.t.Helper()
	id, err := d.CreateContainer(context.Background(), pod, containerConfig(name, args...))
	if err != nil {
		d.t.Fatal(err)
	}
	return id
}

func (d *daemon) startNew(pod, name string, args ...string) string {
	d.t.Helper()
	id := d.create(pod, name, args...)
	if err := d.StartContainer(context.Background(), id); err != nil {
		d.t.Fatal(err)
	}
	return id
}

func (d *daemon) mustPod(id string) *Pod {
	d.t.Helper()
	p, err := d.Pod(id)
	if err != nil {
		d.t.Fatal(err)
	}
	return p
}

func (d *daemon) mustContainer(id string) *Container {
	d.t.Helper()
	c, err := d.Container(id)
	if err != nil {
		d.t.Fatal(err)
	}
	return c
}

// ended waits for a container's exit.
func (d *daemon) ended(id string) *Container {
	d.t.Helper()
	d.Manager.mu.RLock()
	c := d.containers[id]
	d.Manager.mu.RUnlock()
	select {
	case <-c.ended:
	case <-time.After(10 * time.Second):
		d.t.Fatalf("container %s does not end", id)
	}
	return d.mustContainer(id)
}

// init is a pod's init in the world.
func (d *daemon) initOf(pod string) *fakeInit {
	d.world.mu.Lock()
	defer d.world.mu.Unlock()
	for _, i := range d.inits {
		if i.args.ID == pod {
			return i
		}
	}
	d.t.Fatalf("pod %s has no init", pod)
	return nil
}

// removeAll stops and removes what is listed, as the kubelet does, and checks that nothing is left of it.
func (d *daemon) removeAll() {
	d.t.Helper()
	ctx := context.Background()
	for _, p := range d.Pods() {
		if err := errors.Join(d.StopPod(ctx, p.ID), d.RemovePod(ctx, p.ID)); err != nil {
			d.t.Errorf("remove pod: %v", err)
		}
	}
	if l := d.Containers(); len(l) > 0 {
		d.t.Errorf("containers are left: %v", l[0])
	}
	if l := d.leftovers(); len(l) > 0 {
		d.t.Errorf("left over:\n%s", strings.Join(l, "\n"))
	}
}

func TestLife(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	p := d.mustPod(pod)
	if p.State != PodReady || p.Reason != "" || p.InitPID == 0 || len(p.IPs) != 1 || p.CgroupPath != "/root/pod"+pod ||
		p.NetNSPath != "/run/netns/crisp-"+pod || p.CreatedAt.IsZero() || len(p.Timings) == 0 || p.Config.Name != "a" {
		t.Errorf("got pod %+v", p)
	}
	for path, want := range map[string]string{p.ResolvConf: "nameserver 192.0.2.1\n", p.HostnameFile: "a\n"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s: got %q, %v, want %q", path, b, err, want)
		}
	}
	if b, err := os.ReadFile(p.Hosts); err != nil || !strings.Contains(string(b), "10.0.0.1\ta\n") {
		t.Errorf("got hosts %q, %v", b, err)
	}
	id := d.create(pod, "c")
	c := d.mustContainer(id)
	if c.State != ContainerCreated || c.PodID != pod || c.User.Home != "/root" || c.Spec.Process.Env[1] != "HOME=/root" || c.PID != 0 {
		t.Errorf("got container %+v", c)
	}
	if err := d.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if c = d.mustContainer(id); c.State != ContainerRunning || c.PID == 0 || c.StartedAt.IsZero() {
		t.Errorf("got container %+v", c)
	}
	if err := d.StartContainer(ctx, id); !errors.Is(err, ErrState) {
		t.Errorf("second start: got %v, want ErrState", err)
	}
	if err := d.StopContainer(ctx, id, time.Minute); err != nil {
		t.Fatal(err)
	}
	if c = d.mustContainer(id); c.State != ContainerExited || c.ExitCode != 143 || c.Reason != reasonError || c.FinishedAt.Before(c.StartedAt) || c.PID != 0 {
		t.Errorf("got container %+v", c)
	}
	for range 2 {
		if err := errors.Join(d.StopContainer(ctx, id, 0), d.RemoveContainer(ctx, id)); err != nil {
			t.Error(err)
		}
	}
	if err := d.StopPod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	if p = d.mustPod(pod); p.State != PodNotReady || p.Reason != reasonStopped || p.IPs != nil || p.InitPID != 0 {
		t.Errorf("got pod %+v", p)
	}
	if _, err := d.CreateContainer(ctx, pod, containerConfig("late")); !errors.Is(err, ErrState) {
		t.Errorf("create in a stopped pod: got %v, want ErrState", err)
	}
	if l := d.leftovers(pod); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
	for range 2 {
		if err := errors.Join(d.StopPod(ctx, pod), d.RemovePod(ctx, pod)); err != nil {
			t.Error(err)
		}
	}
	if _, err := d.Pod(pod); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	d.removeAll()
}

// lateNetwork chooses another network for each pod, as package auto does, and knows its addresses only when it is set up, as CNI does.
type lateNetwork struct{ *fakeNetwork }

func (lateNetwork) Name() string { return "late" }

func (n lateNetwork) Plan(ctx context.Context, p network.Pod) (network.Result, error) {
	_, err := n.fakeNetwork.Plan(ctx, p)
	return network.Result{Provider: n.fakeNetwork.Name()}, err
}

func (n lateNetwork) Setup(ctx context.Context, p network.Pod, r network.Result) (network.Result, error) {
	r.IPs = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
	return n.fakeNetwork.Setup(ctx, p, r)
}

func (lateNetwork) Teardown(context.Context, network.Pod, network.Result) error {
	return errors.New("the pod has another network")
}

func (lateNetwork) Restore(context.Context, map[string]network.Restored) error { return nil }

func TestAddressesFromSetup(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(func(c *Config) { c.Network, c.Networks = lateNetwork{w.network}, []network.Network{w.network} })
	defer d.close()
	p := d.mustPod(d.run("a"))
	if got := fmt.Sprint(p.IPs); got != "[10.0.0.1 fd00::1]" {
		t.Errorf("got addresses %s", got)
	}
	if b, err := os.ReadFile(p.Hosts); err != nil || !strings.Contains(string(b), "10.0.0.1\ta\n") || !strings.Contains(string(b), "fd00::1\ta\n") {
		t.Errorf("got hosts %q, %v", b, err)
	}
	d.removeAll() // by the network that the pod was born with
}

func TestHostNetwork(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	cfg := podConfig("host")
	cfg.Network = NamespaceNode
	id, err := d.RunPod(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if p := d.mustPod(id); p.IPs != nil || p.NetNSPath != "" {
		t.Errorf("got %+v", p)
	}
	if len(d.pins) > 0 || len(d.network.reserved) > 0 {
		t.Errorf("got pins %v, addresses %v", d.pins, d.network.reserved)
	}
	d.removeAll()
}

func TestInvalid(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	pod := d.run("ok")
	before := len(d.ops)
	for _, tc := range []struct {
		name   string
		change func(*PodConfig)
	}{
		{"no name", func(c *PodConfig) { c.Name = "" }},
		{"relative log directory", func(c *PodConfig) { c.LogDirectory = "logs" }},
		{"relative cgroup parent", func(c *PodConfig) { c.CgroupParent = "kubepods" }},
		{"line in DNS", func(c *PodConfig) { c.DNS.Searches = []string{"a\nnameserver 6.6.6.6"} }},
	} {
		c := podConfig("bad")
		tc.change(c)
		if _, err := d.RunPod(context.Background(), c); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", tc.name, err)
		}
	}
	for _, tc := range []struct {
		name   string
		change func(*ContainerConfig)
	}{
		{"no name", func(c *ContainerConfig) { c.Name = "" }},
		{"no command", func(c *ContainerConfig) { c.Spec.Process.Args = nil }},
		{"log path leads out", func(c *ContainerConfig) { c.LogPath = "../x" }},
		{"stop signal", func(c *ContainerConfig) { c.StopSignal = "SIGWHAT" }},
		{"PID mode", func(c *ContainerConfig) { c.PID = "what" }},
	} {
		c := containerConfig("bad")
		tc.change(c)
		if _, err := d.CreateContainer(context.Background(), pod, c); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", tc.name, err)
		}
	}
	if len(d.ops) != before {
		t.Errorf("invalid requests had effects: %v", d.ops[before:])
	}
	d.removeAll()
}

// Unknown ids: an error for who wants to know or use, none for who wants them gone.
func TestUnknown(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	id := strings.Repeat("ab", 32)
	_, podErr := d.Pod(id)
	_, conErr := d.Container(id)
	_, execErr := d.ExecSync(ctx, id, []string{"x"}, 0)
	_, createErr := d.CreateContainer(ctx, id, containerConfig("c"))
	_, statsErr := d.ContainerStats(id)
	_, resErr := d.Resources(id)
	for what, err := range map[string]error{
		"Pod": podErr, "Container": conErr, "ExecSync": execErr, "CreateContainer": createErr, "ContainerStats": statsErr, "Resources": resErr,
		"StartContainer": d.StartContainer(ctx, id), "ReopenLog": d.ReopenLog(ctx, id), "UpdateContainer": d.UpdateContainer(ctx, id, nil, nil),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %v, want ErrNotFound", what, err)
		}
	}
	for what, err := range map[string]error{
		"StopPod": d.StopPod(ctx, id), "RemovePod": d.RemovePod(ctx, id),
		"StopContainer": d.StopContainer(ctx, id, 0), "RemoveContainer": d.RemoveContainer(ctx, id),
	} {
		if err != nil {
			t.Errorf("%s: got %v, want nil", what, err)
		}
	}
	if _, err := d.Pod(""); !errors.Is(err, ErrInvalid) {
		t.Errorf("empty id: got %v, want ErrInvalid", err)
	}
}

func TestShortIDs(t *testing.T) {
	all := map[string]int{}
	for i, head := range []string{"aa", "ab", "c"} {
		all[head+strings.Repeat("0", idLen-len(head))] = i
	}
	shown := func(i int) bool { return i != 2 }
	for _, tc := range []struct {
		id   string
		want int
		err  error
	}{
		{"aa", 0, nil},
		{"ab" + strings.Repeat("0", idLen-2), 1, nil},
		{"a", 0, ErrAmbiguous},
		{"c", 0, ErrNotFound}, // not shown
		{"", 0, ErrInvalid},
		{"../a", 0, ErrNotFound},
	} {
		got, err := find("pod", all, tc.id, shown)
		if !errors.Is(err, tc.err) || err == nil && got != tc.want {
			t.Errorf("%q: got %d, %v, want %d, %v", tc.id, got, err, tc.want, tc.err)
		}
	}
}

func TestCreationTimes(t *testing.T) {
	d := newDaemon(t)
	for i := range 20 {
		d.run(fmt.Sprint("p", i))
	}
	last := d.Pods()
	for i := 1; i < len(last); i++ {
		if !last[i-1].CreatedAt.After(last[i].CreatedAt) {
			t.Errorf("pods %d and %d: %v and %v", i-1, i, last[i-1].CreatedAt, last[i].CreatedAt)
		}
	}
	// Also across restarts, and if the clock is set back.
	newest := last[0].CreatedAt.Add(time.Hour)
	d.Manager.mu.Lock()
	d.lastTime = newest
	d.Manager.mu.Unlock()
	d.run("future")
	d.close()
	d = d.daemon(nil)
	defer d.close()
	d.run("after")
	if got := d.Pods()[0]; got.Config.Name != "after" || !got.CreatedAt.After(newest) {
		t.Errorf("got %s of %v, want one after %v", got.Config.Name, got.CreatedAt, newest)
	}
	d.removeAll()
}

// C-70, C-71, C-72
func TestRunPodJoins(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	held, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	d.hook("network.Setup", func(context.Context) error {
		once.Do(func() { close(held) })
		<-release
		return nil
	})
	// The first caller gives up; the pod is made all the same.
	first, cancel := context.WithCancel(context.Background())
	gaveUp := make(chan error)
	go func() {
		_, err := d.RunPod(first, podConfig("a"))
		gaveUp <- err
	}()
	<-held
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `cannot run pod "ns/a": still at step network after`) {
		t.Errorf("got %v", err)
	}
	if l := d.Pods(); len(l) > 0 {
		t.Errorf("a pod that is being made is shown: %v", l)
	}
	ops := d.Operations()
	if len(ops) != 1 || ops[0].What != "run pod" || ops[0].Object != "ns/a" || ops[0].Step != "network" || ops[0].StepBegan.IsZero() {
		t.Errorf("got operations %+v", ops)
	}
	// Another configuration is refused, and the holder is named.
	other := podConfig("a")
	other.Echo = []byte("other")
	if _, err := d.RunPod(context.Background(), other); !errors.Is(err, ErrExists) {
		t.Errorf("got %v, want ErrExists", err)
	}
	other = podConfig("a")
	other.RuntimeHandler = "other"
	if _, err := d.RunPod(context.Background(), other); !errors.Is(err, ErrExists) {
		t.Errorf("another runtime handler: got %v, want ErrExists", err)
	}
	ids := make([]string, 10)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			var err error
			if ids[i], err = d.RunPod(context.Background(), podConfig("a")); err != nil {
				t.Error(err)
			}
		})
	}
	close(release)
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("got %s, want %s", id, ids[0])
		}
	}
	if got := d.run("a"); got != ids[0] {
		t.Errorf("again: got %s, want %s", got, ids[0])
	}
	if _, err := d.RunPod(context.Background(), other); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), ids[0]) {
		t.Errorf("got %v, want ErrExists that names %s", err, ids[0])
	}
	// Once it is not ready the name is free.
	if err := d.StopPod(context.Background(), ids[0]); err != nil {
		t.Fatal(err)
	}
	if got := d.run("a"); got == ids[0] {
		t.Errorf("got the stopped pod %s", got)
	}
	d.removeAll()
}

// C-72: nobody was told of the first, so it may go.
func TestRunPodReplacesAbandoned(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	held, release := make(chan struct{}), make(chan struct{})
	d.hook("network.Setup", func(context.Context) error { close(held); <-release; return nil })
	first, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = d.RunPod(first, podConfig("a"))
	}()
	<-held
	cancel()
	<-done
	d.hook("network.Setup", nil)
	close(release)
	d.Manager.busy.Wait()
	abandoned := d.Pods()[0].ID
	other := podConfig("a")
	other.Echo = []byte("other")
	id, err := d.RunPod(context.Background(), other)
	if err != nil {
		t.Fatal(err)
	}
	if l := d.Pods(); id == abandoned || len(l) != 1 || l[0].ID != id {
		t.Errorf("got pod %s, list %v", id, l)
	}
	d.removeAll()
}

func TestCreateContainerJoins(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	pod := d.run("a")
	held, release := make(chan struct{}), make(chan struct{})
	d.hook("init.Create", func(context.Context) error { close(held); <-release; return nil })
	first, cancel := context.WithCancel(context.Background())
	gaveUp := make(chan error)
	go func() {
		_, err := d.CreateContainer(first, pod, containerConfig("c"))
		gaveUp <- err
	}()
	<-held
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `cannot create container "ns/a/c": still at step init after`) {
		t.Errorf("got %v", err)
	}
	var wg sync.WaitGroup
	ids := make([]string, 5)
	for i := range ids {
		wg.Go(func() { ids[i], _ = d.CreateContainer(context.Background(), pod, containerConfig("c")) })
	}
	close(release)
	wg.Wait()
	d.hook("init.Create", nil)
	for _, id := range ids {
		if id != ids[0] || id == "" {
			t.Errorf("got %q, want %q", id, ids[0])
		}
	}
	other := containerConfig("c")
	other.Echo = []byte("other")
	if _, err := d.CreateContainer(context.Background(), pod, other); !errors.Is(err, ErrExists) {
		t.Errorf("got %v, want ErrExists", err)
	}
	other.Attempt = 1
	if id, err := d.CreateContainer(context.Background(), pod, other); err != nil || id == ids[0] {
		t.Errorf("next attempt: got %s, %v", id, err)
	}
	d.removeAll()
}

func TestStartFails(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	id := d.create(pod, "c", "/missing")
	err := d.StartContainer(ctx, id)
	var start *spawn.StartError
	if !errors.As(err, &start) || !errors.Is(err, unix.ENOENT) || !strings.HasPrefix(err.Error(), `cannot start container "ns/a/c": step start process: exec /missing: no such file`) {
		t.Errorf("got %v", err)
	}
	if c := d.mustContainer(id); c.State != ContainerExited || c.ExitCode != 128 || c.Reason != reasonStartError || c.Message != "exec /missing: no such file or directory" || c.FinishedAt.IsZero() {
		t.Errorf("got %+v", c)
	}
	// A limit that is too low is named.
	limit := int64(4096)
	cfg := containerConfig("small")
	cfg.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	small, err := d.CreateContainer(ctx, pod, cfg)
	if err != nil {
		t.Fatal(err)
	}
	d.hook("init.Start", func(context.Context) error {
		return &spawn.StartError{Step: "set up process", Err: unix.ENOMEM}
	})
	if err := d.StartContainer(ctx, small); err == nil || !strings.Contains(err.Error(), "the memory limit of 4096 bytes is too low") {
		t.Errorf("got %v", err)
	}
	if c := d.mustContainer(small); !strings.Contains(c.Message, "4096 bytes") {
		t.Errorf("got message %q", c.Message)
	}
	d.removeAll()
}

// A start that hangs must not keep the container from being stopped.
func TestStopHangingStart(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	id := d.create(d.run("a"), "c")
	held := make(chan struct{})
	d.hook("init.Start", func(ctx context.Context) error { close(held); <-ctx.Done(); return context.Cause(ctx) })
	started := make(chan error)
	go func() { started <- d.StartContainer(ctx, id) }()
	<-held
	if err := d.StopContainer(ctx, id, time.Hour); err != nil {
		t.Error(err)
	}
	if err := <-started; !errors.Is(err, ErrState) {
		t.Errorf("start: got %v, want ErrState", err)
	}
	if c := d.mustContainer(id); c.State != ContainerExited || c.Reason != reasonStartError {
		t.Errorf("got %+v", c)
	}
	d.removeAll()
}

func TestExits(t *testing.T) {
	for _, tc := range []struct {
		name   string
		code   int
		oom    uint64
		reason string
	}{
		{"well", 0, 0, reasonCompleted},
		{"badly", 7, 0, reasonError},
		{"by a signal", 139, 0, reasonError},
		{"out of memory", 137, 1, reasonOOMKilled},
		{"well, though a child ran out of memory", 0, 1, reasonCompleted},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDaemon(t)
			defer d.close()
			pod := d.run("a")
			id := d.startNew(pod, "c")
			d.world.mu.Lock()
			d.oom[d.mustContainer(id).CgroupPath] = tc.oom
			d.world.mu.Unlock()
			d.initOf(pod).exit(id, tc.code)
			if c := d.ended(id); c.ExitCode != tc.code || c.Reason != tc.reason || c.FinishedAt.Before(c.StartedAt) {
				t.Errorf("got %+v, want %d, %s", c, tc.code, tc.reason)
			}
			d.removeAll()
		})
	}
}

// The whole state × request table of what callers may do with a container.
func TestContainerRequests(t *testing.T) {
	requests := []struct {
		name string
		do   func(d *daemon, id string) error
	}{
		{"start", func(d *daemon, id string) error { return d.StartContainer(context.Background(), id) }},
		{"stop", func(d *daemon, id string) error { return d.StopContainer(context.Background(), id, 0) }},
		{"remove", func(d *daemon, id string) error { return d.RemoveContainer(context.Background(), id) }},
		{"exec", func(d *daemon, id string) error {
			_, err := d.ExecSync(context.Background(), id, []string{"echo"}, 0)
			return err
		}},
		{"update", func(d *daemon, id string) error {
			return d.UpdateContainer(context.Background(), id, &specs.LinuxResources{}, nil)
		}},
		{"reopen", func(d *daemon, id string) error { return d.ReopenLog(context.Background(), id) }},
		{"stats", func(d *daemon, id string) error { _, err := d.ContainerStats(id); return err }},
	}
	states := []struct {
		name    string
		prepare func(d *daemon, pod string) string
	}{
		{"created", func(d *daemon, pod string) string { return d.create(pod, "c") }},
		{"running", func(d *daemon, pod string) string { return d.startNew(pod, "c") }},
		{"exited", func(d *daemon, pod string) string {
			id := d.startNew(pod, "c")
			d.initOf(pod).exit(id, 1)
			d.ended(id)
			return id
		}},
		{"removed", func(d *daemon, pod string) string {
			id := d.create(pod, "c")
			if err := d.RemoveContainer(context.Background(), id); err != nil {
				d.t.Fatal(err)
			}
			return id
		}},
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s", "")
	for _, r := range requests {
		fmt.Fprintf(&b, " %-18s", r.name)
	}
	b.WriteString("\n")
	for _, s := range states {
		fmt.Fprintf(&b, "%-8s", s.name)
		for _, r := range requests {
			d := newDaemon(t)
			pod := d.run("a")
			id := s.prepare(d, pod)
			err := r.do(d, id)
			after := "gone"
			if c, cerr := d.Container(id); cerr == nil {
				after = string(c.State)
			}
			cell := "ok"
			switch {
			case errors.Is(err, ErrState):
				cell = "state"
			case errors.Is(err, ErrNotFound):
				cell = "notfound"
			case err != nil:
				cell = err.Error()
			}
			fmt.Fprintf(&b, " %-18s", cell+" → "+after)
			d.removeAll()
			d.close()
		}
		b.WriteString("\n")
	}
	golden(t, "container-requests.txt", b.String())
}

func TestStopShortened(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	id := d.startNew(d.run("a"), "c", "/stubborn")
	first := make(chan error)
	go func() { first <- d.StopContainer(ctx, id, time.Hour) }()
	// The first has begun when its operation waits.
	for {
		if l := d.Operations(); len(l) == 1 && l[0].Step == "wait for the grace period" {
			break
		}
		time.Sleep(time.Millisecond)
	}
	// A caller who gives up does not end it, and a longer grace does not lengthen it.
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := d.StopContainer(gone, id, 2*time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if c := d.mustContainer(id); c.State != ContainerRunning {
		t.Errorf("got %+v", c)
	}
	if err := errors.Join(d.StopContainer(ctx, id, 0), <-first); err != nil {
		t.Error(err)
	}
	if c := d.mustContainer(id); c.State != ContainerExited || c.ExitCode != 137 {
		t.Errorf("got %+v", c)
	}
	if n := d.did("init.Signal"); n != 1 {
		t.Errorf("got %d signals, want 1", n)
	}
	d.removeAll()
}

// C-04: the next daemon waits for what is left of the grace period, and sends no second signal.
func TestStopAcrossRestart(t *testing.T) {
	d := newDaemon(t)
	ctx := context.Background()
	id := d.startNew(d.run("a"), "c", "/stubborn")
	gone, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := d.StopContainer(gone, id, 300*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	d.close()
	d = d.daemon(nil)
	defer d.close()
	d.reset()
	began := time.Now()
	if err := d.StopContainer(ctx, id, time.Hour); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("took %v", took)
	}
	if d.did("init.Signal") > 0 {
		t.Error("a second signal was sent")
	}
	d.removeAll()
}

// A stop that the daemon's end interrupts has not succeeded: the container runs on.
func TestStopInterrupted(t *testing.T) {
	d := newDaemon(t)
	id := d.startNew(d.run("a"), "c", "/stubborn")
	result := make(chan error)
	go func() { result <- d.StopContainer(context.Background(), id, time.Hour) }()
	for ops := d.Operations(); len(ops) == 0 || ops[0].Step != "wait for the grace period"; ops = d.Operations() {
		time.Sleep(time.Millisecond)
	}
	d.close()
	if err := <-result; !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	d = d.daemon(nil)
	defer d.close()
	d.removeAll()
}

// A container that is started while its removal waits for the start is killed as any other.
func TestRemoveWhileStarting(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	id := d.create(d.run("a"), "c", "/stubborn")
	c, err := d.findContainer(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.turn.take(ctx); err != nil {
		t.Fatal(err)
	}
	result := make(chan error)
	go func() { result <- d.RemoveContainer(ctx, id) }()
	for ops := d.Operations(); len(ops) == 0 || ops[0].Step != "wait for its turn"; ops = d.Operations() {
		time.Sleep(time.Millisecond)
	}
	i, err := c.pod.living()
	if err != nil {
		t.Fatal(err)
	}
	pid, at, err := i.Start(ctx, id)
	if err == nil {
		err = d.changeContainer(ctx, c, containerStarted, should, func(s *containerState) { s.PID, s.StartedAt = pid, at })
	}
	if err != nil {
		t.Fatal(err)
	}
	c.turn.pass()
	if err := <-result; err != nil {
		t.Error(err)
	}
	d.removeAll()
}

// C-58: a process that does not die fails the stop, which can be repeated, and everything else goes on.
func TestStopUnkillable(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	id := d.startNew(pod, "c", "/stubborn")
	set := func(stubborn bool) {
		d.world.mu.Lock()
		defer d.world.mu.Unlock()
		d.cgroups[d.mustContainer(id).CgroupPath].stubborn = stubborn
	}
	set(true)
	for range 3 {
		if err := d.StopContainer(ctx, id, 0); !errors.Is(err, cgroup.ErrBusy) {
			t.Errorf("got %v, want ErrBusy", err)
		}
	}
	if err := d.StopPod(ctx, pod); !errors.Is(err, cgroup.ErrBusy) {
		t.Errorf("got %v, want ErrBusy", err)
	}
	if p, c := d.mustPod(pod), d.mustContainer(id); p.State != PodNotReady || c.State != ContainerRunning {
		t.Errorf("got %+v, %+v", p, c)
	}
	set(false)
	d.removeAll()
}

func TestStopPodEndsCreate(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	held := make(chan struct{})
	d.hook("init.Create", func(ctx context.Context) error { close(held); <-ctx.Done(); return context.Cause(ctx) })
	created := make(chan error)
	go func() {
		_, err := d.CreateContainer(ctx, pod, containerConfig("c"))
		created <- err
	}()
	<-held
	if err := d.StopPod(ctx, pod); err != nil {
		t.Error(err)
	}
	if err := <-created; !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "the pod is being stopped") {
		t.Errorf("got %v", err)
	}
	d.removeAll()
}

func TestStopPodEndsContainers(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	running, created := d.startNew(pod, "r", "/stubborn"), d.create(pod, "c")
	if err := d.StopPod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	if c := d.mustContainer(running); c.State != ContainerExited || c.ExitCode != 137 {
		t.Errorf("got %+v", c)
	}
	if c := d.mustContainer(created); c.State != ContainerExited || c.ExitCode != codeUnknown || c.Reason != reasonNotStarted {
		t.Errorf("got %+v", c)
	}
	if err := d.StartContainer(ctx, created); !errors.Is(err, ErrState) {
		t.Errorf("got %v, want ErrState", err)
	}
	d.removeAll()
}

// C-54
func TestInitDies(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	pod, other := d.run("a"), d.run("b")
	running, created, exited := d.startNew(pod, "r"), d.create(pod, "c"), d.startNew(pod, "e")
	d.initOf(pod).exit(exited, 3)
	d.ended(exited)
	d.initOf(pod).die()
	if c := d.ended(running); c.ExitCode != 137 || c.Reason != reasonInitDied || c.Message == "" {
		t.Errorf("got %+v", c)
	}
	if c := d.ended(created); c.ExitCode != codeUnknown || c.Reason != reasonInitDied {
		t.Errorf("got %+v", c)
	}
	if c := d.mustContainer(exited); c.ExitCode != 3 || c.Reason != reasonError {
		t.Errorf("got %+v", c)
	}
	if p := d.mustPod(pod); p.State != PodNotReady || p.Reason != reasonInitDied {
		t.Errorf("got %+v", p)
	}
	if p := d.mustPod(other); p.State != PodReady {
		t.Errorf("got %+v", p)
	}
	if _, err := d.CreateContainer(context.Background(), pod, containerConfig("late")); !errors.Is(err, ErrState) {
		t.Errorf("got %v, want ErrState", err)
	}
	d.removeAll()
}

// C-55: a pod init that does not answer any more is not needed to get rid of its pod.
func TestInitHangs(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	id := d.startNew(pod, "c")
	hang := func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) }
	d.hook("init.Signal", hang)
	d.hook("init.Remove", hang)
	// Its exits do not come either.
	d.world.mu.Lock()
	d.inits[d.mustPod(pod).InitPID].mute = true
	d.world.mu.Unlock()
	if err := d.StopContainer(ctx, id, 0); err != nil {
		t.Error(err)
	}
	if c := d.mustContainer(id); c.State != ContainerExited || c.ExitCode != 137 {
		t.Errorf("got %+v", c)
	}
	d.hook("init.Remove", nil)
	d.removeAll()
}

// What lists and shows takes no part in what a sick pod waits for.
func TestListNeverBlocks(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	pod := d.run("a")
	id := d.startNew(pod, "c")
	release := make(chan struct{})
	var held sync.WaitGroup
	held.Add(3)
	for _, name := range []string{"cgroup.Kill", "network.Setup", "init.Create"} {
		var once sync.Once
		d.hook(name, func(context.Context) error { once.Do(held.Done); <-release; return nil })
	}
	var work sync.WaitGroup
	work.Go(func() { _ = d.StopContainer(ctx, id, 0) })
	work.Go(func() { _, _ = d.RunPod(ctx, podConfig("b")) })
	work.Go(func() { _, _ = d.CreateContainer(ctx, pod, containerConfig("d")) })
	held.Wait()
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.mustPod(pod)
		d.mustContainer(id)
		if len(d.Pods()) != 1 || len(d.Containers()) != 1 || len(d.Operations()) != 3 {
			t.Errorf("got %v, %v, %v", d.Pods(), d.Containers(), d.Operations())
		}
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("List or Status waits for a sick pod")
	}
	close(release)
	work.Wait()
	d.removeAll()
}

func TestDrain(t *testing.T) {
	d := newDaemon(t)
	held, release := make(chan struct{}), make(chan struct{})
	d.hook("network.Setup", func(context.Context) error { close(held); <-release; return nil })
	result := make(chan error)
	go func() {
		_, err := d.RunPod(context.Background(), podConfig("a"))
		result <- err
	}()
	<-held
	short, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	d.Drain(short) // returns though something runs
	if _, err := d.RunPod(context.Background(), podConfig("b")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	close(release)
	d.Drain(context.Background())
	if err := <-result; err != nil {
		t.Error(err)
	}
	if len(d.Pods()) != 1 {
		t.Error("the pod was not finished")
	}
	d.hook("network.Setup", nil)
	d.close()
	d = d.daemon(nil)
	defer d.close()
	d.removeAll()
}

// What runs when the daemon drains is finished, with all that is part of it.
func TestDrainFinishes(t *testing.T) {
	d := newDaemon(t)
	pod := d.run("a")
	d.startNew(pod, "r", "/stubborn")
	d.create(pod, "c")
	draining := make(chan struct{})
	d.hook("cgroup.Kill", func(context.Context) error { <-draining; return nil })
	result := make(chan error)
	go func() { result <- d.RemovePod(context.Background(), pod) }()
	for ops := d.Operations(); len(ops) == 0 || ops[0].What != "remove pod"; ops = d.Operations() { // the first may still be the create
		time.Sleep(time.Millisecond)
	}
	short, cancel := context.WithCancel(context.Background())
	cancel()
	d.Drain(short)
	close(draining)
	if err := <-result; err != nil {
		t.Error(err)
	}
	d.close()
	if l := d.leftovers(); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
}

// A daemon that must end does not wait for what hangs: it is undone, or left to the next.
func TestCloseEndsOperations(t *testing.T) {
	d := newDaemon(t)
	held := make(chan struct{})
	d.hook("network.Setup", func(ctx context.Context) error { close(held); <-ctx.Done(); return context.Cause(ctx) })
	result := make(chan error)
	go func() {
		_, err := d.RunPod(context.Background(), podConfig("a"))
		result <- err
	}()
	<-held
	d.close()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if l := d.leftovers(); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
}

func TestNotRecovered(t *testing.T) {
	w := newWorld(t)
	m, err := NewManager(w.config())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ctx := context.Background()
	_, run := m.RunPod(ctx, podConfig("a"))
	_, status := m.Pod("abc")
	for what, err := range map[string]error{"RunPod": run, "Pod": status, "StopPod": m.StopPod(ctx, "abc"), "RemoveContainer": m.RemoveContainer(ctx, "abc")} {
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: got %v, want ErrUnavailable", what, err)
		}
	}
}

func TestUpdate(t *testing.T) {
	d := newDaemon(t)
	ctx := context.Background()
	id := d.startNew(d.run("a"), "c")
	limit := func(n int64) *specs.LinuxResources {
		return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &n}}
	}
	shares := uint64(512)
	if err := d.UpdateContainer(ctx, id, limit(1<<20), nil); err != nil {
		t.Fatal(err)
	}
	if err := d.UpdateContainer(ctx, id, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}}, nil); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		r := d.mustContainer(id).Spec.Linux.Resources
		if r.Memory == nil || *r.Memory.Limit != 1<<20 || r.CPU == nil || *r.CPU.Shares != 512 {
			t.Errorf("got spec %+v", r)
		}
		if a, err := d.Resources(id); err != nil || a.MemoryLimit != 1<<20 {
			t.Errorf("got %+v, %v", a, err)
		}
	}
	check()
	// All or nothing: what cannot be recorded is taken back.
	d.hook("store.writeConfig", func(context.Context) error { return unix.ENOSPC })
	if err := d.UpdateContainer(ctx, id, limit(2<<20), nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want ENOSPC", err)
	}
	quota := int64(50000) // it has none
	if err := d.UpdateContainer(ctx, id, &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota}}, nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want ENOSPC", err)
	}
	d.world.mu.Lock()
	if cpu := d.cgroups[d.mustContainer(id).CgroupPath].resources.CPU; cpu.Quota != nil {
		t.Errorf("a quota of %d that was refused is applied", *cpu.Quota)
	}
	d.world.mu.Unlock()
	check()
	d.hook("store.writeConfig", nil)
	d.hook("cgroup.Update", func(context.Context) error { return cgroup.ErrInvalid })
	if err := d.UpdateContainer(ctx, id, limit(2<<20), nil); !errors.Is(err, cgroup.ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
	check()
	d.hook("cgroup.Update", nil)
	adj := 2000
	if err := d.UpdateContainer(ctx, id, nil, &adj); !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
	d.close()
	d = d.daemon(nil)
	defer d.close()
	check()
	d.removeAll()
}

func TestExecSync(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	id := d.startNew(d.run("a"), "c")
	r, err := d.ExecSync(ctx, id, []string{"echo"}, time.Minute)
	if err != nil || string(r.Stdout) != "out" || string(r.Stderr) != "err" || r.ExitCode != 3 {
		t.Errorf("echo: got %+v, %v", r, err)
	}
	// SEC-90: the rest is read and dropped.
	if r, err = d.ExecSync(ctx, id, []string{"flood"}, time.Minute); err != nil || len(r.Stdout) != maxExecOutput || len(r.Stderr) != 0 {
		t.Errorf("flood: got %v", err)
	}
	if _, err := d.ExecSync(ctx, id, []string{"hang"}, 20*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "timed out after 20ms") {
		t.Errorf("hang: got %v", err)
	}
	gone, cancel := context.WithCancel(ctx)
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := d.ExecSync(gone, id, []string{"hang"}, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("hang, and the caller leaves: got %v", err)
	}
	if _, err := d.ExecSync(ctx, id, []string{"missing"}, 0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("missing: got %v", err)
	}
	// SEC-93
	began := time.Now()
	r, err = d.ExecSync(ctx, id, []string{"background"}, time.Minute)
	if err != nil || string(r.Stdout) != "parent" {
		t.Errorf("background: got %+v, %v", r, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("background: took %v", took)
	}
	d.removeAll()
}

func TestReopenLog(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	cfg := podConfig("a")
	cfg.LogDirectory = filepath.Join(d.dir, "logs")
	pod, err := d.RunPod(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	c := containerConfig("c")
	c.LogPath = "c/0.log"
	id, err := d.CreateContainer(ctx, pod, c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cfg.LogDirectory, "c/0.log")
	if got := d.mustContainer(id).LogPath; got != path {
		t.Errorf("got log path %q, want %q", got, path)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o640 {
		t.Errorf("got %v, %v", st, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// Not running: an error, and no file.
	if err := d.ReopenLog(ctx, id); !errors.Is(err, ErrState) {
		t.Errorf("got %v, want ErrState", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want no file", err)
	}
	if err := d.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := d.ReopenLog(ctx, id); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	d.removeAll()
}

// Pods that name one cgroup_parent (crictl's may) go in any order: the one that made it does not wait for the others.
func TestPodCgroupShared(t *testing.T) {
	d := newDaemon(t)
	defer d.close()
	ctx := context.Background()
	var pods []string
	for _, name := range []string{"a", "b"} {
		cfg := podConfig(name)
		cfg.CgroupParent = "/kubepods/shared"
		id, err := d.RunPod(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		d.startNew(id, "c")
		pods = append(pods, id)
	}
	for _, id := range pods {
		if err := errors.Join(d.StopPod(ctx, id), d.RemovePod(ctx, id)); err != nil {
			t.Error(err)
		}
	}
	if l := d.leftovers(); len(l) > 0 {
		t.Errorf("left over: %v", l)
	}
}

func TestPodCgroupOfKubelet(t *testing.T) {
	for _, exists := range []bool{true, false} {
		d := newDaemon(t)
		if exists {
			d.cgroups["/kubepods/pod1"] = &fakeCgroupDir{}
		}
		cfg := podConfig("a")
		cfg.CgroupParent = "/kubepods/pod1"
		if _, err := d.RunPod(context.Background(), cfg); err != nil {
			t.Fatal(err)
		}
		d.removeAll()
		if got := d.cgroups["/kubepods/pod1"] != nil; got != exists {
			t.Errorf("existed before: %v, exists after: %v", exists, got)
		}
		d.close()
	}
}
