package cri

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

// The ids that this suite's pods with a user namespace have on the node.
const (
	firstID = 1 << 24
	idCount = 65536
)

// mappedTo is what the kubelet sends, for users and groups.
func mappedTo(first uint32) []*runtimeapi.IDMapping {
	return []*runtimeapi.IDMapping{{ContainerId: 0, HostId: first, Length: idCount}}
}

func usernsOf(first uint32) *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{Mode: nsPod, Uids: mappedTo(first), Gids: mappedTo(first)}
}

// mapped is a mount as the kubelet sends it for such a pod.
func mapped(m *runtimeapi.Mount) *runtimeapi.Mount { return mappedOf(firstID, m) }

func mappedOf(first uint32, m *runtimeapi.Mount) *runtimeapi.Mount {
	m.UidMappings, m.GidMappings = mappedTo(first), mappedTo(first)
	return m
}

// needUserns is need, on a node whose kernel can (Linux 6.3). On another, such a pod is refused with the reason.
func needUserns(t *testing.T) *world {
	t.Helper()
	w := need(t)
	st, err := w.rt.Status(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range st.RuntimeHandlers {
		if h.Name == "" && h.Features.GetUserNamespaces() {
			return w
		}
	}
	cfg := w.podConfig("refused")
	inUserns(firstID)(cfg)
	_, err = w.rt.RunPodSandbox(t.Context(), cfg, "")
	wantCode(t, err, codes.Unimplemented, "userns_options.mode")
	t.Skipf("this node has no user namespaces for pods: %v", err)
	return nil
}

func inUserns(first uint32) editPod {
	return func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = usernsOf(first)
	}
}

// usernsPod runs a pod with a user namespace of its own.
func (w *world) usernsPod(t *testing.T, edits ...editPod) *pod {
	t.Helper()
	return w.pod(t, append([]editPod{inUserns(firstID)}, edits...)...)
}

func wantHostOwner(t *testing.T, path string, uid, gid uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Errorf("%s: %v", path, err)
	} else if st.Uid != uid || st.Gid != gid {
		t.Errorf("%s belongs to %d:%d on the node, want %d:%d", path, st.Uid, st.Gid, uid, gid)
	}
}

func TestUsernsOwners(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t)
	volume, foreign, log := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "termination-log")
	mustWrite(t, log, "")
	mustWrite(t, volume+"/of-1000", "")
	if err := os.Lchown(volume+"/of-1000", 1000, 2000); err != nil {
		t.Fatal(err)
	}
	c := p.run([]string{"sleep"}, withMounts(
		mapped(&runtimeapi.Mount{HostPath: volume, ContainerPath: "/v"}),
		mapped(&runtimeapi.Mount{HostPath: log, ContainerPath: "/dev/termination-log"}),
		&runtimeapi.Mount{HostPath: foreign, ContainerPath: "/foreign"},
	))
	for path, want := range map[string]string{
		"/": "uid=0 gid=0", "/payload": "uid=0 gid=0", "/etc/hosts": "uid=0 gid=0", "/etc/resolv.conf": "uid=0 gid=0", "/etc/hostname": "uid=0 gid=0",
		"/dev": "uid=0 gid=0", "/dev/shm": "uid=0 gid=0", "/dev/null": "uid=0 gid=0", "/dev/pts": "uid=0 gid=0",
		"/proc/self/status": "uid=0 gid=0", "/proc/sys/net/ipv4/ip_forward": "uid=0 gid=0",
		"/v": "uid=0 gid=0", "/v/of-1000": "uid=1000 gid=2000", "/dev/termination-log": "uid=0 gid=0",
		// What the kubelet did not map belongs to nobody, and so does what is the node's.
		"/foreign": "uid=65534 gid=65534", "/sys": "uid=65534 gid=65534", "/proc/sys/kernel/core_pattern": "uid=65534 gid=65534",
		// So does this one's root, which the kernel makes with the IPC namespace, when the init is not yet root in there. It
		// is 1777, and what is made in it belongs to the maker.
		"/dev/mqueue": "uid=65534 gid=65534",
	} {
		if got := c.exec("stat", path); !strings.Contains(got, want+" ") {
			t.Errorf("got %q, want %s", got, want)
		}
	}
	for _, file := range []string{"uid_map", "gid_map"} {
		if got := strings.Fields(c.exec("cat", "/proc/self/"+file)); !slices.Equal(got, []string{"0", itoa(firstID), itoa(idCount)}) {
			t.Errorf("%s: got %v", file, got)
		}
	}
	c.exec("mkfile", "/v/made", "x", ",", "mkfile", "/dev/shm/made", "x", ",", "mkfile", "/dev/termination-log", "bye", ",", "mkfile", "/made", "x",
		",", "mkfile", "/etc/hosts", "x", ",", "touch", "/dev/mqueue/made")
	// The kubelet and other pods read it: it is as a container without a user namespace would have made it.
	wantHostOwner(t, volume+"/made", 0, 0)
	if got := readFile(t, log); got != "bye\n" {
		t.Errorf("termination log: got %q", got)
	}
	if msg := c.fails("mkfile", "/foreign/made", "x"); !strings.Contains(msg, "permission denied") {
		t.Errorf("a directory that is not mapped: got %q", msg)
	}
	// The status says what was asked for.
	if got := p.status().GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); !proto.Equal(got, usernsOf(firstID)) {
		t.Errorf("status: got %v", got)
	}
	for i, m := range c.status().Mounts {
		if want := c.cfg.Mounts[i]; !proto.Equal(m, want) {
			t.Errorf("status of mount %d: got %v, want %v", i, m, want)
		}
	}
}

// Two pods with ids of their own, and one without, hand each other files.
func TestUsernsVolumeOfSeveralPods(t *testing.T) {
	w := needUserns(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, first := range []uint32{firstID, firstID + idCount, 0} {
		var edits []editPod
		m := &runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"}
		if first > 0 {
			edits, m = append(edits, inUserns(first)), mappedOf(first, m)
		}
		p := w.pod(t, edits...)
		file := fmt.Sprintf("/v/%d", i)
		p.output([]string{"mkfile", file, "x"}, withMounts(m))
		if got := p.output([]string{"stat", "/v/0", file}, withMounts(m)); strings.Count(got, "uid=0 gid=0") != 2 {
			t.Errorf("pod at %d: got %q, want all to be root's", first, got)
		}
		wantHostOwner(t, dir+"/"+itoa(i), 0, 0)
	}
}

// The kubelet gives a volume of a pod with an fsGroup to that group, setgid, and the group to each process.
func TestUsernsGroups(t *testing.T) {
	w := needUserns(t)
	dir := t.TempDir()
	if err := os.Chown(dir, 0, 3000); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o775|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	c := w.usernsPod(t).run([]string{"id", ",", "mkfile", "/v/f", "x", ",", "sleep"}, asUser(1000), withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsGroup, s.SupplementalGroups = uid(1001), []int64{3000}
	}), withMounts(mapped(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"})))
	c.says("uid=1000 euid=1000 gid=1001 egid=1001 groups=1001 3000")
	eventually(t, "the file is there", func() bool { _, err := os.Stat(dir + "/f"); return err == nil })
	wantHostOwner(t, dir+"/f", 1000, 3000)
	if got := procField(c.pid(), "Uid"); len(got) == 0 || got[0] != itoa(firstID+1000) {
		t.Errorf("on the node: got user %v", got)
	}
	if got := c.status().GetUser().GetLinux(); got.GetUid() != 1000 || got.GetGid() != 1001 {
		t.Errorf("status: got %v", got)
	}
}

func TestUsernsNamespaces(t *testing.T) {
	w := needUserns(t)
	host := namespaces(t, os.Getpid())
	for _, mode := range []runtimeapi.NamespaceMode{nsContainer, nsPod} {
		t.Run(mode.String(), func(t *testing.T) {
			podOptions, options := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = mode })
			p := w.usernsPod(t, podOptions)
			a := p.run([]string{"sleep"}, options)
			b := p.run([]string{"sleep"}, options)
			debug := p.run([]string{"sleep"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
				s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = nsTarget, a.id
			}))
			of := namespaces(t, a.anyPID())
			for name, c := range map[string]*container{"another container": b, "one for debugging": debug} {
				for _, ns := range []string{"user", "net", "ipc", "uts"} {
					if got := namespaces(t, c.anyPID())[ns]; got != of[ns] {
						t.Errorf("%s: %s: got %s, want the first one's %s", name, ns, got, of[ns])
					}
				}
			}
			for ns, got := range of {
				if got == host[ns] {
					t.Errorf("%s is the node's", ns)
				}
			}
			// The procfs that it sees is that of its own processes.
			if got := debug.exec("ps"); !strings.Contains(got, "payload sleep") {
				t.Errorf("the target's processes: got %q", got)
			}
			for _, c := range []*container{a, b, debug} {
				for line := range strings.Lines(c.exec("cgroup")) {
					if !strings.HasSuffix(strings.TrimSpace(line), ":/") && !strings.Contains(line, ":/exec-") {
						t.Errorf("got cgroup %q, want it to be the root of the container's view", line)
					}
				}
			}
		})
	}
}

// inCgroups checks that a process is in the container's cgroup in each hierarchy, or below.
func (c *container) inCgroups(pid int) {
	c.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		c.t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, c.id) {
			n++
		}
	}
	if n != len(c.cgroups()) {
		c.t.Errorf("process %d is in %d of the %d cgroups of its container:\n%s", pid, n, len(c.cgroups()), text)
	}
}

// SEC-46 (CVE-2025-47291): limits hold for pods with a user namespace, of containers and of what is exec'd in them.
func TestUsernsCgroups(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t)
	c := p.run([]string{"fork", "2", ",", "oom", "16", ",", "sleep"}, withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 256 * mib, CpuShares: 512}))
	c.says("touched")
	pids := c.pids()
	if len(pids) != 3 {
		t.Errorf("got processes %v in its cgroups, want 3", pids)
	}
	for _, pid := range pids {
		c.inCgroups(pid)
	}
	st, err := w.rt.ContainerStats(t.Context(), c.id)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.GetMemory().GetWorkingSetBytes().GetValue(); got < 16*mib {
		t.Errorf("memory: got %d bytes, want 16 MiB at least", got)
	}
	if got := st.GetCpu().GetUsageCoreNanoSeconds().GetValue(); got == 0 {
		t.Error("got no CPU time")
	}
	if got := p.stats().GetLinux().GetNetwork().GetDefaultInterface().GetName(); got != "eth0" {
		t.Errorf("the pod's interface: got %q", got)
	}

	// An exec'd one: it is in a cgroup of its own below, whose end is its end.
	started := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		close(started)
		r, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/payload", "fork", "3", ",", "sleep"}, Timeout: 2})
		if err == nil {
			t.Errorf("got %v, want a time-out", r)
		}
	})
	<-started
	eventually(t, "the exec'd processes are there", func() bool { return len(c.pids()) == 7 })
	for _, pid := range c.pids() {
		c.inCgroups(pid)
	}
	wg.Wait()
	if got := c.pids(); !slices.Equal(got, pids) {
		t.Errorf("after the time-out: got %v, want %v", got, pids)
	}
	if st := p.run([]string{"oom"}, withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 * mib})).wait(); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("got %q, %d; want OOMKilled, 137", st.Reason, st.ExitCode)
	}
	if r, err := c.try("oom"); err != nil || r.ExitCode != 137 {
		t.Errorf("an exec'd process beyond the container's limit: got %v, %v, want it killed", r, err)
	}
	if err := w.rt.UpdateContainerResources(t.Context(), c.id, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{CpuShares: 300}}); err != nil {
		t.Errorf("update: %v", err)
	}
}

func TestUsernsExec(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t)
	c := p.run([]string{"sleep"})
	if got := c.exec("id"); !strings.HasPrefix(got, "uid=0 euid=0 gid=0 egid=0") {
		t.Errorf("got %q", got)
	}
	// Nothing of crisp's comes along, neither what joined the cgroup nor anything else.
	for line := range strings.Lines(c.exec("fds")) {
		if n, target, _ := strings.Cut(strings.TrimSpace(line), " "); n > "2" || strings.Contains(target, "cgroup") {
			t.Errorf("an exec'd process has descriptor %s: %s", n, target)
		}
	}
	if got := p.output([]string{"fds"}); strings.Contains(got, "cgroup") || strings.Count(got, "\n") > 3 {
		t.Errorf("the container's process has descriptors\n%s", got)
	}
	for range 10 {
		c.exec("true")
	}
	for _, dir := range c.cgroups() {
		if left, err := filepath.Glob(dir + "/exec-*"); err != nil || len(left) > 0 {
			t.Errorf("cgroups of what was exec'd are left: %v, %v", left, err)
		}
	}
}

func TestUsernsStreaming(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t)
	tty := p.run([]string{"stat", "/dev/console", ",", "stdin"}, func(c *runtimeapi.ContainerConfig) { c.Tty, c.Stdin = true, true })
	tty.says("/dev/console")
	pipes := p.run([]string{"stdin"}, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
	eachTransport(t, func(t *testing.T, cl client) {
		in, typing := io.Pipe()
		var out output
		o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: true}
		ended := make(chan error, 1)
		go func() {
			ended <- cl.executor(t, tty.execURL(t, o, "id", ",", "stat", "/proc/self/fd/0", ",", "stdin")).StreamWithContext(deadline(t), o)
		}()
		out.says(t, "uid=0")
		if _, err := typing.Write([]byte("typed\r\x04")); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Errorf("exec with a terminal: %v", err)
		}
		if got := out.String(); strings.Count(got, "typed") != 2 { // the terminal's echo, and what was read
			t.Errorf("exec with a terminal: got %q", got)
		}

		for name, c := range map[string]*container{"a terminal": tty.on(t), "pipes": pipes.on(t)} {
			in, typing := io.Pipe()
			var out output
			o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: name == "a terminal"}
			ended := make(chan error, 1)
			go func() { ended <- cl.executor(t, c.attachURL(t, o)).StreamWithContext(deadline(t), o) }()
			if _, err := typing.Write([]byte("attached " + cl.transport + "\n")); err != nil {
				t.Fatal(err)
			}
			out.says(t, "attached "+cl.transport)
			if err := typing.Close(); err != nil {
				t.Fatal(err)
			}
			if name == "pipes" {
				continue // it ends with the container
			}
		}
	})
}

func TestUsernsNetwork(t *testing.T) {
	w := needUserns(t)
	port := freePort(t)
	p := w.usernsPod(t, withPorts(&runtimeapi.PortMapping{ContainerPort: 80, HostPort: port}))
	// A port below 1024 by a user without any capability.
	server := p.run([]string{"http", ":80"}, asUser(1000))
	server.says("listening")
	for _, address := range []string{p.ip() + ":80", "127.0.0.1:" + itoa(int(port))} {
		if got, err := get(t, address); err != nil || got != p.cfg.Hostname {
			t.Errorf("%s: got %q, %v", address, got, err)
		}
	}
	c := p.run([]string{"sleep"})
	if got := c.exec("get", "http://"+p.ip()+":80/hostname"); strings.TrimSpace(got) != p.cfg.Hostname {
		t.Errorf("from a container: got %q", got)
	}
}

func TestUsernsSysctls(t *testing.T) {
	w := needUserns(t)
	host := readFile(t, "/proc/sys/kernel/domainname")
	asked := map[string]string{
		"net.ipv4.ip_local_port_range": "2000 3000", "kernel.shm_rmid_forced": "1", "kernel.msgmax": "9000",
		"fs.mqueue.msg_max": "17", "kernel.domainname": "userns.example", "user.max_net_namespaces": "3",
	}
	c := w.usernsPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = asked }).run([]string{"sleep"})
	for key, want := range asked {
		if got := strings.Join(strings.Fields(c.exec("cat", "/proc/sys/"+strings.ReplaceAll(key, ".", "/"))), " "); got != want {
			t.Errorf("%s: got %q, want %q", key, got, want)
		}
	}
	// The default, as far as there are groups.
	if got := strings.Fields(c.exec("cat", "/proc/sys/net/ipv4/ping_group_range")); !slices.Equal(got, []string{"0", "65535"}) {
		t.Errorf("ping_group_range: got %v", got)
	}
	if got := readFile(t, "/proc/sys/kernel/domainname"); got != host {
		t.Errorf("the node's domainname became %q", got)
	}
}

func TestUsernsDevices(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t)
	c := p.run([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{
			{HostPath: "/dev/zero", ContainerPath: "/dev/sub/mine", Permissions: "rw"},
			{HostPath: "/dev/full", ContainerPath: "/deep/down", Permissions: "rwm"},
			{HostPath: "/dev/null", ContainerPath: "/dev/zero", Permissions: "rw"},
		}
	})
	for path, want := range map[string]string{
		"/dev/sub/mine": "rdev=1:5", "/deep/down": "rdev=1:7", "/dev/zero": "rdev=1:3", "/dev/null": "rdev=1:3", "/dev/full": "rdev=1:7",
		"/dev/random": "rdev=1:8", "/dev/urandom": "rdev=1:9", "/dev/tty": "rdev=5:0",
	} {
		if got := c.exec("stat", path); !strings.Contains(got, want) || !strings.Contains(got, "mode=020666 uid=0 gid=0") {
			t.Errorf("got %q, want %s and root's", got, want)
		}
	}
	c.exec("cat", "/dev/zero", "/dev/null", ",", "mkfile", "/dev/null", "x", ",", "mkfile", "/dev/sub/mine", "x")
	if msg := c.fails("mkfile", "/deep/down", "x"); !strings.Contains(msg, "no space left") {
		t.Errorf("/deep/down: got %q, want what /dev/full says", msg)
	}
	if msg := c.fails("mknod", "/dev/made", "1", "3"); !strings.Contains(msg, "not permitted") {
		t.Errorf("mknod: got %q", msg)
	}
	if got := p.output([]string{"stat", "/dev/full"}); !strings.Contains(got, "rdev=1:7") {
		t.Errorf("another container: got %q", got)
	}
}

// A privileged container is privileged over its pod: it has every capability there, and no more of the node than any of the node's users.
func TestUsernsPrivileged(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t, privilegedPod)
	dir := t.TempDir()
	c := p.run([]string{"sleep"}, privilegedContainer, withMounts(mapped(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"})))
	if got := statusField(c.exec("status"), "CapEff"); len(got) != 1 || got[0] != fmt.Sprintf("%016x", allCaps(t)) {
		t.Errorf("capabilities: got %v", got)
	}
	c.exec("mkdir", "/m", ",", "mount-tmpfs", "/m", ",", "mkfile", "/m/x", "y")
	// The host's own nodes: the public ones are of use, the disks are not.
	if got := c.exec("stat", "/dev/zero"); !strings.Contains(got, "uid=0") {
		t.Errorf("got %q", got)
	}
	if _, err := os.Stat("/dev/kmsg"); err == nil {
		if got := c.exec("stat", "/dev/kmsg"); !strings.Contains(got, "uid=65534") {
			t.Errorf("got %q, want the node's device to be nobody's", got)
		}
	}
	if msg := c.fails("mkfile", "/dev/kmsg", "x"); !strings.Contains(msg, "permission denied") {
		t.Errorf("write to the kernel's log: got %q", msg)
	}
	c.exec("true")
	for line := range strings.Lines(c.exec("cgroup")) {
		if strings.Contains(line, c.id) {
			t.Errorf("got cgroup %q: a view of the node's", line)
		}
	}
}

// SEC-18 and what else root does to its node, by a container that has all the rights one can ask for.
func TestUsernsHasNoPowerOverTheNode(t *testing.T) {
	w := needUserns(t)
	secret := t.TempDir()
	mustWrite(t, secret+"/dir/secret", "the node's\n")
	for _, mode := range []struct {
		path string
		mode os.FileMode
	}{{secret + "/dir/secret", 0o600}, {secret + "/dir", 0o700}, {secret, 0o755}} {
		if err := os.Chmod(mode.path, mode.mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name  string
		pod   []editPod
		edits []editContainer
	}{
		{"plain", nil, nil},
		{"all capabilities", nil, []editContainer{withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}
		})}},
		{"privileged", []editPod{privilegedPod}, []editContainer{privilegedContainer}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := w.usernsPod(t, tt.pod...)
			c := p.run([]string{"sleep"}, append(tt.edits, withMounts(&runtimeapi.Mount{HostPath: secret, ContainerPath: "/node"}))...)
			for _, do := range [][]string{
				{"cat", "/node/dir/secret"}, {"mkfile", "/node/x", "x"}, {"rm", "/node/dir"}, {"mknod", "/node-device", "8", "0"},
				{"mkfile", "/proc/sys/kernel/core_pattern", "x"}, {"mkfile", "/proc/sys/vm/drop_caches", "1"}, {"mkfile", "/proc/sysrq-trigger", "h"},
				{"mkfile", "/sys/kernel/uevent_helper", "x"},
			} {
				c.fails(do...)
			}
			// On v1 and hybrid nodes /sys/fs/cgroup itself is a directory of the container's, with a view of each hierarchy.
			views := []string{"/sys/fs/cgroup"}
			if !v2(c) {
				views = strings.Fields("/sys/fs/cgroup/" + strings.ReplaceAll(strings.TrimSpace(c.exec("ls", "/sys/fs/cgroup")), "\n", " /sys/fs/cgroup/"))
			}
			for _, dir := range views {
				c.fails("mkdir", dir+"/x")
				c.fails("mkfile", dir+"/cgroup.procs", "0")
			}
			// Only its own processes are there, and the node's cannot be reached by number.
			if got := strings.Count(c.exec("ps"), "\n"); got != 2 {
				t.Errorf("it sees %d processes, want 2", got)
			}
			if got := procField(c.pid(), "Uid"); len(got) == 0 || got[0] != itoa(firstID) {
				t.Errorf("on the node it is user %v, want %d", got, firstID)
			}
			if got := readFile(t, secret+"/dir/secret"); got != "the node's\n" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// Layers are mapped, whoever their files belong to; what is written goes to the writable layer with the pod's ids.
func TestUsernsImageOfForeignFiles(t *testing.T) {
	w := needUserns(t)
	id, _ := w.forge(t, "owners", images.Image{Layers: w.layers(t,
		images.File{Name: "of-1000", Text: "1\n", UID: 1000, GID: 2000, Mode: 0o600},
		images.File{Name: "last", Text: "1\n", UID: 65535, GID: 65535},
		images.File{Name: "beyond", Text: "1\n", UID: 70000, GID: 70000},
		images.File{Name: "setuid", Text: "1\n", UID: 1000, GID: 1000, Mode: 0o4755},
	)})
	p := w.usernsPod(t)
	c := p.run([]string{"sleep"}, withImage(id), withMounts(&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: id}, ContainerPath: "/v", Readonly: true,
		UidMappings: mappedTo(firstID), GidMappings: mappedTo(firstID)}))
	for _, dir := range []string{"", "/v"} {
		for path, want := range map[string]string{
			"/of-1000": "mode=0100600 uid=1000 gid=2000", "/last": "uid=65535 gid=65535", "/beyond": "uid=65534 gid=65534", "/setuid": "mode=0104755 uid=1000",
		} {
			if got := c.exec("stat", dir+path); !strings.Contains(got, want) {
				t.Errorf("got %q, want %s", got, want)
			}
		}
	}
	c.exec("mkfile", "/of-1000", "2", ",", "mkfile", "/made", "x")
	if got := c.exec("stat", "/of-1000", "/made"); !strings.Contains(got, "/of-1000 mode=0100600 uid=1000 gid=2000") || !strings.Contains(got, "/made mode=0100644 uid=0 gid=0") {
		t.Errorf("after writing: got %q", got)
	}
	// A file of an owner that the pod has not cannot be copied up, nor can anybody be made its owner.
	c.fails("mkfile", "/beyond", "2")
	upper := filepath.Join(w.StateDir, "state/pods", p.id, "containers", c.id, "upper")
	wantHostOwner(t, upper, firstID, firstID)
	wantHostOwner(t, upper+"/made", firstID, firstID)
	wantHostOwner(t, upper+"/of-1000", firstID+1000, firstID+2000)
	// The layer itself was not touched, and other pods see it as it was.
	if got := w.pod(t).output([]string{"stat", "/of-1000", "/beyond", ",", "cat", "/of-1000"}, withImage(id)); !strings.Contains(got, "uid=1000 gid=2000") || !strings.Contains(got, "uid=70000") || !strings.HasSuffix(got, "\n1\n") {
		t.Errorf("a pod without a user namespace: got %q", got)
	}
	// An image's user that the namespace has not.
	_, err := p.tryCreate([]string{"true"}, withImage(id), asUser(70000))
	wantCode(t, err, codes.InvalidArgument, "run_as_user", "65535")
}

// A file system that cannot be id-mapped is named, with its kind, wherever in the volume it is.
func TestUsernsVolumeThatCannotBeMapped(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t).used()
	dir := t.TempDir()
	at := dir + "/below"
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("ramfs", at, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for name, source := range map[string]string{"itself": at, "below": dir} {
		t.Run(name, func(t *testing.T) {
			w.leavesNothing(t, func() {
				_, err := p.on(t).tryCreate([]string{"true"}, withMounts(mapped(&runtimeapi.Mount{HostPath: source, ContainerPath: "/v"})))
				wantCode(t, err, codes.Unimplemented, "mount /v", "ramfs", at)
			})
		})
	}
}

func TestUsernsContainerThatContradictsItsPod(t *testing.T) {
	w := needUserns(t)
	p := w.usernsPod(t)
	for name, u := range map[string]*runtimeapi.UserNamespace{"other ids": usernsOf(firstID + idCount), "the node's": {Mode: nsNode}} {
		_, err := p.tryCreate([]string{"true"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NamespaceOptions.UsernsOptions = u }))
		wantCode(t, err, codes.InvalidArgument, "userns_options")
		if t.Failed() {
			t.Log(name)
		}
	}
	p.output([]string{"true"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.NamespaceOptions.UsernsOptions = usernsOf(firstID)
	}))
}

func TestUsernsPodsOutliveTheDaemon(t *testing.T) {
	needUserns(t)
	w := own(t)
	p := w.usernsPod(t)
	dir := t.TempDir()
	c := p.run([]string{"sleep"}, withMounts(mapped(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"})))
	waiting := p.create([]string{"mkfile", "/v/waited", "x", ",", "sleep"}, withMounts(mapped(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"})))
	pid := c.pid()
	w.crash(t)
	w.again(t)
	if got := p.status().GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); !proto.Equal(got, usernsOf(firstID)) {
		t.Errorf("status: got %v", got)
	}
	if got := c.pid(); got != pid {
		t.Errorf("the container is process %d, was %d", got, pid)
	}
	c.exec("mkfile", "/v/exec", "x")
	wantHostOwner(t, dir+"/exec", 0, 0)
	waiting.start()
	eventually(t, "the one that was made before has run", func() bool { _, err := os.Stat(dir + "/waited"); return err == nil })
	wantHostOwner(t, dir+"/waited", 0, 0)
	if got := p.output([]string{"stat", "/v/waited", "/payload", "/dev/null"}, withMounts(mapped(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"}))); strings.Count(got, "uid=0 gid=0") != 3 {
		t.Errorf("a container made after: got %q", got)
	}
	c.inCgroups(c.pid())
	waiting.stop(5)
	c.stop(5)
	if st := c.status(); st.ExitCode != 143 {
		t.Errorf("got exit code %d, want 143", st.ExitCode)
	}
}

func TestUsernsPodsLeaveNothing(t *testing.T) {
	w := needUserns(t)
	life := func() {
		p := w.usernsPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = nsPod })
		c := p.run([]string{"fork", "2", ",", "sleep"}, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NamespaceOptions.Pid = nsPod }))
		c.exec("mkfile", "/x", "y")
		p.remove()
	}
	life()
	w.leavesNothing(t, func() {
		for range 5 {
			life()
		}
	})
}
