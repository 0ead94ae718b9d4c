package cri

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/crisp-cri/crisp/test/images"
)

const (
	created = runtimeapi.ContainerState_CONTAINER_CREATED
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
)

func TestContainerComesAndGoes(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.create([]string{"trap"}, func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt = 2
		c.Labels, c.Annotations = odd, odd
	})
	st := c.status()
	if st.State != created || st.StartedAt != 0 || st.FinishedAt != 0 {
		t.Errorf("got %v, started %d, finished %d; want CREATED and no times", st.State, st.StartedAt, st.FinishedAt)
	}
	if !proto.Equal(st.Metadata, c.cfg.Metadata) {
		t.Errorf("metadata: got %v, want %v", st.Metadata, c.cfg.Metadata)
	}
	wantSameMap(t, "labels", st.Labels, odd)
	wantSameMap(t, "annotations", st.Annotations, odd)
	if st.ImageId != w.image || st.Image.GetImage() == "" || st.ImageRef == "" {
		t.Errorf("image: got id %s, image %v, ref %q; want id %s", st.ImageId, st.Image, st.ImageRef, w.image)
	}
	if want := c.logFile(); st.LogPath != want {
		t.Errorf("log path: got %s, want %s", st.LogPath, want)
	}

	c.start()
	if _, err := os.Stat(c.logFile()); err != nil {
		t.Errorf("the log file must be there when StartContainer returns: %v", err)
	}
	st = c.status()
	if st.State != running || st.StartedAt < st.CreatedAt || st.FinishedAt != 0 {
		t.Errorf("got %v, created %d, started %d, finished %d", st.State, st.CreatedAt, st.StartedAt, st.FinishedAt)
	}
	c.says("ready")
	err := w.rt.StartContainer(t.Context(), c.id)
	wantCode(t, err, codes.FailedPrecondition, c.cfg.Metadata.Name)

	c.stop(10)
	st = c.status()
	if st.State != exited || st.ExitCode != 0 || st.Reason != "Completed" || st.FinishedAt < st.StartedAt {
		t.Errorf("got %v, exit code %d, reason %q, started %d, finished %d", st.State, st.ExitCode, st.Reason, st.StartedAt, st.FinishedAt)
	}
	err = w.rt.StartContainer(t.Context(), c.id)
	wantCode(t, err, codes.FailedPrecondition, c.cfg.Metadata.Name)

	c.remove()
	_, err = w.rt.ContainerStatus(t.Context(), c.id, false)
	wantCode(t, err, codes.NotFound, c.id)
	if _, err := os.Stat(c.logFile()); err != nil {
		t.Errorf("the log is the kubelet's to remove: %v", err)
	}
}

func TestContainerStatusVerboseHasInfo(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	r, err := w.rt.ContainerStatus(t.Context(), c.id, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Info) == 0 {
		t.Error("no info")
	}
}

func TestStopAndRemoveOfUnknownContainersSucceed(t *testing.T) {
	w := need(t)
	const nobody = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	if err := w.rt.StopContainer(t.Context(), nobody, 1); err != nil {
		t.Errorf("StopContainer: %v", err)
	}
	if err := w.rt.RemoveContainer(t.Context(), nobody); err != nil {
		t.Errorf("RemoveContainer: %v", err)
	}
	_, err := w.rt.ContainerStatus(t.Context(), nobody, false)
	wantCode(t, err, codes.NotFound, nobody)
	wantCode(t, w.rt.StartContainer(t.Context(), nobody), codes.NotFound, nobody)
	_, err = w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: nobody, Cmd: []string{"x"}})
	wantCode(t, err, codes.NotFound, nobody)
	_, err = w.rt.ContainerStats(t.Context(), nobody)
	wantCode(t, err, codes.NotFound, nobody)
	wantCode(t, w.rt.ReopenContainerLog(t.Context(), nobody), codes.NotFound, nobody)
	err = w.rt.UpdateContainerResources(t.Context(), nobody, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{CpuShares: 2}})
	wantCode(t, err, codes.NotFound, nobody)
	_, err = w.rt.CreateContainer(t.Context(), nobody, w.containerConfig("c", "sleep"), w.podConfig("p"))
	wantCode(t, err, codes.NotFound, nobody)
}

func TestEmptyIDsAreInvalid(t *testing.T) {
	w := need(t)
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"StopPodSandbox":   func() error { _, err := w.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{}); return err },
		"RemovePodSandbox": func() error { _, err := w.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{}); return err },
		"PodSandboxStatus": func() error { _, err := w.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{}); return err },
		"StartContainer":   func() error { _, err := w.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{}); return err },
		"StopContainer":    func() error { _, err := w.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{}); return err },
		"RemoveContainer":  func() error { _, err := w.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{}); return err },
		"ContainerStatus":  func() error { _, err := w.CRI.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{}); return err },
		"CreateContainer":  func() error { _, err := w.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{}); return err },
		"ExecSync":         func() error { _, err := w.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{}); return err },
		"RunPodSandbox":    func() error { _, err := w.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{}); return err },
		"PullImage":        func() error { _, err := w.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{}); return err },
		"ContainerStats":   func() error { _, err := w.CRI.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{}); return err },
		"ReopenContainerLog": func() error {
			_, err := w.CRI.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { wantCode(t, call(), codes.InvalidArgument) })
	}
}

func TestContainersAreListedByFilter(t *testing.T) {
	w := need(t)
	p, other := w.pod(t), w.pod(t)
	label := func(v string) editContainer {
		return func(c *runtimeapi.ContainerConfig) { c.Labels = map[string]string{"app": v, "both": w.Tag} }
	}
	a, b, d := p.create([]string{"sleep"}, label("a")), p.run([]string{"sleep"}, label("b")), other.run([]string{"exit", "3"}, label("d"))
	d.wait()
	state := func(s runtimeapi.ContainerState) *runtimeapi.ContainerStateValue {
		return &runtimeapi.ContainerStateValue{State: s}
	}
	for _, c := range []struct {
		name   string
		filter *runtimeapi.ContainerFilter
		want   []*container
	}{
		{"none", nil, []*container{a, b, d}},
		{"empty", &runtimeapi.ContainerFilter{}, []*container{a, b, d}},
		{"id", &runtimeapi.ContainerFilter{Id: a.id}, []*container{a}},
		{"short id", &runtimeapi.ContainerFilter{Id: b.id[:13]}, []*container{b}},
		{"pod", &runtimeapi.ContainerFilter{PodSandboxId: p.id}, []*container{a, b}},
		{"short pod id", &runtimeapi.ContainerFilter{PodSandboxId: other.id[:13]}, []*container{d}},
		{"created", &runtimeapi.ContainerFilter{State: state(created)}, []*container{a}},
		{"running", &runtimeapi.ContainerFilter{State: state(running)}, []*container{b}},
		{"exited", &runtimeapi.ContainerFilter{State: state(exited)}, []*container{d}},
		{"label", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"app": "b"}}, []*container{b}},
		{"labels that differ", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"app": "b", "both": ""}}, nil},
		{"unknown pod", &runtimeapi.ContainerFilter{PodSandboxId: "ffffffffffff"}, nil},
		{"pod and state", &runtimeapi.ContainerFilter{PodSandboxId: p.id, State: state(exited)}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := w.rt.ListContainers(t.Context(), c.filter)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]*runtimeapi.Container{}
			for _, one := range list {
				got[one.Id] = one
			}
			for _, one := range []*container{a, b, d} {
				var want bool
				for _, x := range c.want {
					want = want || x == one
				}
				if (got[one.id] != nil) != want {
					t.Errorf("container %s listed: %t, want %t", one.cfg.Labels["app"], got[one.id] != nil, want)
				}
			}
			if one := got[b.id]; one != nil && (one.PodSandboxId != p.id || one.ImageId != w.image || one.ImageRef == "" || one.Image.GetImage() == "" || one.CreatedAt == 0 || one.State != running) {
				t.Errorf("got %v", one)
			}
		})
	}
}

func TestCallsForOneContainerJoin(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	cfg := p.config([]string{"sleep"})
	var wg sync.WaitGroup
	ids, errs := make([]string, 8), make([]error, 8)
	for i := range ids {
		wg.Go(func() { ids[i], errs[i] = w.rt.CreateContainer(t.Context(), p.id, cfg, p.cfg) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Errorf("CreateContainer: %v", err)
	}
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("got containers %v, want one", ids)
			break
		}
	}
}

func TestManyStopsOfOneContainer(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"trap"})
	c.says("ready")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := w.rt.StopContainer(t.Context(), c.id, 10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := strings.Count(c.output("stdout"), "signal 15"); got != 1 {
		t.Errorf("got %d SIGTERMs, want one", got)
	}
}

func TestStopSignalAndGrace(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	imageUSR1, _ := w.forge(t, "stopsignal", images.Image{Layers: w.layers(t), Config: v1.Config{StopSignal: "SIGUSR1"}})
	for _, c := range []struct {
		name  string
		args  []string
		edit  editContainer
		grace int64
		code  int32
		says  string
		least time.Duration
		most  time.Duration
	}{
		{"TERM by default", []string{"trap"}, nil, 10, 0, "signal 15 SIGTERM", 0, 3 * time.Second},
		{"INT by config", []string{"trap"}, func(c *runtimeapi.ContainerConfig) { c.StopSignal = runtimeapi.Signal_SIGNAL_SIGINT }, 10, 0, "signal 2 SIGINT", 0, 3 * time.Second},
		{"of the image, which does not end it", []string{"trap"}, withImage(imageUSR1), 1, 137, "signal 10 SIGUSR1", time.Second, 4 * time.Second},
		{"config wins over image", []string{"trap"}, func(c *runtimeapi.ContainerConfig) {
			withImage(imageUSR1)(c)
			c.StopSignal = runtimeapi.Signal_SIGNAL_SIGQUIT
		}, 10, 0, "signal 3 SIGQUIT", 0, 3 * time.Second},
		{"a real-time one", []string{"trap"}, func(c *runtimeapi.ContainerConfig) { c.StopSignal = runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3 }, 1, 137, "signal 37", time.Second, 4 * time.Second},
		{"KILL after the grace", []string{"ignore"}, nil, 1, 137, "ready", time.Second, 4 * time.Second},
		{"KILL at once", []string{"ignore"}, nil, 0, 137, "ready", 0, 900 * time.Millisecond},
		{"its exit code is kept", []string{"sleep"}, nil, 10, 143, "", 0, 3 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.edit == nil {
				c.edit = func(*runtimeapi.ContainerConfig) {}
			}
			x := p.on(t).run(c.args, c.edit)
			if c.args[0] == "sleep" {
				x.exec("true") // it runs; its handler is set before main's first line ends
			} else {
				x.says("ready")
			}
			start := time.Now()
			x.stop(c.grace)
			if d := time.Since(start); d < c.least || d > c.most {
				t.Errorf("took %v, want %v to %v", d, c.least, c.most)
			}
			st := x.status()
			if st.State != exited || st.ExitCode != c.code {
				t.Errorf("got %v, exit code %d; want EXITED, %d", st.State, st.ExitCode, c.code)
			}
			if out := x.output("stdout"); !strings.Contains(out, c.says) {
				t.Errorf("got output %q, want %q in it", out, c.says)
			}
		})
	}
}

func TestStatusReportsTheEffectiveStopSignal(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	id, _ := w.forge(t, "stopsignal2", images.Image{Layers: w.layers(t), Config: v1.Config{StopSignal: "SIGUSR1"}})
	for want, edit := range map[runtimeapi.Signal]editContainer{
		runtimeapi.Signal_SIGNAL_SIGTERM: func(*runtimeapi.ContainerConfig) {},
		runtimeapi.Signal_SIGNAL_SIGUSR1: withImage(id),
		runtimeapi.Signal_SIGNAL_SIGHUP:  func(c *runtimeapi.ContainerConfig) { c.StopSignal = runtimeapi.Signal_SIGNAL_SIGHUP },
	} {
		c := p.create([]string{"sleep"}, edit)
		if got := c.status().StopSignal; got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		c.remove()
	}
}

// Every signal that CRI has, by its own name: what status says is what was asked for, not another name of its number.
func TestStatusReportsEveryStopSignal(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	if got := len(runtimeapi.Signal_name) - 1; got != 65 {
		t.Errorf("CRI has %d signals, want 65", got)
	}
	for v := range runtimeapi.Signal_name {
		want := runtimeapi.Signal(v)
		if want == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		c := p.create([]string{"sleep"}, func(c *runtimeapi.ContainerConfig) { c.StopSignal = want })
		if got := c.status().StopSignal; got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		c.remove()
	}
}

func TestShorterStopShortensTheGrace(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"ignore"})
	c.says("ready")
	start := time.Now()
	long := make(chan error, 1)
	go func() { long <- w.rt.StopContainer(t.Context(), c.id, 100) }()
	// Wait until the first is under way: the container has been sent the signal it ignores.
	eventually(t, "the first stop is under way", func() bool {
		r, err := w.rt.Status(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range r.Info {
			if strings.Contains(text, c.id) || strings.Contains(text, c.id[:12]) {
				return true
			}
		}
		return time.Since(start) > 2*time.Second // a status that does not show operations is no fault here
	})
	c.stop(1)
	if err := <-long; err != nil {
		t.Errorf("the longer stop: %v", err)
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("took %v, want the shorter grace", d)
	}
	if st := c.status(); st.State != exited || st.ExitCode != 137 {
		t.Errorf("got %v, exit code %d; want EXITED, 137", st.State, st.ExitCode)
	}
}

func TestStopOfAnExitedOrUnstartedContainerSucceeds(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"exit", "5"})
	c.wait()
	c.stop(10)
	if st := c.status(); st.ExitCode != 5 || st.Reason != "Error" {
		t.Errorf("got exit code %d, reason %q; want 5, Error", st.ExitCode, st.Reason)
	}
	c = p.create([]string{"sleep"})
	c.stop(10)
	c.remove()
	c.remove()
}

func TestRemoveKillsARunningContainer(t *testing.T) {
	w := need(t)
	p := w.pod(t).used()
	w.leavesNothing(t, func() {
		c := p.run([]string{"ignore"})
		c.says("ready")
		c.remove()
		_, err := w.rt.ContainerStatus(t.Context(), c.id, false)
		wantCode(t, err, codes.NotFound)
	})
}

func TestStopKillsEveryProcessOfTheContainer(t *testing.T) {
	w := need(t)
	for name, pid := range map[string]runtimeapi.NamespaceMode{"own pids": runtimeapi.NamespaceMode_CONTAINER, "pod's pids": runtimeapi.NamespaceMode_POD, "host's pids": runtimeapi.NamespaceMode_NODE} {
		t.Run(name, func(t *testing.T) {
			p := w.pod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = pid })
			own := func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = pid }
			c, other := p.run([]string{"fork", "3", ",", "daemonize", ",", "sleep"}, own), p.run([]string{"sleep"}, own)
			eventually(t, "all five processes run", func() bool { return len(c.pids()) == 5 })
			pids := c.pids()
			c.stop(0)
			for _, pid := range pids {
				// A zombie may wait for its reaper.
				eventually(t, "process "+itoa(pid)+" ends", func() bool {
					state := procField(pid, "State")
					return state == nil || state[0] == "Z"
				})
			}
			if st := other.status(); st.State != running {
				t.Errorf("the other container: got %v, want RUNNING", st.State)
			}
		})
	}
}

func TestExitCodesAndReasons(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for _, c := range []struct {
		name   string
		args   []string
		code   int32
		reason string
	}{
		{"0", []string{"true"}, 0, "Completed"},
		{"1", []string{"cat", "/no/such"}, 1, "Error"},
		{"255", []string{"exit", "255"}, 255, "Error"},
		{"killed by itself", []string{"kill", "1", "9"}, 0, "Completed"}, // PID 1 is immune to its own signals
	} {
		t.Run(c.name, func(t *testing.T) {
			st := p.on(t).run(c.args).wait()
			if st.ExitCode != c.code || st.Reason != c.reason {
				t.Errorf("got %d, %q; want %d, %q", st.ExitCode, st.Reason, c.code, c.reason)
			}
		})
	}
	t.Run("killed from outside", func(t *testing.T) {
		c := p.run([]string{"sleep"})
		kill(t, c.pid(), 9)
		if st := c.wait(); st.ExitCode != 137 || st.Reason != "Error" {
			t.Errorf("got %d, %q; want 137, Error", st.ExitCode, st.Reason)
		}
	})
	t.Run("by a signal that dumps core", func(t *testing.T) {
		c := p.run([]string{"sleep"})
		kill(t, c.pid(), 6) // Go dies of ABRT with status 2; as PID 1 it catches the signal
		if st := c.wait(); st.ExitCode == 0 || st.Reason != "Error" {
			t.Errorf("got %d, %q; want a failure", st.ExitCode, st.Reason)
		}
	})
}

func TestOneContainerSeesTheImageAnewEachTime(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	a := p.run([]string{"mkfile", "/written", "x", ",", "rm", "/etc/passwd", ",", "sleep"})
	a.exec("wait", "/written")
	b := p.run([]string{"sleep"})
	if msg := b.fails("cat", "/written"); !strings.Contains(msg, "no such file") {
		t.Errorf("another container sees it: %q", msg)
	}
	b.exec("cat", "/etc/passwd")
}

func TestCommandArgsEnvAndDirectory(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	id, _ := w.forge(t, "process", images.Image{
		Layers: w.layers(t),
		Config: v1.Config{Entrypoint: []string{"/payload", "args", "entry"}, Cmd: []string{"cmd"}, Env: []string{"PATH=/", "A=image", "B=image", "E="}, WorkingDir: "/made/by/runtime"},
	})
	for _, c := range []struct {
		name    string
		command []string
		args    []string
		want    string
	}{
		// Docker's ENTRYPOINT and CMD against Kubernetes' command and args.
		{"neither", nil, nil, "\"entry\"\n\"cmd\"\n"},
		{"args", nil, []string{"mine"}, "\"entry\"\n\"mine\"\n"},
		{"command", []string{"/payload", "args", "x"}, nil, "\"x\"\n"},
		{"both", []string{"/payload", "args"}, []string{"a b", "", "\n", "ä"}, "\"a b\"\n\"\"\n\"\\n\"\n\"ä\"\n"},
		{"found in PATH", []string{"payload", "args", "y"}, nil, "\"y\"\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := p.on(t).output(c.args, withImage(id), func(cfg *runtimeapi.ContainerConfig) { cfg.Command = c.command })
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	t.Run("env", func(t *testing.T) {
		c := p.run([]string{"sleep"}, withImage(id), func(cfg *runtimeapi.ContainerConfig) {
			cfg.Envs = []*runtimeapi.KeyValue{{Key: "B", Value: []byte("config")}, {Key: "C", Value: []byte("1")}, {Key: "C", Value: []byte("2")}, {Key: "BYTES", Value: []byte("\xff\xfe=\n")}}
		})
		for name, want := range map[string]string{"A": "image\n", "B": "config\n", "C": "2\n", "E": "\n", "BYTES": "\xff\xfe=\n\n", "HOSTNAME": "p\n", "HOME": "/root\n"} {
			if got := c.exec("env", name); got != want {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		}
		if got := c.exec("cat", "/proc/1/environ"); strings.Count(got, "C=") != 1 {
			t.Errorf("a variable is there twice: %q", got)
		}
	})
	t.Run("working directory of the image, made", func(t *testing.T) {
		if got := p.output([]string{"pwd"}, withImage(id), func(cfg *runtimeapi.ContainerConfig) { cfg.Command = []string{"/payload"} }); got != "/made/by/runtime\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("working directory of the config", func(t *testing.T) {
		c := p.run([]string{"pwd", ",", "sleep"}, withImage(id), func(cfg *runtimeapi.ContainerConfig) {
			cfg.Command, cfg.WorkingDir = []string{"/payload"}, "/tmp"
		})
		if got := c.exec("pwd"); got != "/tmp\n" {
			t.Errorf("exec: got %q", got)
		}
		if c.says("/tmp"); c.output("stdout") != "/tmp\n" {
			t.Errorf("got %q", c.output("stdout"))
		}
	})
}

func TestStdinIsEmptyUnlessAskedFor(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	if got := p.output([]string{"stdin", ",", "stat", "/dev/stdin", ",", "echo", "end"}); !strings.HasSuffix(got, "end\n") {
		t.Errorf("got %q", got)
	}
}

func TestTTY(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"fds", ",", "err", "to-stderr", ",", "stat", "/dev/console", ",", "sleep"}, func(c *runtimeapi.ContainerConfig) { c.Tty, c.Stdin = true, true })
	c.says("/dev/console mode")
	out := c.output("stdout")
	if !strings.Contains(out, "to-stderr") {
		t.Errorf("with a terminal all output is stdout's; got %q, stderr %q", out, c.output("stderr"))
	}
	for fd, want := range map[string]string{"0": "/dev/pts/", "1": "/dev/pts/", "2": "/dev/pts/"} {
		if !strings.Contains(out, fd+" "+want) && !strings.Contains(out, fd+" /dev/console") {
			t.Errorf("descriptor %s: got %q, want a terminal", fd, out)
		}
	}
	if !strings.Contains(out, "rdev=136:") {
		t.Errorf("/dev/console: got %q, want a pts (major 136)", out)
	}
}

func TestBadContainersAreRefusedBeforeAnyEffect(t *testing.T) {
	w := need(t)
	p := w.pod(t).used()
	file := filepath.Join(t.TempDir(), "file")
	mustWrite(t, file, "x")
	sec := func(edit func(*runtimeapi.LinuxContainerSecurityContext)) editContainer {
		return func(c *runtimeapi.ContainerConfig) { edit(c.Linux.SecurityContext) }
	}
	mount := func(m *runtimeapi.Mount) editContainer {
		return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
	}
	profile := func(typ runtimeapi.SecurityProfile_ProfileType, ref string) editContainer {
		return sec(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: typ, LocalhostRef: ref}
		})
	}
	dir := t.TempDir()
	bad := func(name, text string) string {
		mustWrite(t, filepath.Join(dir, name), text)
		return filepath.Join(dir, name)
	}
	local := runtimeapi.SecurityProfile_Localhost
	anyCode := codes.Code(0) // Create may pass and Start fail, with a code that fits
	for _, c := range []struct {
		name string
		edit editContainer
		code codes.Code
		says string
	}{
		{"no metadata", func(c *runtimeapi.ContainerConfig) { c.Metadata = nil }, codes.InvalidArgument, "metadata"},
		{"no name", func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "" }, codes.InvalidArgument, "name"},
		{"no image", func(c *runtimeapi.ContainerConfig) { c.Image = nil }, codes.InvalidArgument, "image"},
		{"unknown image", func(c *runtimeapi.ContainerConfig) {
			c.Image = &runtimeapi.ImageSpec{Image: "registry.example/no/such:1"}
		}, codes.NotFound, "no/such"},
		{"log path that leads out", func(c *runtimeapi.ContainerConfig) { c.LogPath = "../../x.log" }, codes.InvalidArgument, "log"},
		{"absolute log path", func(c *runtimeapi.ContainerConfig) { c.LogPath = "/etc/x.log" }, codes.InvalidArgument, "log"},
		{"group without user", sec(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup = &runtimeapi.Int64Value{Value: 5} }), codes.InvalidArgument, "group"},
		{"user out of range", sec(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser = &runtimeapi.Int64Value{Value: 1 << 32}
		}), codes.InvalidArgument, "user"},
		{"negative user", sec(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = &runtimeapi.Int64Value{Value: -1} }), codes.InvalidArgument, "user"},
		{"unknown username", sec(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "no-such-user" }), anyCode, "no-such-user"},
		{"unknown capability", sec(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"FLY"}}
		}), codes.InvalidArgument, "FLY"},
		{"privileged in an unprivileged pod", sec(func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true }), codes.InvalidArgument, "privileged"},
		{"localhost seccomp without a name", profile(local, ""), codes.InvalidArgument, "seccomp"},
		{"localhost seccomp that is not there", profile(local, filepath.Join(dir, "absent")), codes.InvalidArgument, "absent"},
		{"localhost seccomp that is no JSON", profile(local, bad("text", "{")), codes.InvalidArgument, "seccomp"},
		{"localhost seccomp with an unknown action", profile(local, bad("action", `{"defaultAction":"SCMP_ACT_DANCE"}`)), codes.InvalidArgument, "SCMP_ACT_DANCE"},
		{"localhost seccomp that is a directory", profile(local, dir), codes.InvalidArgument, "seccomp"},
		{"runtime default seccomp with a name", profile(runtimeapi.SecurityProfile_RuntimeDefault, "x"), codes.InvalidArgument, "seccomp"},
		{"mount without a target", mount(&runtimeapi.Mount{HostPath: dir}), codes.InvalidArgument, "mount"},
		{"relative mount target", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "x"}), codes.InvalidArgument, "mount"},
		{"mount without a source", mount(&runtimeapi.Mount{ContainerPath: "/x"}), codes.InvalidArgument, "mount"},
		{"mount over the root", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/"}), codes.InvalidArgument, "mount"},
		{"mount into proc", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/proc/sys/net"}), codes.InvalidArgument, "/proc"},
		{"mount over proc", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "//proc/../proc"}), codes.InvalidArgument, "/proc"},
		{"mount of a host path below a file", mount(&runtimeapi.Mount{HostPath: file + "/x", ContainerPath: "/x"}), anyCode, file},
		{"mount that propagates from a private source", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/x", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}), anyCode, "shared"},
		{"recursively read-only, but not read-only", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/x", RecursiveReadOnly: true}), codes.InvalidArgument, "recursive"},
		{"recursively read-only, but not private", mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/x", Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}), codes.InvalidArgument, "recursive"},
		{"device that is none", func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: file, ContainerPath: "/dev/x", Permissions: "rwm"}}
		}, anyCode, file},
		{"device with bad permissions", func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rwx"}}
		}, codes.InvalidArgument, "rwx"},
		{"env without a name", func(c *runtimeapi.ContainerConfig) { c.Envs = []*runtimeapi.KeyValue{{Value: []byte("x")}} }, codes.InvalidArgument, "env"},
		{"env with a NUL", func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("x\x00y")}}
		}, codes.InvalidArgument, "env"},
		{"argument with a NUL", func(c *runtimeapi.ContainerConfig) { c.Args = []string{"a\x00b"} }, codes.InvalidArgument, ""},
		{"relative working directory", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "x/y" }, codes.InvalidArgument, "working"},
		{"missing binary", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/no/such/binary"} }, anyCode, "/no/such/binary"},
		{"missing binary in PATH", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"no-such-binary"} }, anyCode, "no-such-binary"},
		{"binary that is not executable", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/etc/passwd"} }, anyCode, "/etc/passwd"},
		{"binary that is a directory", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/etc"} }, anyCode, "/etc"},
		{"target pid of nobody", sec(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "0123456789ab"}
		}), anyCode, "0123456789ab"},
		{"memory limit too small for any program", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 64 << 10 }, anyCode, "memory"},
		{"cpuset that is not there", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpusetCpus = "4000" }, anyCode, "4000"},
		{"cpuset that is no list", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpusetCpus = "x" }, codes.InvalidArgument, "cpuset"},
		{"oom_score_adj out of range", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.OomScoreAdj = 1001 }, codes.InvalidArgument, "1001"},
		{"negative memory limit", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = -5 }, codes.InvalidArgument, "memory"},
		{"apparmor that this kernel lacks", sec(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: "x"}
		}), anyCode, "AppArmor"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.leavesNothing(t, func() {
				cfg := p.config([]string{"sleep"}, c.edit)
				r, err := w.CRI.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
				if err == nil && c.code == anyCode {
					_, err = w.CRI.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: r.ContainerId})
					if err != nil {
						// It was made, so it is there to be looked at and removed.
						x := &container{t: t, p: p, id: r.ContainerId, cfg: cfg}
						if st := x.status(); st.State != exited || st.ExitCode != 128 || st.Reason != "StartError" || st.Message == "" {
							t.Errorf("got %v, exit code %d, reason %q, message %q; want EXITED, 128, StartError and why", st.State, st.ExitCode, st.Reason, st.Message)
						}
					}
				}
				if r.GetContainerId() != "" {
					(&container{t: t, p: p, id: r.ContainerId, cfg: cfg}).remove()
				}
				if c.code != anyCode {
					wantCode(t, err, c.code)
				} else if err == nil {
					t.Error("it runs")
				}
				if err != nil && !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.says)) {
					t.Errorf("got %q, want it to say %q", err, c.says)
				}
			})
		})
	}
	// And the pod is as good as new.
	p.output([]string{"true"})
}

// The kubelet names the file of the termination message at random at each try. A try again is still the same container.
func TestCreateAgainWithAnotherTerminationLog(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	dir := t.TempDir()
	create := func(name, file string) (string, error) {
		cfg := w.containerConfig(name, "sleep")
		host := filepath.Join(dir, file)
		mustWrite(t, host, "")
		cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/termination-log", HostPath: host}}
		return w.rt.CreateContainer(t.Context(), p.id, cfg, p.cfg)
	}
	first, err := create("c", "0a1b2c3d")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := create("c", "ffffffff"); err != nil || again != first {
		t.Errorf("again: got %q, %v, want %q", again, err, first)
	}
	_, err = create("c", "something-else")
	wantCode(t, err, codes.AlreadyExists, first)
	r, err := w.rt.ContainerStatus(t.Context(), first, false)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Status.Mounts; len(got) != 1 || got[0].HostPath != filepath.Join(dir, "0a1b2c3d") { // where the kubelet looks for the message
		t.Errorf("mounts: got %v", got)
	}
}
