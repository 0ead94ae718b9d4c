package cri

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	nsPod       = runtimeapi.NamespaceMode_POD
	nsContainer = runtimeapi.NamespaceMode_CONTAINER
	nsNode      = runtimeapi.NamespaceMode_NODE
	nsTarget    = runtimeapi.NamespaceMode_TARGET
)

// namespaces of a process: type to inode.
func namespaces(t *testing.T, pid int) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, ns := range []string{"net", "ipc", "uts", "pid", "mnt", "cgroup", "user"} {
		link, err := os.Readlink("/proc/" + itoa(pid) + "/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		all[ns] = link
	}
	return all
}

// firstPID is a process of the container that runs alone.
func (c *container) anyPID() int {
	c.t.Helper()
	var pids []int
	eventually(c.t, "the container has a process", func() bool { pids = c.pids(); return len(pids) > 0 })
	return pids[0]
}

func withNamespaces(edit func(*runtimeapi.NamespaceOption)) (editPod, editContainer) {
	return func(c *runtimeapi.PodSandboxConfig) { edit(c.Linux.SecurityContext.NamespaceOptions) },
		func(c *runtimeapi.ContainerConfig) { edit(c.Linux.SecurityContext.NamespaceOptions) }
}

func TestNamespacesThatAPodShares(t *testing.T) {
	w := need(t)
	host := namespaces(t, os.Getpid())
	for _, c := range []struct {
		name string
		edit func(*runtimeapi.NamespaceOption)
		// shared by both containers and different from the host's; private to each; the host's
		shared, private, hosts []string
	}{
		{"by default", func(*runtimeapi.NamespaceOption) {}, []string{"net", "ipc", "uts"}, []string{"pid", "mnt", "cgroup"}, []string{"user"}},
		{"processes of the pod", func(o *runtimeapi.NamespaceOption) { o.Pid = nsPod }, []string{"net", "ipc", "uts", "pid"}, []string{"mnt", "cgroup"}, []string{"user"}},
		{"processes of the host", func(o *runtimeapi.NamespaceOption) { o.Pid = nsNode }, []string{"net", "ipc", "uts"}, []string{"mnt"}, []string{"pid", "user"}},
		{"network of the host", func(o *runtimeapi.NamespaceOption) { o.Network = nsNode }, []string{"ipc"}, []string{"pid", "mnt", "cgroup"}, []string{"net", "user"}},
		{"IPC of the host", func(o *runtimeapi.NamespaceOption) { o.Ipc = nsNode }, []string{"net", "uts"}, []string{"pid", "mnt", "cgroup"}, []string{"ipc", "user"}},
		{"all of the host", func(o *runtimeapi.NamespaceOption) { o.Network, o.Ipc, o.Pid = nsNode, nsNode, nsNode }, nil, []string{"mnt"}, []string{"net", "ipc", "pid", "user"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			podOptions, containerOptions := withNamespaces(c.edit)
			p := w.pod(t, podOptions)
			a := namespaces(t, p.run([]string{"sleep"}, containerOptions).anyPID())
			b := namespaces(t, p.run([]string{"sleep"}, containerOptions).anyPID())
			for _, ns := range c.shared {
				if a[ns] != b[ns] || a[ns] == host[ns] {
					t.Errorf("%s: got %s and %s (host %s), want one of the pod", ns, a[ns], b[ns], host[ns])
				}
			}
			for _, ns := range c.private {
				if a[ns] == b[ns] || a[ns] == host[ns] || b[ns] == host[ns] {
					t.Errorf("%s: got %s and %s (host %s), want one for each container", ns, a[ns], b[ns], host[ns])
				}
			}
			for _, ns := range c.hosts {
				if a[ns] != host[ns] || b[ns] != host[ns] {
					t.Errorf("%s: got %s and %s, want the host's %s", ns, a[ns], b[ns], host[ns])
				}
			}
		})
	}
}

func TestPodsShareNothing(t *testing.T) {
	w := need(t)
	a := namespaces(t, w.pod(t).run([]string{"sleep"}).anyPID())
	b := namespaces(t, w.pod(t).run([]string{"sleep"}).anyPID())
	for ns := range a {
		if ns != "user" && a[ns] == b[ns] {
			t.Errorf("%s: two pods are both in %s", ns, a[ns])
		}
	}
}

func TestContainerJoinsTheProcessesOfItsTarget(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	app := p.run([]string{"sleep"})
	debug := p.run([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: nsTarget, TargetId: app.id}
	})
	if a, b := namespaces(t, app.anyPID()), namespaces(t, debug.anyPID()); a["pid"] != b["pid"] || a["mnt"] == b["mnt"] {
		t.Errorf("got pid %s and %s, mnt %s and %s; want the target's pid namespace and an own mount namespace", a["pid"], b["pid"], a["mnt"], b["mnt"])
	}
	if got := debug.exec("ps"); !strings.HasPrefix(got, "1 0 /payload sleep\n") {
		t.Errorf("got %q, want the target's first process as PID 1", got)
	}
	debug.stop(0)
	if st := app.status(); st.State != running {
		t.Errorf("the target: got %v, want RUNNING", st.State)
	}
}

func TestFirstProcess(t *testing.T) {
	w := need(t)
	t.Run("own", func(t *testing.T) {
		c := w.pod(t).run([]string{"sleep"})
		out := c.exec("ps")
		if !strings.HasPrefix(out, "1 0 /payload sleep\n") || strings.Count(out, "\n") != 2 {
			t.Errorf("got %q, want the container's program as PID 1 and the exec'd one", out)
		}
	})
	t.Run("of the pod", func(t *testing.T) {
		podOptions, containerOptions := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = nsPod })
		p := w.pod(t, podOptions)
		a, b := p.run([]string{"sleep"}, containerOptions), p.run([]string{"args", "second", ",", "sleep"}, containerOptions)
		b.says("second")
		out := a.exec("ps")
		if strings.HasPrefix(out, "1 0 /payload") || strings.Count(out, "/payload sleep") != 1 || !strings.Contains(out, "/payload args second") {
			t.Errorf("got %q, want a reaper as PID 1 and both containers' programs", out)
		}
		// SEC-06: nothing worth reaching, and it does not die.
		for _, n := range strings.Fields(a.exec("ls", "/proc/1/fd")) { // numbers may show; nothing can be reached by them
			a.fails("stat", "/proc/1/fd/"+n)
		}
		for _, args := range [][]string{{"ls", "/proc/1/root/proc/1"}, {"cat", "/proc/1/environ"}, {"cat", "/proc/1/maps"}, {"stat", "/proc/1/exe"}, {"stat", "/proc/1/cwd"}} {
			r, err := a.try(args...)
			if err != nil {
				t.Fatal(err)
			}
			if r.ExitCode == 0 && strings.TrimSpace(string(r.Stdout)) != "" {
				t.Errorf("%v of the reaper shows %q", args, r.Stdout)
			}
		}
		for what, args := range map[string][]string{
			"PTRACE_ATTACH": {itoa(unix.SYS_PTRACE), itoa(unix.PTRACE_ATTACH), "1"},
			"PTRACE_SEIZE":  {itoa(unix.SYS_PTRACE), itoa(unix.PTRACE_SEIZE), "1"},
		} {
			if got := a.exec(append([]string{"syscall"}, args...)...); got != "EPERM\n" {
				t.Errorf("%s of the reaper: got %q, want EPERM", what, got)
			}
		}
		a.fails("cat", "/proc/1/mem")
		for _, sig := range []string{"1", "2", "3", "9", "11", "15", "19"} {
			if _, err := a.try("kill", "1", sig); err != nil {
				t.Fatal(err)
			}
		}
		a.exec("true")
		if st := p.status(); st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("after signals to the reaper the pod is %v", st.State)
		}
		// An orphan is reaped.
		if r, err := a.try("daemonize"); err != nil || r.ExitCode != 0 {
			t.Fatalf("got %v, %v", r, err)
		}
	})
}

func TestHostnameAndFiles(t *testing.T) {
	w := need(t)
	node, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Hostname = "a-host"
		c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53", "2001:db8::53"}, Searches: []string{"ns.svc.cluster.local", "svc.cluster.local"}, Options: []string{"ndots:5", "edns0"}}
	})
	c := p.run([]string{"sleep"})
	if got := c.exec("hostname"); got != "a-host\n" {
		t.Errorf("hostname: got %q", got)
	}
	if got := c.exec("cat", "/etc/hostname"); got != "a-host\n" {
		t.Errorf("/etc/hostname: got %q", got)
	}
	want := "search ns.svc.cluster.local svc.cluster.local\nnameserver 192.0.2.53\nnameserver 2001:db8::53\noptions ndots:5 edns0\n"
	if got := c.exec("cat", "/etc/resolv.conf"); got != want {
		t.Errorf("/etc/resolv.conf: got %q, want %q", got, want)
	}
	hosts := c.exec("cat", "/etc/hosts")
	for _, want := range []string{"127.0.0.1\tlocalhost", "::1", p.ip() + "\ta-host"} {
		if !strings.Contains(hosts, want) {
			t.Errorf("/etc/hosts: got %q, want %q in it", hosts, want)
		}
	}
	// Both containers of a pod see the same, and one's writing shows in the other (as with containerd).
	other := p.run([]string{"cat", "/etc/hostname"})
	other.wait()
	if got := other.output("stdout"); got != "a-host\n" {
		t.Errorf("second container: got %q", got)
	}

	t.Run("network of the host", func(t *testing.T) {
		podOptions, containerOptions := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Network = nsNode })
		p := w.pod(t, podOptions, func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "" })
		c := p.run([]string{"sleep"}, containerOptions)
		if got := c.exec("hostname"); got != node+"\n" {
			t.Errorf("got %q, want the node's %q", got, node)
		}
		if got := p.status().GetNetwork().GetIp(); got != "" {
			t.Errorf("a pod in the host's network has no address of its own, got %s", got)
		}
	})
	t.Run("resolver of the host", func(t *testing.T) {
		text, err := os.ReadFile("/etc/resolv.conf")
		if err != nil {
			t.Skipf("this host has no resolv.conf to copy: %v", err)
		}
		if got := w.pod(t).output([]string{"cat", "/etc/resolv.conf"}); got != string(text) {
			t.Errorf("got %q, want the host's %q", got, text)
		}
	})
	t.Run("the node's name is not changed", func(t *testing.T) {
		if now, err := os.Hostname(); err != nil || now != node {
			t.Errorf("got %q, %v; want %q", now, err, node)
		}
	})
}

func TestSharedMemoryAndMessageQueues(t *testing.T) {
	w := need(t)
	p, other := w.pod(t), w.pod(t)
	a, b, stranger := p.run([]string{"sleep"}), p.run([]string{"sleep"}), other.run([]string{"sleep"})
	t.Run("System V, across the pod only", func(t *testing.T) {
		a.exec("shm-write", "4711", "hello")
		if got := b.exec("shm-read", "4711"); got != "hello\n" {
			t.Errorf("got %q", got)
		}
		stranger.fails("shm-read", "4711")
	})
	t.Run("/dev/shm, across the pod only", func(t *testing.T) {
		a.exec("mkfile", "/dev/shm/x", "hello")
		if got := b.exec("cat", "/dev/shm/x"); got != "hello\n" {
			t.Errorf("got %q", got)
		}
		stranger.fails("cat", "/dev/shm/x")
		if got := a.exec("statfs", "/dev/shm"); !strings.Contains(got, "type=0x1021994 size=67108864") {
			t.Errorf("got %q, want a tmpfs of 64 MiB", got)
		}
		if got := a.exec("stat", "/dev/shm"); !strings.Contains(got, "mode=041777") {
			t.Errorf("got %q, want mode 1777", got)
		}
	})
	t.Run("message queues", func(t *testing.T) {
		if got := a.exec("statfs", "/dev/mqueue"); !strings.Contains(got, "type=0x19800202") {
			t.Errorf("got %q, want mqueue", got)
		}
		a.exec("touch", "/dev/mqueue/q")
		if got := b.exec("ls", "/dev/mqueue"); got != "q\n" {
			t.Errorf("got %q", got)
		}
		if got := stranger.exec("ls", "/dev/mqueue"); got != "" {
			t.Errorf("another pod sees %q", got)
		}
	})
	t.Run("of the host", func(t *testing.T) {
		podOptions, containerOptions := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Ipc = nsNode })
		name := "/dev/shm/crisp-test-" + w.Tag
		mustWrite(t, name, "host\n")
		t.Cleanup(func() {
			if err := os.Remove(name); err != nil {
				t.Error(err)
			}
		})
		if got := w.pod(t, podOptions).output([]string{"cat", name}, containerOptions); got != "host\n" {
			t.Errorf("got %q", got)
		}
	})
}

func TestContainersOfAPodMeetOnLocalhost(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	server := p.run([]string{"http", "127.0.0.1:8080"})
	server.says("listening")
	client := p.run([]string{"sleep"})
	if got := client.exec("get", "http://127.0.0.1:8080/hostname"); got != "p\n" {
		t.Errorf("got %q", got)
	}
	if got := client.exec("get", "http://localhost:8080/hostname"); got != "p\n" {
		t.Errorf("by name: got %q", got)
	}
}
