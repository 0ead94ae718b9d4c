package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/node"
)

// openTargets starts everything; closeAll ends it, also after an error.
func openTargets(ctx context.Context, o options) (targets []target, closeAll func() error, err error) {
	var closers []func() error
	closeAll = func() error {
		var errs []error
		for i := len(closers) - 1; i >= 0; i-- {
			errs = append(errs, closers[i]())
		}
		return errors.Join(errs...)
	}
	reg, err := images.Serve("127.0.0.1:0")
	if err != nil {
		return nil, closeAll, err
	}
	closers = append(closers, reg.Close)
	image := images.Payload(o.payload)
	image.Layers = append(image.Layers, []images.File{{Name: "true", FromHost: o.trivial}})
	if err := image.Push(reg.Host); err != nil {
		return nil, closeAll, err
	}
	ref := reg.Host + "/" + image.Names[0]

	fl, err := newFloor(o)
	if err != nil {
		return nil, closeAll, err
	}
	closers = append(closers, fl.close)

	n, err := node.New(node.Options{Crispd: o.crispd})
	if err != nil {
		return nil, closeAll, err
	}
	closers = append(closers, n.Remove)
	targets = append(targets, fl)
	if o.crispd != "" {
		if err := n.Start(ctx); err != nil {
			return nil, closeAll, err
		}
		targets = append(targets, &runtimeTarget{title: "crispd", steps: newSteps(), cri: n.CRI, endpoint: n.Endpoint(), node: n, image: ref, logs: n.LogDir, pid: n.PID, helper: "crisp-bench/held", parent: n.Cgroups})
	}
	for _, p := range o.peers {
		conn, err := grpc.NewClient(p[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, closeAll, err
		}
		closers = append(closers, conn.Close)
		targets = append(targets, &runtimeTarget{
			title: p[0], endpoint: p[1], helper: strings.TrimPrefix(p[1], "unix://"), image: ref, logs: n.LogDir, parent: "/crisp-bench-" + p[0],
			cri: node.CRI{RuntimeServiceClient: runtimeapi.NewRuntimeServiceClient(conn), ImageServiceClient: runtimeapi.NewImageServiceClient(conn)},
		})
	}
	for _, t := range targets {
		rt, ok := t.(*runtimeTarget)
		if !ok {
			continue
		}
		closers = append(closers, rt.close)
		if _, err := rt.cri.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
			return nil, closeAll, fmt.Errorf("%s: pull: %w", rt.title, err)
		}
	}
	return targets, closeAll, nil
}

// runtimeTarget is a runtime behind a CRI socket.
type runtimeTarget struct {
	title, image, logs, parent string
	cri                        node.CRI
	endpoint                   string
	node                       *node.Node // nil of a peer
	pid                        int        // of the daemon, 0: not counted
	helper                     string     // in the command lines of what runs beside each pod's workload
	held                       []string
	steps                      *steps // where crispd spends its time; nil: it is not asked
}

func (r *runtimeTarget) name() string { return r.title }

func (r *runtimeTarget) sandbox(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "crisp-bench", Uid: name},
		Hostname:     "bench",
		LogDirectory: filepath.Join(r.logs, r.title+"-"+name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    r.parent + "/" + name,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: namespaces},
		},
	}
}

// namespaces are what the kubelet asks for by default, and what the floor has: each container a PID namespace of its own. (CRI's own
// default, POD, is one for the whole pod.)
var namespaces = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}

// up runs a pod of one container.
func (r *runtimeTarget) up(ctx context.Context, name string, lap func(string)) (pod, container string, err error) {
	config := r.sandbox(name)
	run, err := r.cri.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		return "", "", err
	}
	lap("run")
	create, err := r.cri.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: run.PodSandboxId, SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
			Image:    &runtimeapi.ImageSpec{Image: r.image},
			LogPath:  "c.log",
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources: &runtimeapi.LinuxContainerResources{CpuShares: 256, MemoryLimitInBytes: 128 << 20},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
					NamespaceOptions: namespaces,
					Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
				},
			},
		},
	})
	if err != nil {
		return run.PodSandboxId, "", err
	}
	lap("create")
	if _, err = r.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: create.ContainerId}); err == nil {
		lap("start")
	}
	return run.PodSandboxId, create.ContainerId, err
}

func (r *runtimeTarget) cycle(ctx context.Context, i int, lap func(string)) error {
	pod, container, err := r.up(ctx, "p"+strconv.Itoa(i), lap)
	if pod != "" {
		r.held = append(r.held, pod)
	}
	if err != nil {
		return err
	}
	exec, err := r.cri.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"/true"}, Timeout: 10})
	if err != nil || exec.ExitCode != 0 {
		return fmt.Errorf("exec: %w, %v", err, exec)
	}
	lap("exec")
	if r.steps != nil {
		if err := r.readSteps(ctx, pod, container); err != nil {
			return err
		}
		lap("")
	}
	if _, err := r.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	lap("stop")
	if _, err := r.cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	lap("remove")
	r.held = r.held[:len(r.held)-1]
	return nil
}

// cpu is crispd's, with its pods' that have ended: their inits are its children, and the containers theirs.
func (r *runtimeTarget) cpu() (time.Duration, error) {
	if r.pid == 0 {
		return 0, nil
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.pid))
	if err != nil {
		return 0, err
	}
	// utime, stime, cutime, cstime are fields 14 to 17 and follow the name in parentheses, proc_pid_stat(5).
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 15 {
		return 0, fmt.Errorf("/proc/%d/stat is too short", r.pid)
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go knows
	sum := time.Duration(0)
	for _, f := range fields[11:15] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n) * tick
	}
	return sum, nil
}

// processes are those whose command line contains text, without this one.
func processes(text string) (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && strings.Contains(string(cmdline), text) && !strings.Contains(string(cmdline), "\x00-peer\x00") {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// pss is the proportional set size of a process in bytes (proc(5) smaps_rollup).
func pss(pid int) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no Pss in smaps_rollup of %d", pid)
}
