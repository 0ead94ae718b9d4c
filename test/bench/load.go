package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// load is what is measured of a runtime besides pods one after another. Zero: not measured.
type load struct {
	spdy []time.Duration // exec of /true over SPDY, one after another
	log  float64         // stdout into the container's log, MB/s, the producer included; best of a few
	copy float64         // the same bytes from a pipe into a file, by io.Copy's system calls: what is possible

	pods        int             // that were held
	first, last []time.Duration // "up" of the first and last fifth of them
	few         int             // of them
	lists       map[string][2]time.Duration
	memory      int64         // bytes per pod (PSS of everything but the workload, a peer's daemon not counted)
	restart     time.Duration // kill -9 to serving, with the pods
	rate        float64       // pods per second, eight at a time
}

// listed are the calls whose time is to grow with the pods only: with load.few and with load.pods.
var listed = []string{"ListPodSandbox", "ListContainers", "ListContainerStats", "ListPodSandboxMetrics"}

// fastest of a few calls: what else the machine does can only add to it.
func fastest(times int, call func() error) (time.Duration, error) {
	best := time.Duration(0)
	for range times {
		began := time.Now()
		if err := call(); err != nil {
			return 0, err
		}
		if took := time.Since(began); best == 0 || took < best {
			best = took
		}
	}
	return best, nil
}

func (r *runtimeTarget) list(ctx context.Context, what string) error {
	var err error
	switch what {
	case "ListPodSandbox":
		_, err = r.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	case "ListContainers":
		_, err = r.cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	case "ListContainerStats":
		_, err = r.cri.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	case "ListPodSandboxMetrics":
		_, err = r.cri.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
	}
	return err
}

// measureLoad runs all of it and leaves no pod.
func (r *runtimeTarget) measureLoad(ctx context.Context, o options) (l load, err error) {
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.alone(ctx, o, &l); err != nil {
		return l, fmt.Errorf("one pod: %w", err)
	}
	if err := r.hold(ctx, o, &l); err != nil {
		return l, fmt.Errorf("hold pods: %w", err)
	}
	if err := r.close(); err != nil {
		return l, err
	}
	if err := r.together(ctx, o, &l); err != nil {
		return l, fmt.Errorf("eight at a time: %w", err)
	}
	return l, nil
}

// alone measures what one pod is enough for.
func (r *runtimeTarget) alone(ctx context.Context, o options, l *load) error {
	pod, container, err := r.up(ctx, "alone", func(string) {})
	if pod != "" {
		r.held = append(r.held, pod)
	}
	if err != nil {
		return err
	}
	if o.spdy != "" {
		out, err := exec.CommandContext(ctx, o.spdy, r.endpoint, container, strconv.Itoa(o.n)).Output()
		if err != nil {
			return fmt.Errorf("%s: %w", o.spdy, err)
		}
		for _, f := range strings.Fields(string(out)) {
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return err
			}
			l.spdy = append(l.spdy, time.Duration(n))
		}
	}
	for i := range uint32(3) { // the best: what else the machine does can only make it less
		log, err := r.spam(ctx, o, pod, i)
		if err != nil {
			return err
		}
		alone, err := o.pipeToFile(ctx, filepath.Join(r.logs, "copy"))
		if err != nil {
			return err
		}
		l.log, l.copy = max(l.log, log), max(l.copy, alone)
	}
	return nil
}

// What a container prints: lines of 100 bytes, a usual length.
const spamLine = 100

// spam measures a container's output on its way into the log: from the container's start to the last change of the file.
func (r *runtimeTarget) spam(ctx context.Context, o options, pod string, attempt uint32) (mbPerSecond float64, err error) {
	config := r.sandbox("alone")
	log := filepath.Join(config.LogDirectory, "spam.log")
	defer os.Remove(log)
	create, err := r.cri.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: pod, SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "spam", Attempt: attempt}, Image: &runtimeapi.ImageSpec{Image: r.image}, LogPath: "spam.log",
			Command: []string{"/payload", "spam", strconv.Itoa(o.lines), strconv.Itoa(spamLine - 1)},
			Linux:   &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: namespaces}},
		},
	})
	if err != nil {
		return 0, err
	}
	if _, err := r.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: create.ContainerId}); err != nil {
		return 0, err
	}
	for {
		status, err := r.cri.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: create.ContainerId})
		if err != nil {
			return 0, err
		}
		if s := status.Status; s.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			if s.ExitCode != 0 {
				return 0, fmt.Errorf("spam exited with %d", s.ExitCode)
			}
			if lines, err := count(log); err != nil || lines > o.lines {
				return 0, fmt.Errorf("the log has %d lines, want %d: %w", lines, o.lines, err)
			} else if lines == o.lines {
				st, err := os.Stat(log)
				if err != nil {
					return 0, err
				}
				return float64(o.lines*spamLine) / 1e6 / st.ModTime().Sub(time.Unix(0, s.StartedAt)).Seconds(), nil
			}
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil { // there is no event for the last line
			return 0, err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// count reads a log's lines.
func count(path string) (lines int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		lines += bytes.Count(buf[:n], []byte{'\n'})
		if n == 0 || err != nil {
			return lines, nil
		}
	}
}

// pipeToFile is spam without a runtime: read from a pipe, written to a file.
func (o *options) pipeToFile(ctx context.Context, path string) (mbPerSecond float64, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer os.Remove(path)
	defer f.Close()
	cmd := exec.CommandContext(ctx, o.payload, "spam", strconv.Itoa(o.lines), strconv.Itoa(spamLine-1))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	buf := make([]byte, 64<<10)
	for {
		n, rerr := out.Read(buf)
		if _, err := f.Write(buf[:n]); err != nil {
			return 0, err
		}
		if rerr != nil {
			break
		}
	}
	took := time.Since(began)
	return float64(o.lines*spamLine) / 1e6 / took.Seconds(), cmd.Wait()
}

// hold makes pods that stay.
func (r *runtimeTarget) hold(ctx context.Context, o options, l *load) error {
	l.pods, l.lists = o.pods, map[string][2]time.Duration{}
	if r.node == nil {
		l.pods = min(o.pods, o.peerPods)
	}
	l.few = max(1, l.pods/10)
	alone := r.held // before that one is measured as memory of the many
	r.held = nil
	for _, pod := range alone {
		if _, err := r.cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			return err
		}
	}
	before := int64(0)
	var err error
	if r.pid != 0 {
		if before, err = pss(r.pid); err != nil {
			return err
		}
	}
	for i := range l.pods {
		began := time.Now()
		pod, _, err := r.up(ctx, "held"+strconv.Itoa(i), func(string) {})
		if pod != "" {
			r.held = append(r.held, pod)
		}
		if err != nil {
			return err
		}
		took := time.Since(began)
		if i < l.pods/5 {
			l.first = append(l.first, took)
		}
		if i >= l.pods-l.pods/5 {
			l.last = append(l.last, took)
		}
		if n := i + 1; n == l.few || n == l.pods {
			at := 0
			if n == l.pods {
				at = 1
			}
			for _, what := range listed {
				took, err := fastest(10, func() error { return r.list(ctx, what) })
				if err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
				pair := l.lists[what]
				pair[at] = took
				l.lists[what] = pair
			}
		}
	}
	if l.memory, err = r.memory(before, l.pods); err != nil {
		return err
	}
	if r.node == nil {
		return nil
	}
	began := time.Now()
	if err := r.node.Kill(); err != nil {
		return err
	}
	if err := r.node.Start(ctx); err != nil {
		return err
	}
	l.restart = time.Since(began)
	r.cri, r.pid = r.node.CRI, r.node.PID
	ready, err := r.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{}}})
	if err == nil && len(ready.Items) != l.pods {
		err = fmt.Errorf("%d pods are ready after the restart, want %d", len(ready.Items), l.pods)
	}
	return err
}

// memory counts what runs beside the workload: crispd's growth and its pod inits; of a
// peer only the shims, without its pause processes and daemon, which flatters it.
func (r *runtimeTarget) memory(before int64, pods int) (perPod int64, err error) {
	sum := int64(0)
	if r.pid != 0 {
		after, err := pss(r.pid)
		if err != nil {
			return 0, err
		}
		sum = max(0, after-before)
	}
	pids, err := processes(r.helper)
	if err != nil {
		return 0, err
	}
	if len(pids) == 0 {
		return 0, fmt.Errorf("found no process with %q in its command line", r.helper)
	}
	for _, pid := range pids {
		n, err := pss(pid)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum / int64(pods), nil
}

// workers at a time.
const workers = 8

// together makes pods by several callers at once.
func (r *runtimeTarget) together(ctx context.Context, o options, l *load) error {
	var mu sync.Mutex // of r.held and errs
	var errs []error
	var calls sync.WaitGroup
	next := make(chan int)
	began := time.Now()
	for range workers {
		calls.Go(func() {
			for i := range next {
				pod, _, err := r.up(ctx, "together"+strconv.Itoa(i), func(string) {})
				mu.Lock()
				if pod != "" {
					r.held = append(r.held, pod)
				}
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	for i := range l.pods {
		next <- i
	}
	close(next)
	calls.Wait()
	l.rate = float64(l.pods) / time.Since(began).Seconds()
	return errors.Join(errs...)
}

// close removes the pods that are there.
func (r *runtimeTarget) close() error {
	var mu sync.Mutex // of errs
	var errs []error
	var calls sync.WaitGroup
	next := make(chan string)
	for range workers {
		calls.Go(func() {
			for pod := range next {
				_, err := r.cri.RemovePodSandbox(context.Background(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	for _, pod := range r.held {
		next <- pod
	}
	close(next)
	calls.Wait()
	r.held = nil
	return errors.Join(errs...)
}

// printLoads writes a table in Markdown.
func printLoads(names []string, loads []load) {
	fmt.Print("\n| |")
	for _, n := range names {
		fmt.Printf(" %s |", n)
	}
	fmt.Print("\n|---|" + strings.Repeat("---|", len(names)) + "\n")
	row := func(label string, cell func(l *load) string) {
		fmt.Printf("| %s |", label)
		for i := range loads {
			fmt.Printf(" %s |", cell(&loads[i]))
		}
		fmt.Println()
	}
	row("exec over SPDY, ms p10 / p50 / p95", func(l *load) string {
		if len(l.spdy) == 0 {
			return "–"
		}
		return fmt.Sprintf("%.2f / %.2f / %.2f", ms(percentile(l.spdy, 10)), ms(percentile(l.spdy, 50)), ms(percentile(l.spdy, 95)))
	})
	row("stdout into the log, MB/s (pipe to file without a runtime)", func(l *load) string { return fmt.Sprintf("%.0f (%.0f)", l.log, l.copy) })
	row("pods held for what follows", func(l *load) string { return strconv.Itoa(l.pods) })
	row("memory per pod, KiB of PSS", func(l *load) string { return strconv.FormatInt(l.memory>>10, 10) })
	row("up of the first fifth, of the last, ms p50", func(l *load) string {
		return fmt.Sprintf("%.1f, %.1f", ms(percentile(l.first, 50)), ms(percentile(l.last, 50)))
	})
	for _, what := range listed {
		row(what+", ms, best of 10; with a tenth of the pods", func(l *load) string {
			return fmt.Sprintf("%.2f; %.2f", ms(l.lists[what][1]), ms(l.lists[what][0]))
		})
	}
	row("kill -9 of the daemon to serving again, ms", func(l *load) string {
		if l.restart == 0 {
			return "–"
		}
		return fmt.Sprintf("%.0f", ms(l.restart))
	})
	row("pods per second, eight at a time", func(l *load) string { return fmt.Sprintf("%.0f", l.rate) })
}
