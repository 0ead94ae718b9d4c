package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/leak"
)

// need is the suite's crispd.
func need(t *testing.T) *world {
	t.Helper()
	if suite == nil {
		t.Skip("needs root: drives a real crispd")
	}
	return suite
}

// own is a crispd for this test alone, to be stopped and killed.
func own(t *testing.T, args ...string) *world {
	t.Helper()
	s := need(t)
	w, err := newWorld(s.crispd, s.certs, s.registry, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.LastLog())
		}
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) podConfig(name string) *runtimeapi.PodSandboxConfig {
	w.next++
	uid := fmt.Sprintf("%s-%d", w.Tag, w.next)
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: uid, Namespace: "crisp-test"},
		Hostname: name, LogDirectory: filepath.Join(w.LogDir, "crisp-test_"+name+"_"+uid),
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

// containerConfig runs payload with args. The zero NamespaceMode is POD; the
// kubelet says CONTAINER unless the user shares the pod's processes.
func (w *world) containerConfig(name string, args ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: w.image, UserSpecifiedImage: payloadRef},
		Command:  []string{"/payload"}, Args: args, LogPath: name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

type (
	editPod       = func(*runtimeapi.PodSandboxConfig)
	editContainer = func(*runtimeapi.ContainerConfig)
)

// pod is a pod of the test, removed at its end.
type pod struct {
	t    *testing.T
	w    *world
	id   string
	cfg  *runtimeapi.PodSandboxConfig
	made *int // containers
}

func (w *world) adopt(t *testing.T, id string, cfg *runtimeapi.PodSandboxConfig) *pod {
	return &pod{t: t, w: w, id: id, cfg: cfg, made: new(int)}
}

// pod runs a pod.
func (w *world) pod(t *testing.T, edits ...editPod) *pod {
	t.Helper()
	cfg := w.podConfig("p")
	for _, e := range edits {
		e(cfg)
	}
	id, err := w.rt.RunPodSandbox(t.Context(), cfg, "")
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	p := w.adopt(t, id, cfg)
	t.Cleanup(p.remove)
	return p
}

// on is the pod in a subtest: what fails there must not end the test around it.
func (p *pod) on(t *testing.T) *pod {
	q := *p
	q.t = t
	return &q
}

// remove stops and removes the pod and its logs. It may be called twice.
func (p *pod) remove() {
	p.t.Helper()
	if p.w.rt == nil {
		return // the test ended crispd; its node goes as a whole
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the test's may have ended
	defer cancel()
	if err := p.w.rt.StopPodSandbox(ctx, p.id); err != nil {
		p.t.Errorf("StopPodSandbox: %v", err)
	}
	if err := p.w.rt.RemovePodSandbox(ctx, p.id); err != nil {
		p.t.Errorf("RemovePodSandbox: %v", err)
	}
	if err := os.RemoveAll(p.cfg.LogDirectory); err != nil {
		p.t.Error(err)
	}
}

// used has had a container: what a pod makes for its first one is there and stays.
func (p *pod) used() *pod {
	p.t.Helper()
	c := p.run([]string{"true"})
	c.wait()
	c.remove()
	return p
}

func (p *pod) status() *runtimeapi.PodSandboxStatus {
	p.t.Helper()
	r, err := p.w.rt.PodSandboxStatus(p.t.Context(), p.id, false)
	if err != nil {
		p.t.Fatalf("PodSandboxStatus: %v", err)
	}
	return r.Status
}

// ip is the pod's primary address, v6 the additional one.
func (p *pod) ip() string { p.t.Helper(); return p.status().Network.Ip }
func (p *pod) v6() string {
	p.t.Helper()
	for _, ip := range p.status().Network.AdditionalIps {
		if strings.Contains(ip.Ip, ":") {
			return ip.Ip
		}
	}
	p.t.Fatal("the pod has no IPv6 address")
	return ""
}

type container struct {
	t   *testing.T
	p   *pod
	id  string
	cfg *runtimeapi.ContainerConfig
}

func (p *pod) config(args []string, edits ...editContainer) *runtimeapi.ContainerConfig {
	*p.made++
	cfg := p.w.containerConfig("c"+strconv.Itoa(*p.made), args...)
	for _, e := range edits {
		e(cfg)
	}
	return cfg
}

func (p *pod) tryCreate(args []string, edits ...editContainer) (*container, error) {
	cfg := p.config(args, edits...)
	id, err := p.w.rt.CreateContainer(p.t.Context(), p.id, cfg, p.cfg)
	return &container{t: p.t, p: p, id: id, cfg: cfg}, err
}

// create makes a container that runs payload with args, not started.
func (p *pod) create(args []string, edits ...editContainer) *container {
	p.t.Helper()
	c, err := p.tryCreate(args, edits...)
	if err != nil {
		p.t.Fatalf("CreateContainer: %v", err)
	}
	return c
}

// run makes and starts a container.
func (p *pod) run(args []string, edits ...editContainer) *container {
	p.t.Helper()
	c := p.create(args, edits...)
	c.start()
	return c
}

// output runs a container to its end and returns its stdout. It wants exit code 0.
func (p *pod) output(args []string, edits ...editContainer) string {
	p.t.Helper()
	c := p.run(args, edits...)
	if st := c.wait(); st.ExitCode != 0 {
		p.t.Fatalf("%v: exit code %d (%s), stderr %q", args, st.ExitCode, st.Reason, c.output("stderr"))
	}
	return c.output("stdout")
}

func (c *container) start() {
	c.t.Helper()
	if err := c.p.w.rt.StartContainer(c.t.Context(), c.id); err != nil {
		c.t.Fatalf("StartContainer: %v", err)
	}
}

func (c *container) stop(grace int64) {
	c.t.Helper()
	if err := c.p.w.rt.StopContainer(c.t.Context(), c.id, grace); err != nil {
		c.t.Fatalf("StopContainer: %v", err)
	}
}

func (c *container) remove() {
	c.t.Helper()
	if err := c.p.w.rt.RemoveContainer(c.t.Context(), c.id); err != nil {
		c.t.Fatalf("RemoveContainer: %v", err)
	}
}

func (c *container) status() *runtimeapi.ContainerStatus {
	c.t.Helper()
	r, err := c.p.w.rt.ContainerStatus(c.t.Context(), c.id, false)
	if err != nil {
		c.t.Fatalf("ContainerStatus: %v", err)
	}
	return r.Status
}

// info is the verbose status' pid of the container's first process.
func (c *container) pid() int {
	c.t.Helper()
	// Any runtime's: the only process of the container's own cgroup whose parent is not in it
	// is its first; NSpid's last number says 1 when it has a PID namespace of its own.
	for _, pid := range c.pids() {
		if ns := procField(pid, "NSpid"); len(ns) > 1 && ns[len(ns)-1] == "1" {
			return pid
		}
	}
	c.t.Fatalf("container %s has no process that is PID 1 of a namespace", c.id)
	return 0
}

// procField is a field of /proc/PID/status, nil when the process is gone.
func procField(pid int, name string) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil
	}
	return statusField(string(text), name)
}

func statusField(text, name string) []string {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Fields(value)
		}
	}
	return nil
}

// cgroups are the container's directories, one in each hierarchy: those named by its id, outermost.
func (c *container) cgroups() []string {
	c.t.Helper()
	var dirs []string
	for _, dir := range c.p.w.CgroupDirs() {
		if strings.Contains(filepath.Base(dir), c.id) {
			dirs = append(dirs, dir)
		}
	}
	if len(dirs) == 0 {
		c.t.Fatalf("no cgroup is named after container %s", c.id)
	}
	return dirs
}

// cgroupFile is the content of a file in the container's cgroup, in whichever hierarchy has it.
func (c *container) cgroupFile(names ...string) string {
	c.t.Helper()
	for _, dir := range c.cgroups() {
		for _, name := range names {
			if text, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				return strings.TrimSpace(string(text))
			}
		}
	}
	c.t.Fatalf("none of %v in %v", names, c.cgroups())
	return ""
}

// pids are the processes in the container's cgroups, sub-cgroups too.
func (c *container) pids() []int {
	c.t.Helper()
	seen := map[int]bool{}
	for _, dir := range c.cgroups() {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil // an exec's cgroup that went meanwhile
			}
			text, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for _, f := range strings.Fields(string(text)) {
				if pid, err := strconv.Atoi(f); err == nil {
					seen[pid] = true
				}
			}
			return nil
		})
		if err != nil {
			c.t.Fatal(err)
		}
	}
	var all []int
	for pid := range seen {
		all = append(all, pid)
	}
	slices.Sort(all)
	return all
}

// wait waits until the container has exited.
func (c *container) wait() *runtimeapi.ContainerStatus {
	c.t.Helper()
	var st *runtimeapi.ContainerStatus
	eventually(c.t, "container exits", func() bool {
		st = c.status()
		return st.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return st
}

// execSync is the raw call, bounded: it must never hang, whatever runs.
func (w *world) execSync(t *testing.T, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return w.CRI.ExecSync(ctx, r)
}

// try runs payload in the container.
func (c *container) try(args ...string) (*runtimeapi.ExecSyncResponse, error) {
	return c.p.w.execSync(c.t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: append([]string{"/payload"}, args...), Timeout: 20})
}

// exec runs payload in the container and returns its stdout. It wants exit code 0.
func (c *container) exec(args ...string) string {
	c.t.Helper()
	r, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("exec %v: %v", args, err)
	}
	if r.ExitCode != 0 {
		c.t.Fatalf("exec %v: exit code %d, stderr %q", args, r.ExitCode, r.Stderr)
	}
	return string(r.Stdout)
}

// fails runs payload in the container, wants it to fail and returns its stderr.
func (c *container) fails(args ...string) string {
	c.t.Helper()
	r, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("exec %v: %v", args, err)
	}
	if r.ExitCode == 0 {
		c.t.Errorf("exec %v succeeded, want it to fail; stdout %q", args, r.Stdout)
	}
	return string(r.Stderr)
}

// logLine is one line of a CRI log: TIME STREAM TAG CONTENT.
type logLine struct {
	time, stream, tag, text string
}

func (c *container) logFile() string { return filepath.Join(c.p.cfg.LogDirectory, c.cfg.LogPath) }

func readLog(t *testing.T, path string) []logLine {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var lines []logLine
	for line := range bytes.Lines(data) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // being written
		}
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), " ", 4)
		if len(f) != 4 {
			t.Fatalf("%s: not a CRI log line: %q", path, line)
		}
		lines = append(lines, logLine{f[0], f[1], f[2], f[3]})
	}
	return lines
}

// output is what the container wrote to a stream, parts joined.
func (c *container) output(stream string) string {
	c.t.Helper()
	var b strings.Builder
	for _, l := range readLog(c.t, c.logFile()) {
		if l.stream != stream {
			continue
		}
		b.WriteString(l.text)
		if l.tag == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// says waits until the container has written text to its log.
func (c *container) says(text string) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("container says %q", text), func() bool {
		return strings.Contains(c.output("stdout"), text) || strings.Contains(c.output("stderr"), text)
	})
}

// eventually polls until done, for at most 15 s: what it waits for are effects
// of the kernel or of another process that nobody announces.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited 15 s for: %s", what)
		}
	}
}

// wantCode wants an error with a gRPC code and each text in it.
func wantCode(t *testing.T, err error, code codes.Code, texts ...string) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Errorf("got %v (%v), want code %v", got, err, code)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("got %q, want it to say %q", err, text)
		}
	}
}

// atRest is what is there when nothing of what went before is still on its way out: the same three times over.
func (w *world) atRest(t *testing.T) leak.Snapshot {
	t.Helper()
	var last leak.Snapshot
	same := 0
	eventually(t, "nothing changes any more", func() bool {
		now, err := w.scope().Take()
		if err != nil {
			t.Fatal(err)
		}
		if last != nil && len(leak.Compare(last, now)) == 0 {
			same++
		} else {
			same = 0
		}
		last = now
		return same == 3
	})
	return last
}

// leavesNothing runs do and wants everything to be as before.
func (w *world) leavesNothing(t *testing.T, do func()) {
	t.Helper()
	before := w.atRest(t)
	do()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	diff, err := w.scope().Settle(ctx, before)
	if err != nil {
		t.Fatal(err)
	}
	if len(diff) > 0 {
		t.Errorf("something is left:\n%s", leak.Format(diff, 20))
	}
}

// forge pushes an image of the test's own and pulls it; it is removed at the
// test's end. The payload binary is in it, unless the layers say otherwise.
func (w *world) forge(t *testing.T, name string, im images.Image) (id, ref string) {
	t.Helper()
	ref = w.push(t, name, im)
	id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
	if err != nil {
		t.Fatalf("PullImage: %v", err)
	}
	t.Cleanup(func() { w.rmi(t, id) }) // not by name: the next image of that name leaves this one without
	return id, ref
}

func (w *world) push(t *testing.T, name string, im images.Image) (ref string) {
	t.Helper()
	im.Names = []string{"forged/" + name + ":1"}
	im.OCI = true
	if err := im.Push(w.registry.Host); err != nil {
		t.Fatal(err)
	}
	return "registry.example/" + im.Names[0]
}

func (w *world) rmi(t *testing.T, ref string) {
	t.Helper()
	if w.im == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the test's has ended
	defer cancel()
	if err := w.im.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: ref}); err != nil {
		t.Errorf("RemoveImage: %v", err)
	}
}

// layers are the payload's, for forged images: accounts, then the binary.
func (w *world) layers(t *testing.T, more ...images.File) [][]images.File {
	t.Helper()
	base := images.Payload(filepath.Join(filepath.Dir(w.certs), "payload")).Layers
	return append(slices.Clone(base), more)
}

// withImage makes a container use a forged image.
func withImage(id string) editContainer {
	return func(c *runtimeapi.ContainerConfig) { c.Image = &runtimeapi.ImageSpec{Image: id} }
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func mustWrite(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}
