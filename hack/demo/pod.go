package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/node"
)

// pod is the demo's pod and what is known of it.
type pod struct {
	*node.Node
	steps *stopwatch
	image string

	config     *runtimeapi.PodSandboxConfig
	id, ip     string
	web, other string // container ids
}

const (
	mib       = 1 << 20
	podMemory = 128 * mib
	podPids   = 64
)

func (p *pod) start(ctx context.Context) error {
	return p.steps.time("start crispd", func() error { return p.Node.Start(ctx) })
}

// up does what a kubelet does to bring up a pod of two containers.
func (p *pod) up(ctx context.Context) error {
	version, err := p.CRI.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return err
	}
	out.note("%s %s speaks CRI %s on %s", version.RuntimeName, version.RuntimeVersion, version.RuntimeApiVersion, p.Socket)

	err = p.steps.time("pull image", func() error {
		_, err := p.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: p.image}})
		return err
	})
	if err != nil {
		return err
	}

	// As the kubelet: the pod's cgroup, with the sum of its containers' limits, is there first.
	parent, err := makePodCgroup(p.Cgroups, podMemory, podPids)
	if err != nil {
		return err
	}

	p.config = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "demo", Namespace: "crisp-demo", Uid: p.Tag},
		Hostname:     "demo",
		LogDirectory: p.LogDir,
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"example.org"}},
		Labels:       map[string]string{"app": "demo"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    parent,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}
	err = p.steps.time("run pod sandbox", func() error {
		r, err := p.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config})
		p.id = r.GetPodSandboxId()
		return err
	})
	if err != nil {
		return err
	}
	status, err := p.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		return err
	}
	p.ip = status.GetStatus().GetNetwork().GetIp()

	if p.web, err = p.container(ctx, "web", 64*mib, "http", ":8080"); err != nil {
		return err
	}
	p.other, err = p.container(ctx, "other", 32*mib, "echo", "other is here", ",", "sleep")
	return err
}

// container creates and starts one container.
func (p *pod) container(ctx context.Context, name string, memory int64, args ...string) (id string, err error) {
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: p.image},
		Args:     args,
		LogPath:  name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory, CpuShares: 256},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			},
		},
	}
	err = p.steps.time("create container "+name, func() error {
		r, err := p.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
		id = r.GetContainerId()
		return err
	})
	if err != nil {
		return "", err
	}
	err = p.steps.time("start container "+name, func() error {
		_, err := p.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		return err
	})
	return id, err
}

// exec runs the payload in a container and returns its standard output.
func (p *pod) exec(ctx context.Context, container string, verb ...string) (string, error) {
	r, err := p.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: append([]string{"/payload"}, verb...), Timeout: 10})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("payload %s: exit status %d: %s", strings.Join(verb, " "), r.ExitCode, r.Stderr)
	}
	return string(r.Stdout), nil
}

// down stops and removes the pod and the image.
func (p *pod) down(ctx context.Context) error {
	p.Remember()
	steps := []struct {
		name string
		do   func() error
	}{
		{"stop container web", func() error {
			_, err := p.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: p.web, Timeout: 5})
			return err
		}},
		{"stop pod sandbox", func() error {
			_, err := p.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id})
			return err
		}},
		{"remove pod sandbox", func() error {
			_, err := p.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id})
			return err
		}},
		{"remove image", func() error {
			_, err := p.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: p.image}})
			return err
		}},
	}
	for _, s := range steps {
		if err := p.steps.time(s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

// show prints the point of it all.
func (p *pod) show(ctx context.Context) error {
	shows := []struct {
		title string
		do    func(context.Context) error
	}{
		{"namespaces: a pod shares three and each container has three of its own", p.showNamespaces},
		{"PID 1 in each container", p.showProcesses},
		{"the pod's cgroups: limits and use", p.showCgroups},
		{"one network: localhost is the pod, the host reaches its address", p.showNetwork},
		{"one IPC namespace: System V shared memory", p.showIPC},
		{"logs, in the kubelet's format", p.showLogs},
	}
	for _, s := range shows {
		out.section(s.title)
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.title, err)
		}
	}
	return nil
}

func (p *pod) showNamespaces(ctx context.Context) error {
	inode := map[string]map[string]string{}
	for name, id := range map[string]string{"web": p.web, "other": p.other} {
		text, err := p.exec(ctx, id, "ns")
		if err != nil {
			return err
		}
		inode[name] = map[string]string{}
		for line := range strings.Lines(text) {
			if ns, number, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
				inode[name][ns] = number
			}
		}
	}
	rows := [][]string{{"namespace", "web", "other", "", "this host"}}
	var wrong []error
	for _, ns := range []struct {
		key, name string
		shared    bool
	}{{"net", "network", true}, {"ipc", "IPC", true}, {"uts", "UTS", true}, {"pid", "PID", false}, {"mnt", "mount", false}, {"cgroup", "cgroup", false}} {
		web, other := inode["web"][ns.key], inode["other"][ns.key]
		verdict := out.paint(yellow, "each its own")
		if web == other {
			verdict = out.paint(green, "the same")
		}
		if web == "" || (web == other) != ns.shared {
			wrong = append(wrong, fmt.Errorf("%s namespace: web has %q, other %q", ns.name, web, other))
		}
		host, err := os.Readlink("/proc/self/ns/" + ns.key)
		if err != nil {
			return err
		}
		host = host[strings.IndexByte(host, '[')+1 : len(host)-1]
		if host == web {
			wrong = append(wrong, fmt.Errorf("%s namespace: web is in the host's", ns.name))
		}
		rows = append(rows, []string{ns.name, web, other, verdict, out.paint(dim, host)})
	}
	out.table(rows)
	return errors.Join(wrong...)
}

func (p *pod) showProcesses(ctx context.Context) error {
	rows := [][]string{{"container", "PID", "parent", "command"}}
	for _, c := range []struct{ name, id string }{{"web", p.web}, {"other", p.other}} {
		text, err := p.exec(ctx, c.id, "ps")
		if err != nil {
			return err
		}
		first := false
		for line := range strings.Lines(text) {
			f := strings.SplitN(strings.TrimSpace(line), " ", 3)
			if len(f) == 3 {
				rows = append(rows, []string{c.name, f[0], f[1], f[2]})
				first = first || f[0] == "1" && !strings.HasSuffix(f[2], " ps")
			}
		}
		if !first {
			return fmt.Errorf("container %s has no PID 1 of its own:\n%s", c.name, text)
		}
	}
	out.table(rows)
	return nil
}

func (p *pod) showNetwork(ctx context.Context) error {
	local, err := p.exec(ctx, p.other, "get", "http://localhost:8080/")
	if err != nil {
		return err
	}
	out.line("other → http://localhost:8080/", strings.TrimSpace(local))
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + p.ip + ":8080/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return err
	}
	out.line("host  → http://"+p.ip+":8080/", strings.TrimSpace(string(body)))
	addr, err := p.exec(ctx, p.other, "addr")
	if err != nil {
		return err
	}
	for line := range strings.Lines(addr) {
		out.line("link", strings.TrimSpace(line))
	}
	return nil
}

func (p *pod) showIPC(ctx context.Context) error {
	const key, text = "0x637269", "written by web, read by other"
	if _, err := p.exec(ctx, p.web, "shm-write", key, text); err != nil {
		return err
	}
	got, err := p.exec(ctx, p.other, "shm-read", key)
	if err != nil {
		return err
	}
	if strings.TrimSpace(got) != text {
		return fmt.Errorf("other read %q, want %q", got, text)
	}
	out.line("shmget "+key, strings.TrimSpace(got))
	host, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return err
	}
	if strings.Contains(string(host), " 6517353 ") { // key in decimal, as proc_sysvipc shows it
		return errors.New("the host sees the pod's shared memory")
	}
	return nil
}

func (p *pod) showLogs(context.Context) error {
	for name, want := range map[string]string{"web": "listening on", "other": "other is here"} {
		path := filepath.Join(p.LogDir, name+".log")
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.Contains(string(data), " stdout F "+want) {
			return fmt.Errorf("%s: got %q, want a line %q", path, data, want)
		}
		out.line(name+".log", strings.TrimSpace(string(data)))
	}
	return nil
}
