package cri

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/leak"
)

// crash ends crispd without warning; again starts the next one on the same roots.
func (w *world) crash(t *testing.T) {
	t.Helper()
	if err := w.disconnect(); err != nil {
		t.Fatal(err)
	}
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
}

func (w *world) again(t *testing.T) {
	t.Helper()
	if err := w.start(); err != nil {
		t.Fatal(err)
	}
}

func TestPodsOutliveTheDaemon(t *testing.T) {
	for name, end := range map[string]func(*world, *testing.T){
		"kill -9": (*world).crash,
		"SIGTERM": func(w *world, t *testing.T) {
			if err := w.disconnect(); err != nil {
				t.Fatal(err)
			}
			if err := w.Stop(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			need(t)
			w := own(t)
			port := freePort(t)
			p := w.pod(t, named("lives"), withPorts(&runtimeapi.PortMapping{ContainerPort: 8080, HostPort: port}), func(c *runtimeapi.PodSandboxConfig) { c.Labels = odd })
			dir := t.TempDir()
			share := withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/t"})
			server := p.run([]string{"http", ":8080"})
			server.says("listening")
			logs := p.run([]string{"echo", "before", ",", "wait", "/t/go", ",", "echo", "while away", ",", "sleep"}, share)
			logs.says("before")
			dies := p.run([]string{"wait", "/t/go", ",", "exit", "42"}, share)
			killed := p.run([]string{"sleep"})
			oom := p.run([]string{"wait", "/t/go", ",", "oom"}, share, withResources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 * mib}))
			waiting := p.create([]string{"echo", "started later", ",", "sleep"})
			stopped := w.pod(t)
			if err := w.rt.StopPodSandbox(t.Context(), stopped.id); err != nil {
				t.Fatal(err)
			}
			pids := map[string]int{"server": server.pid(), "logs": logs.pid()}
			before, status := p.status(), server.status()
			gone := []int{dies.pid(), killed.pid(), oom.pid()}

			end(w, t)
			mustWrite(t, filepath.Join(dir, "go"), "")
			kill(t, killed.pid(), 9)
			eventually(t, "the log goes on without the daemon", func() bool { return strings.Contains(logs.output("stdout"), "while away") })
			if got, err := get(t, "127.0.0.1:"+itoa(int(port))); err != nil || got != "lives" {
				t.Errorf("without the daemon: got %q, %v", got, err)
			}
			for _, pid := range gone {
				eventually(t, "process "+itoa(pid)+" ends", func() bool { return procField(pid, "State") == nil })
			}
			w.again(t)

			after := p.status()
			if after.State != runtimeapi.PodSandboxState_SANDBOX_READY || after.Network.Ip != before.Network.Ip || after.CreatedAt != before.CreatedAt {
				t.Errorf("pod: got %v, want %v", after, before)
			}
			wantSameMap(t, "labels", after.Labels, odd)
			if st := stopped.status(); st.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
				t.Errorf("the stopped pod: got %v", st.State)
			}
			if now := server.status(); now.State != running || now.StartedAt != status.StartedAt || server.pid() != pids["server"] || logs.pid() != pids["logs"] {
				t.Errorf("server: got %v, pid %d; want %v, pid %d", now, server.pid(), status, pids["server"])
			}
			for _, c := range []struct {
				*container
				code   int32
				reason string
			}{{dies, 42, "Error"}, {killed, 137, "Error"}, {oom, 137, "OOMKilled"}} {
				st := c.status()
				if st.State != exited || st.ExitCode != c.code || st.Reason != c.reason {
					t.Errorf("exited meanwhile: got %v, %d, %q; want EXITED, %d, %q", st.State, st.ExitCode, st.Reason, c.code, c.reason)
				}
				if st.FinishedAt < st.StartedAt || time.Since(time.Unix(0, st.FinishedAt)) > time.Minute {
					t.Errorf("finished at %v", time.Unix(0, st.FinishedAt))
				}
			}
			// Controllable: started, exec'd into, logged, rotated, updated, measured, stopped.
			waiting.start()
			waiting.says("started later")
			if got := logs.exec("echo", "hi"); got != "hi\n" {
				t.Errorf("exec: got %q", got)
			}
			if err := os.Rename(logs.logFile(), logs.logFile()+".1"); err != nil {
				t.Fatal(err)
			}
			if err := w.rt.ReopenContainerLog(t.Context(), logs.id); err != nil {
				t.Errorf("ReopenContainerLog: %v", err)
			}
			if err := w.rt.UpdateContainerResources(t.Context(), logs.id, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{CpuShares: 300}}); err != nil {
				t.Errorf("UpdateContainerResources: %v", err)
			}
			if st, err := w.rt.ContainerStats(t.Context(), logs.id); err != nil || st.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
				t.Errorf("ContainerStats: %v, %v", st, err)
			}
			logs.stop(10)
			if st := logs.status(); st.State != exited || st.ExitCode != 143 {
				t.Errorf("after stop: got %v", st)
			}
			// Addresses and ports are still taken.
			if other := w.pod(t); other.ip() == after.Network.Ip {
				t.Error("a new pod got an address that is in use")
			}
			p.remove()
			if got, err := get(t, "127.0.0.1:"+itoa(int(port))); err == nil {
				t.Errorf("the port answers after the pod is gone: %q", got)
			}
		})
	}
}

// What is stored on the way to a later daemon is bytes: env values need not be UTF-8 (CRI 0.36), and nothing else may change either.
func TestBytesOutliveTheDaemon(t *testing.T) {
	need(t)
	w := own(t)
	var all []byte
	for b := 1; b < 256; b++ {
		all = append(all, byte(b))
	}
	strange := map[string]string{"tab\tand\nnewline": "<&>\u2028\U0010ffff\x7f\\\"", "": "empty", "nul": "a\x00b"}
	c := w.pod(t).run([]string{"args", "<&>\u2028\x7f\"", ",", "sleep"}, func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "PLAIN", Value: []byte("1")}, {Key: "ALL", Value: all}, {Key: "LATIN", Value: []byte("gr\xfc\xdfe")}, {Key: "CUT", Value: []byte("\xe2\x82")}, {Key: "\u2028", Value: []byte("<&>")}}
		c.Labels, c.Annotations = strange, strange
	})
	check := func(when string) {
		t.Helper()
		for _, e := range c.cfg.Envs {
			if got := c.exec("env", e.Key); got != string(e.Value)+"\n" {
				t.Errorf("%s: %s: got %q, want %q", when, e.Key, got, e.Value)
			}
		}
		if got, want := c.exec("cat", "/proc/1/cmdline"), "/payload\x00args\x00<&>\u2028\x7f\"\x00,\x00sleep\x00"; got != want {
			t.Errorf("%s: arguments: got %q, want %q", when, got, want)
		}
		wantSameMap(t, when+": labels", c.status().Labels, strange)
		wantSameMap(t, when+": annotations", c.status().Annotations, strange)
	}
	check("before")
	w.crash(t)
	w.again(t)
	check("after a crash")
	// An update writes the config anew.
	if err := w.rt.UpdateContainerResources(t.Context(), c.id, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{CpuShares: 300}}); err != nil {
		t.Fatal(err)
	}
	w.crash(t)
	w.again(t)
	check("after an update and a crash")
}

// What is about pods rather than of them: images, statistics, events. (CDI devices: TestCDIDevices.)
func TestImagesStatsAndEventsOutliveTheDaemon(t *testing.T) {
	need(t)
	w := own(t)
	p := w.pod(t)
	c := p.run([]string{"burn", "1", ",", "fill", "/file", "3", ",", "echo", "done", ",", "sleep"})
	c.says("done")
	images := func() []*runtimeapi.Image {
		t.Helper()
		l, err := w.im.ListImages(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	stats := func() *runtimeapi.ContainerStats {
		t.Helper()
		s, err := w.rt.ContainerStats(t.Context(), c.id)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	var layer uint64
	eventually(t, "the writable layer is measured", func() bool {
		layer = stats().GetWritableLayer().GetUsedBytes().GetValue()
		return layer >= 3*mib
	})
	before, used := images(), stats()
	w.crash(t)
	w.again(t)
	if after := images(); len(after) != len(before) || !proto.Equal(after[0], before[0]) {
		t.Errorf("images: got %v, want %v", after, before)
	}
	now := stats()
	if now.GetCpu().GetUsageCoreNanoSeconds().GetValue() < used.GetCpu().GetUsageCoreNanoSeconds().GetValue() || now.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("statistics: got %v, want no less than %v", now, used)
	}
	eventually(t, "the writable layer is measured again", func() bool { return stats().GetWritableLayer().GetUsedBytes().GetValue() == layer })
	ps, err := w.rt.PodSandboxStats(t.Context(), p.id)
	if err != nil || len(ps.GetLinux().GetContainers()) != 1 || ps.GetLinux().GetNetwork().GetDefaultInterface() == nil {
		t.Errorf("pod statistics: got %v, %v", ps, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := w.listen(t, ctx)
	c.stop(0)
	for {
		e, err := s.Recv()
		if err != nil {
			t.Fatalf("no event of the stop: %v", err)
		}
		if e.ContainerId == c.id && e.ContainerEventType == eventStopped {
			break
		}
	}
	// The image is in use by the container still, and goes with the last.
	if st, err := w.im.ImageStatus(t.Context(), &runtimeapi.ImageSpec{Image: w.image}, false); err != nil || st.GetImage().GetId() != w.image {
		t.Errorf("ImageStatus: %v, %v", st, err)
	}
}

func TestCrashInTheMiddleOfACallLeavesNothing(t *testing.T) {
	need(t)
	w := own(t)
	if err := w.warmUp(); err != nil {
		t.Fatal(err)
	}
	before, err := w.scope().Take()
	if err != nil {
		t.Fatal(err)
	}
	// At many moments of the life of two pods at a time.
	for i := range 12 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 2 {
			cfg := w.podConfig("crash")
			wg.Go(func() { _ = w.life(ctx, cfg) }) // it fails: the daemon dies
		}
		timer := time.NewTimer(time.Duration(i*4) * time.Millisecond)
		<-timer.C
		if err := w.Kill(); err != nil {
			t.Fatal(err)
		}
		cancel()
		wg.Wait()
		if err := w.disconnect(); err != nil {
			t.Fatal(err)
		}
		w.again(t)
		// What is there can be listed and removed; what was never returned is collected by crispd itself.
		list, err := w.rt.ListPodSandbox(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list {
			if err := w.rt.StopPodSandbox(t.Context(), p.Id); err != nil {
				t.Errorf("StopPodSandbox: %v", err)
			}
			if err := w.rt.RemovePodSandbox(t.Context(), p.Id); err != nil {
				t.Errorf("RemovePodSandbox: %v", err)
			}
		}
	}
	if err := w.warmUp(); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(w.LogDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range logs { // the kubelet's to remove
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	diff, err := w.scope().Settle(ctx, before)
	if err != nil {
		t.Fatal(err)
	}
	if len(diff) > 0 {
		t.Errorf("something is left:\n%s", leak.Format(diff, 30))
	}
}

func TestSameCallAfterACrashSucceeds(t *testing.T) {
	need(t)
	w := own(t)
	for i := range 4 {
		cfg := w.podConfig("again")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = w.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}) // it fails: the daemon dies
		}()
		timer := time.NewTimer(time.Duration(2+i*3) * time.Millisecond)
		<-timer.C
		w.crash(t)
		cancel()
		<-done
		w.again(t)
		id, err := w.rt.RunPodSandbox(t.Context(), cfg, "")
		if err != nil {
			t.Fatalf("the same call after a crash: %v", err)
		}
		p := w.adopt(t, id, cfg)
		p.output([]string{"true"})
		p.remove()
	}
}

func TestPodInitThatDiesTakesItsPodNotTheDaemon(t *testing.T) {
	need(t)
	w := own(t)
	p, other := w.pod(t), w.pod(t)
	c, bystander := p.run([]string{"sleep"}), other.run([]string{"sleep"})
	first := c.pid()
	init := number(t, procField(first, "PPid")[0])
	kill(t, int(init), 9)
	eventually(t, "the pod is not ready", func() bool {
		return p.status().State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
	eventually(t, "its container has exited", func() bool { return c.status().State == exited })
	eventually(t, "its process is gone", func() bool { s := procField(first, "State"); return s == nil || s[0] == "Z" })
	if st := c.status(); st.ExitCode == 0 || st.Reason == "Completed" {
		t.Errorf("got exit code %d, reason %q: an exit that nobody saw is no success", st.ExitCode, st.Reason)
	}
	bystander.exec("true")
	w.pod(t).output([]string{"true"})
}

func TestStopDrainsRunningCalls(t *testing.T) {
	need(t)
	w := own(t)
	c := w.pod(t).run([]string{"sleep"})
	result := make(chan error, 1)
	conn := w.wide(t) // Stop closes the node's own connection first
	go func() {
		r, err := conn.ExecSync(context.Background(), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/payload", "mkfile", "/begun", "x", ",", "sleep", "0.5", ",", "echo", "done"}, Timeout: 10})
		if err == nil && string(r.Stdout) != "done\n" {
			t.Errorf("got %q", r.Stdout)
		}
		result <- err
	}()
	c.exec("wait", "/begun")
	if err := w.disconnect(); err != nil {
		t.Fatal(err)
	}
	if err := w.Stop(); err != nil {
		t.Error(err)
	}
	if err := <-result; err != nil {
		t.Errorf("a call that ran when SIGTERM came: %v", err)
	}
	w.again(t)
	c.exec("true")
}
