// Command reboot runs pods before a machine goes down, and looks at what is left of
// them after it came up again. It is for the guest (hack/guest/test):
//
//	reboot before [FLAGS]   runs pods and leaves them and crispd running, for the machine to go down with them
//	reboot after [FLAGS]    in the next boot, on the same disk
//
// After a reboot every pod must be not ready and every container exited with a reason;
// all of them can be removed; their addresses, host ports and cgroups are free for
// others; and images are whole, though nobody can fetch them again.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/node"
)

const (
	tag       = "b007ed"
	image     = "registry.example/crisp/payload:1"
	addresses = 5 // for pods, of the node's range
	notePath  = "/var/tmp/crisp-reboot.json"
)

func main() {
	crispd := flag.String("crispd", "bin/crispd", "crispd; crisp-init is beside it")
	payload := flag.String("payload", "out/payload", "test/payload, static")
	hold := flag.Bool("hold", false, "not for users")
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: reboot before|after [FLAGS]")
		os.Exit(2)
	}
	_ = flag.CommandLine.Parse(os.Args[2:]) // it exits
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var err error
	switch verb := os.Args[1]; {
	case verb == "before" && *hold:
		err = before(ctx, *crispd, *payload)
	case verb == "before":
		err = leave(os.Args[2:])
	case verb == "after":
		err = after(ctx, *crispd)
	default:
		err = fmt.Errorf("unknown verb %q", verb)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "reboot:", err)
		os.Exit(1)
	}
}

// leave starts before in a process that stays when we end: it is crispd's parent and reads its log.
func leave(args []string) error {
	cmd := exec.Command("/proc/self/exe", append([]string{"before", "-hold"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if lines.Text() == "ready" {
			return nil
		}
		fmt.Println(lines.Text())
	}
	return fmt.Errorf("it did not come so far: %v", cmd.Wait())
}

// note is what after has to know.
type note struct {
	Boot       string
	Image      string // id
	Pods       []string
	Containers []container
}

type container struct {
	ID      string
	Started bool
	Ended   bool  // before the machine went down, with Code
	Code    int32 // -1: any
}

func newNode(crispd, certs string) (*node.Node, error) {
	return node.New(node.Options{Crispd: crispd, Tag: tag, Args: []string{
		"--set", "image.certs_dir=" + certs, "--set", `network.subnets=["10.63.254.0/29"]`, // the last --set wins
	}})
}

func before(ctx context.Context, crispd, payload string) error {
	registry, err := images.Serve("127.0.0.1:0")
	if err != nil {
		return err
	}
	if err := images.Payload(payload).Push(registry.Host); err != nil {
		return err
	}
	certs := "/var/tmp/crisp-reboot-certs.d"
	if err := images.WriteDefaultHosts(certs, registry.Host); err != nil {
		return err
	}
	n, err := newNode(crispd, certs)
	if err != nil {
		return err
	}
	if err := n.Start(ctx); err != nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	pulled, err := n.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	if err != nil {
		return err
	}
	w := &world{Node: n, note: note{Boot: boot, Image: pulled.ImageRef}}
	if err := w.populate(ctx); err != nil {
		return fmt.Errorf("%w%s", err, n.LastLog())
	}
	text, err := json.Marshal(w.note)
	if err == nil {
		err = os.WriteFile(notePath, text, 0o600)
	}
	if err == nil {
		err = syncFile(notePath)
	}
	if err != nil {
		return err
	}
	fmt.Printf("left running: %d pods, %d containers\nready\n", len(w.Pods), len(w.Containers))
	<-context.Background().Done() // never: the machine goes down
	return nil
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

type world struct {
	*node.Node
	note
	next int
}

// populate uses up all addresses, and has containers in every state.
func (w *world) populate(ctx context.Context) error {
	for i := range addresses {
		p, err := w.pod(ctx, func(c *runtimeapi.PodSandboxConfig) {
			if i == 0 {
				c.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 18080}}
			}
			if i == 1 {
				c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			}
		})
		if err != nil {
			return err
		}
		if err := w.start(ctx, p, "sleep"); err != nil {
			return err
		}
		if i == 0 { // one that ended with its own status, one that nobody started
			if err := w.start(ctx, p, "exit", "3"); err != nil {
				return err
			}
			last := &w.Containers[len(w.Containers)-1]
			if err := w.awaitExit(ctx, last.ID); err != nil {
				return err
			}
			last.Ended, last.Code = true, 3
			if _, err := w.create(ctx, p, "sleep"); err != nil {
				return err
			}
		}
	}
	host, err := w.pod(ctx, func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	})
	if err != nil {
		return err
	}
	return w.start(ctx, host, "sleep")
}

// pod is a pod and what it was made with.
type pod struct {
	id     string
	config *runtimeapi.PodSandboxConfig
}

func (w *world) pod(ctx context.Context, change func(*runtimeapi.PodSandboxConfig)) (*pod, error) {
	w.next++
	name := fmt.Sprintf("pod-%d", w.next)
	c := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "reboot", Uid: name}, Hostname: name, LogDirectory: filepath.Join(w.LogDir, name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: w.Cgroups + "/" + name,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
	if change != nil {
		change(c)
	}
	if err := os.MkdirAll(c.LogDirectory, 0o755); err != nil {
		return nil, err
	}
	r, err := w.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: c})
	if err != nil {
		return nil, err
	}
	w.Pods = append(w.Pods, r.PodSandboxId)
	return &pod{r.PodSandboxId, c}, nil
}

func (w *world) create(ctx context.Context, p *pod, args ...string) (id string, err error) {
	w.next++
	r, err := w.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: fmt.Sprintf("c-%d", w.next)},
		Image:    &runtimeapi.ImageSpec{Image: w.Image}, Args: args, LogPath: fmt.Sprintf("c-%d.log", w.next),
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions},
		},
	}})
	if err != nil {
		return "", err
	}
	w.Containers = append(w.Containers, container{ID: r.ContainerId, Code: -1})
	return r.ContainerId, nil
}

func (w *world) start(ctx context.Context, p *pod, args ...string) error {
	id, err := w.create(ctx, p, args...)
	if err == nil {
		_, err = w.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		w.Containers[len(w.Containers)-1].Started = true
	}
	return err
}

func (w *world) awaitExit(ctx context.Context, id string) error {
	for ctx.Err() == nil {
		s, err := w.CRI.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return err
		}
		if s.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return ctx.Err()
}

func after(ctx context.Context, crispd string) (err error) {
	text, err := os.ReadFile(notePath)
	if err != nil {
		return err
	}
	var was note
	if err := json.Unmarshal(text, &was); err != nil {
		return err
	}
	if boot, err := bootID(); err != nil || boot == was.Boot {
		return fmt.Errorf("this is the same boot (%s, %v): the test proves nothing", boot, err)
	}
	n, err := newNode(crispd, "/nonexistent") // nothing can be fetched
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w%s", err, n.LastLog())
		}
		_ = n.Kill() // after an error; else it ended
	}()
	began := time.Now()
	if err := n.Start(ctx); err != nil {
		return err
	}
	fmt.Printf("crispd serves, %s after its start\n", time.Since(began).Round(time.Millisecond))
	for _, check := range []struct {
		name string
		do   func(context.Context, *node.Node, note) error
	}{
		{"every pod is not ready, every container exited with a reason", checkStates},
		{"every pod and container can be removed", checkRemoval},
		{"addresses and the host port are free, the image is whole", checkReuse},
	} {
		if err := check.do(ctx, n, was); err != nil {
			return fmt.Errorf("%s: %w", check.name, err)
		}
		fmt.Println("ok   ", check.name)
	}
	if err := n.Remove(); err != nil {
		return err
	}
	left, err := n.Leftovers()
	if err != nil || len(left) > 0 {
		return fmt.Errorf("left behind: %v %v", left, err)
	}
	fmt.Println("ok    nothing is left")
	return nil
}

func checkStates(ctx context.Context, n *node.Node, was note) error {
	pods, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	var ids []string
	for _, p := range pods.Items {
		ids = append(ids, p.Id)
		s, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.Id})
		if err != nil {
			errs = append(errs, err)
		} else if p.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || s.Status.State != p.State {
			errs = append(errs, fmt.Errorf("pod %s is listed as %s, its status says %s", p.Metadata.Name, p.State, s.Status.State))
		}
	}
	if want := slices.Sorted(slices.Values(was.Pods)); !slices.Equal(slices.Sorted(slices.Values(ids)), want) {
		errs = append(errs, fmt.Errorf("pods %v, want %v", ids, want))
	}
	list, err := n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil || len(list.Containers) != len(was.Containers) {
		errs = append(errs, fmt.Errorf("%d containers, %v, want %d", len(list.GetContainers()), err, len(was.Containers)))
	}
	for _, c := range was.Containers {
		r, err := n.CRI.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s := r.Status
		switch {
		case s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.Reason == "" || s.FinishedAt == 0:
			errs = append(errs, fmt.Errorf("container %s: %s, reason %q, finished at %d: want exited, with both", c.ID, s.State, s.Reason, s.FinishedAt))
		case c.Started && (s.StartedAt == 0 || s.FinishedAt < s.StartedAt):
			errs = append(errs, fmt.Errorf("container %s: started at %d, finished at %d", c.ID, s.StartedAt, s.FinishedAt))
		case c.Ended && s.ExitCode != c.Code, !c.Ended && c.Started && s.ExitCode == 0:
			errs = append(errs, fmt.Errorf("container %s: exit code %d, want %d (-1: not 0)", c.ID, s.ExitCode, c.Code))
		}
	}
	return errors.Join(errs...)
}

// checkRemoval does what a kubelet does with pods of an earlier boot, in both orders.
func checkRemoval(ctx context.Context, n *node.Node, was note) error {
	for _, c := range was.Containers[:len(was.Containers)/2] {
		if _, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID}); err != nil {
			return err
		}
		if _, err := n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
			return err
		}
	}
	for _, id := range was.Pods {
		if _, err := n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
			return err
		}
		if _, err := n.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
			return err
		}
	}
	pods, perr := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	containers, cerr := n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err := errors.Join(perr, cerr); err != nil {
		return err
	}
	if len(pods.Items)+len(containers.Containers) > 0 {
		return fmt.Errorf("%d pods and %d containers are still listed", len(pods.Items), len(containers.Containers))
	}
	if files, err := filepath.Glob(n.StateDir + "/state/pods/*"); err != nil || len(files) > 0 {
		return fmt.Errorf("still on disk: %v %v", files, err)
	}
	for _, dir := range n.CgroupDirs() {
		if filepath.Base(dir) != filepath.Base(n.Cgroups) {
			return fmt.Errorf("cgroup %s is still there", dir)
		}
	}
	return nil
}

// checkReuse runs as many pods again as there are addresses.
func checkReuse(ctx context.Context, n *node.Node, was note) error {
	list, err := n.CRI.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil || len(list.Images) != 1 || list.Images[0].Id != was.Image {
		return fmt.Errorf("images %v, %v, want %s alone", list.GetImages(), err, was.Image)
	}
	w := &world{Node: n, note: note{Image: was.Image}}
	if err := w.populate(ctx); err != nil {
		return err
	}
	for _, c := range w.Containers {
		if !c.Started || c.Ended {
			continue
		}
		r, err := n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/payload", "echo", "whole"}, Timeout: 60})
		if err != nil || string(r.Stdout) != "whole\n" {
			return fmt.Errorf("exec: %q, %v", r.GetStdout(), err)
		}
	}
	return n.RemovePods()
}
