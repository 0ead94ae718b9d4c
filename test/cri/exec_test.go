package cri

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criclient "k8s.io/cri-client/pkg"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestExecSyncReturnsBothStreamsAndTheExitCode(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	r, err := c.try("echo", "out", ",", "err", "err", ",", "part", "no newline", ",", "exit", "7")
	if err != nil {
		t.Fatal(err)
	}
	if string(r.Stdout) != "out\nno newline" || string(r.Stderr) != "err\n" || r.ExitCode != 7 {
		t.Errorf("got stdout %q, stderr %q, exit code %d", r.Stdout, r.Stderr, r.ExitCode)
	}
	if st := c.status(); st.State != running {
		t.Errorf("the container: got %v, want RUNNING", st.State)
	}
	// Probes never write to the container's log.
	if data := readFile(t, c.logFile()); strings.Contains(data, "out") {
		t.Errorf("an exec's output is in the log: %q", data)
	}
}

func TestExecSyncOfAMissingProgramFails(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"sleep"})
	for _, cmd := range []string{"/no/such", "no-such", "/etc/passwd", "/etc"} {
		w.leavesNothing(t, func() {
			_, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{cmd}, Timeout: 10})
			if err == nil || !strings.Contains(err.Error(), cmd) {
				t.Errorf("%s: got %v, want an error that names it", cmd, err)
			}
		})
	}
	_, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id})
	wantCode(t, err, codes.InvalidArgument)
}

func TestExecSyncNeedsARunningContainer(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.create([]string{"exit", "0"})
	_, err := c.try("true")
	wantCode(t, err, codes.FailedPrecondition, c.cfg.Metadata.Name)
	c.start()
	c.wait()
	_, err = c.try("true")
	wantCode(t, err, codes.FailedPrecondition, c.cfg.Metadata.Name)
}

func TestExecSyncTimeoutKillsExactlyTheExecdTree(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"fork", "2", ",", "sleep"})
	eventually(t, "the container's three processes run", func() bool { return len(c.pids()) == 3 })
	before := c.pids()
	start := time.Now()
	_, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Timeout: 1,
		Cmd: []string{"/payload", "fork", "3", ",", "daemonize", ",", "ignore"}})
	wantCode(t, err, codes.DeadlineExceeded)
	if d := time.Since(start); d < time.Second || d > 4*time.Second {
		t.Errorf("took %v, want about 1s", d)
	}
	eventually(t, "only the container's own processes are left", func() bool {
		after := c.pids()
		if len(after) != len(before) {
			return false
		}
		for i := range after {
			if after[i] != before[i] {
				t.Fatalf("got processes %v, want %v", after, before)
			}
		}
		return true
	})
	// What the kubelet makes of it: a failed probe, no error.
	_, _, err = w.rt.ExecSync(t.Context(), c.id, []string{"/payload", "sleep"}, time.Second)
	if !errors.Is(err, criclient.ErrCommandTimedOut) {
		t.Errorf("got %v, want the kubelet's ErrCommandTimedOut", err)
	}
	c.exec("true")
}

func TestExecSyncKeeps16MiBOfEachStream(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	lines := 17 << 20 / 1024
	start := time.Now()
	r, err := w.wide(t).ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Timeout: 30,
		Cmd: []string{"/payload", "spam", itoa(lines), "1023", ",", "exit", "3"}})
	if err != nil {
		t.Fatal(err)
	}
	// The whole reply must fit into what the kubelet's client takes, 16 MiB.
	if n := len(r.Stdout); n > 16<<20 || n < 16<<20-64<<10 || r.ExitCode != 3 {
		t.Errorf("got %d bytes, exit code %d; want nearly %d, 3: what is more is read and dropped", n, r.ExitCode, 16<<20)
	}
	if !bytes.HasPrefix(r.Stdout, []byte("0....")) {
		t.Errorf("it is not the start that is kept: %q", r.Stdout[:min(20, len(r.Stdout))])
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("took %v", d)
	}
	out, _, err := w.rt.ExecSync(t.Context(), c.id, []string{"/payload", "spam", itoa(lines), "1023"}, 30*time.Second)
	if err != nil || len(out) < 16<<20-64<<10 {
		t.Errorf("the kubelet's client got %d bytes, %v", len(out), err)
	}
}

func TestExecSyncDoesNotWaitForABackgroundChild(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	start := time.Now()
	r, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Timeout: 20, Cmd: []string{"/payload", "echo", "before", ",", "daemonize"}})
	if err != nil {
		t.Fatal(err)
	}
	// SEC-93: at most 2 s after its exit, however long a child keeps the pipe.
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("took %v: it waited for a child that keeps stdout", d)
	}
	if r.ExitCode != 0 || !strings.HasPrefix(string(r.Stdout), "before\n") {
		t.Errorf("got %q, exit code %d", r.Stdout, r.ExitCode)
	}
}

func TestExecSyncWithoutATimeoutEndsWithItsCaller(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"sleep"})
	eventually(t, "the container's process runs", func() bool { return len(c.pids()) == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := w.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/payload", "ignore"}}); err == nil {
		t.Error("it succeeded")
	}
	eventually(t, "the exec'd process is gone", func() bool { return len(c.pids()) == 1 })
}

func TestManyExecsAtOnce(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	c := p.run([]string{"sleep"})
	many := func() {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range 20 {
					r, err := c.try("echo", itoa(i), ",", "exit", itoa(i))
					if err != nil || string(r.Stdout) != itoa(i)+"\n" || r.ExitCode != int32(i) {
						t.Errorf("got %v, %v; want %d", r, err, i)
					}
				}
			})
		}
		wg.Wait()
	}
	many() // Go keeps the threads that so many calls at once need
	w.leavesNothing(t, many)
}

func TestExecIsInTheContainer(t *testing.T) {
	w := need(t)
	c := w.pod(t).run([]string{"mkdir", "/mine", ",", "sleep"}, func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "MINE", Value: []byte("yes")}}
	})
	c.exec("wait", "/mine")
	for _, ns := range []string{"net", "ipc", "uts", "pid", "mnt", "cgroup", "user"} {
		host, err := os.Readlink("/proc/" + itoa(c.pid()) + "/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		var inode string
		for line := range strings.Lines(c.exec("ns")) {
			if f := strings.Fields(line); f[0] == ns {
				inode = f[1]
			}
		}
		if want := host[strings.IndexByte(host, '[')+1 : len(host)-1]; inode != want {
			t.Errorf("%s: exec is in %s, the container in %s", ns, inode, want)
		}
	}
	if got := c.exec("env", "MINE"); got != "yes\n" {
		t.Errorf("environment: got %q", got)
	}
	if got := c.exec("stat", "/proc/1/exe"); !strings.Contains(got, "-> /payload") {
		t.Errorf("PID 1: got %q", got)
	}
	if got := c.exec("status"); statusField(got, "PPid")[0] != "0" {
		t.Errorf("the exec'd process has a parent it can see: %q", statusField(got, "PPid"))
	}
}
