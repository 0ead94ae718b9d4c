// Command critest runs critest, the Kubernetes project's validation of
// container runtimes, against a crispd of its own, and says what came of it: a line for
// each failure, a closing line of counts. Nothing is fetched: the images are the
// project's own (package images), served on loopback.
//
//	critest [-critest FILE] [-crispd FILE] [-expect FILE] [-out DIR] [-focus REGEXP | -benchmark] [-v] [-- ARGUMENTS OF critest]
//
// A spec that fails, or that skips itself and is not listed in the file of
// expected skips, is a failure of the run. So is what crispd leaves behind.
//
// critest makes System V segments, mounts and listening ports on its host, and
// does not always take them away again. The whole run is therefore fenced in:
// registry, crispd and critest share an IPC, a mount and a network namespace of
// the run's own, where two runs do not meet and of which nothing remains. (The PID
// namespace, cgroups and file systems are the machine's.)
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/leak"
	"github.com/crisp-cri/crisp/test/node"
)

// upstreamDigest is how critest 1.36 names test-image-digest. Nobody can make an
// image of that digest, so a copy of critest runs that has our image's in its place.
const upstreamDigest = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"

// longest is how long critest may run before it says which spec hangs, and gives up.
const longest = 15 * time.Minute

type options struct {
	critest, crispd, expect, out, focus string
	benchmark, verbose                  bool
	args                                []string // for critest

	fenced string // set in the process that is in the run's namespaces: its directory for temporary files
}

func main() {
	var o options
	flag.StringVar(&o.critest, "critest", "out/critest", "critest's test binary")
	flag.StringVar(&o.crispd, "crispd", "bin/crispd", "crispd; crisp-init is beside it")
	flag.StringVar(&o.expect, "expect", "test/critest/expected-skips.txt", "file of the skips to expect")
	flag.StringVar(&o.out, "out", "out", "directory for critest.log, critest.json and crispd.log")
	flag.StringVar(&o.focus, "focus", "", "run only the specs whose name matches this regular expression")
	flag.BoolVar(&o.benchmark, "benchmark", false, "run critest's own benchmarks instead, print a table and keep their JSON in DIR/critest-benchmark")
	flag.BoolVar(&o.verbose, "v", false, "show critest's output as it runs")
	flag.StringVar(&o.fenced, "fenced", "", "not for users")
	flag.Parse()
	o.args = flag.Args()
	runtime.LockOSThread() // children die with the thread that made them (PR_SET_PDEATHSIG(2const)): it has to stay

	run := fence
	if o.fenced != "" {
		run = inside
	}
	good, err := run(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
	}
	if err != nil || !good {
		os.Exit(1)
	}
}

// fence runs this program again in namespaces of its own, as inside. The directory for
// temporary files is removed out here, where none of the run's mounts is:
// removing it in there could reach through one that was left.
func fence(options) (good bool, err error) {
	if os.Geteuid() != 0 {
		return false, errors.New("needs root: pods are made")
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp("", "crisp-critest-")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	cmd := exec.Command(self, append([]string{"-fenced", dir}, os.Args[1:]...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// NEWNS by unshare, not by clone: Go then makes all mounts private, too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Cloneflags: unix.CLONE_NEWIPC | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM}
	// The terminal's Ctrl-C reaches the process inside by itself; it cleans up, and we wait.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return false, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // received below
	for {
		select {
		case s := <-signals:
			if s == syscall.SIGTERM {
				_ = cmd.Process.Signal(s) // it ended: then there is nothing to tell
			}
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.Exited() {
				return false, nil // it said why
			}
			return err == nil, err
		}
	}
}

// inside is the run proper.
func inside(o options) (good bool, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	expected, err := readExpected(o.expect)
	if err != nil {
		return false, err
	}
	if o.out, err = filepath.Abs(o.out); err != nil {
		return false, err
	}
	if err := loopbackUp(); err != nil {
		return false, err
	}

	registry, err := serveImages(o.fenced)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	critest, err := withOurDigest(o.critest, o.fenced)
	if err != nil {
		return false, err
	}
	certs := filepath.Join(o.fenced, "certs.d")
	if err := images.WriteDefaultHosts(certs, registry.Host); err != nil {
		return false, err
	}
	log, err := os.Create(filepath.Join(o.out, "crispd.log"))
	if err != nil {
		return false, err
	}
	defer log.Close()
	n, err := node.New(node.Options{Crispd: o.crispd, Args: []string{"--set", "image.certs_dir=" + certs, "-v", "4"}, Log: log})
	if err != nil {
		return false, err
	}
	defer func() {
		err = errors.Join(err, n.Remove())
		left, lerr := n.Leftovers()
		for _, l := range left {
			err = errors.Join(err, errors.New("left behind: "+l))
		}
		err = errors.Join(err, lerr)
	}()
	if err := n.Start(ctx); err != nil {
		return false, err
	}

	scope := leak.Scope{
		Daemon: n.PID, Dirs: []string{n.StateDir, n.RunDir}, Skip: []string{n.StateDir + "/state/images"}, NetNSDir: n.RunDir + "/netns",
		Cgroups: []string{n.Cgroups}, Bridge: n.Bridge, Tables: []string{n.Table},
	}
	if err := warmUp(ctx, n); err != nil {
		return false, fmt.Errorf("the first pod does not run: %w%s", err, n.LastLog())
	}
	before, err := scope.Take()
	if err != nil {
		return false, err
	}
	var results string
	if o.benchmark {
		args, dir, err := benchmarkArgs(o)
		if err != nil {
			return false, err
		}
		o.args, results = append(args, o.args...), dir
	}
	report, err := runCritest(ctx, o, critest, n)
	if err != nil {
		return false, err
	}
	if o.benchmark {
		if err := printResults(os.Stdout, results); err != nil {
			return false, err
		}
	}
	// Namespaces and v1 cgroups go a moment after the last call.
	settle, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	diff, err := scope.Settle(settle, before)
	if err != nil {
		return false, err
	}
	verdict := judge(report, expected, o.focus == "" && len(o.args) == 0)
	for _, d := range diff {
		if d.Kind != leak.SysV { // critest's own (ipcmk)
			verdict.lines = append(verdict.lines, "LEAK  after critest, with crispd still running: "+d.String())
		}
	}
	if verdict.bad() {
		fmt.Printf("critest's words are in %s, crispd's in %s\n", filepath.Join(o.out, "critest.log"), log.Name())
	}
	verdict.print(os.Stdout)
	return !verdict.bad(), nil
}

// warmUp runs and removes a pod with everything that crispd does once and keeps:
// bridge, nft tables, parents of cgroups. Leaks are what comes on top.
func warmUp(ctx context.Context, n *node.Node) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	image := &runtimeapi.ImageSpec{Image: "registry.example/e2e-test-images/busybox:1.29-2"}
	if _, err := n.CRI.PullImage(ctx, &runtimeapi.PullImageRequest{Image: image}); err != nil {
		return err
	}
	pod := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "warm-up", Uid: "1", Namespace: "critest"},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}},
	}
	p, err := n.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return err
	}
	c, err := n.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.PodSandboxId, SandboxConfig: pod, Config: &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: image, Command: []string{"sleep", "100"},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Privileged: true},
		},
	}})
	if err != nil {
		return err
	}
	if _, err := n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return err
	}
	if _, err := n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ContainerId, Cmd: []string{"true"}, Timeout: 10}); err != nil {
		return err
	}
	if _, err := n.CRI.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{}); err != nil {
		return err
	}
	if err := n.RemovePods(); err != nil {
		return err
	}
	_, err = n.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: image})
	return err
}

// runCritest runs all or the focused specs and returns critest's own report. That
// specs failed is in there and no error.
func runCritest(ctx context.Context, o options, critest string, n *node.Node) (*report, error) {
	log, err := os.Create(filepath.Join(o.out, "critest.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	reportFile := filepath.Join(o.out, "critest.json")
	if err := os.Remove(reportFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Never --parallel: any value makes critest look for a ginkgo binary.
	args := []string{"--runtime-endpoint", n.Endpoint(), "--image-endpoint", n.Endpoint(), "--config", os.DevNull,
		"--ginkgo.no-color", "--ginkgo.json-report", reportFile, "--ginkgo.timeout", longest.String()}
	if o.focus != "" {
		args = append(args, "--ginkgo.focus", o.focus)
	}
	cmd := exec.Command(critest, append(args, o.args...)...)
	cmd.Dir = o.fenced
	cmd.Env = append(os.Environ(), "TMPDIR="+o.fenced)
	cmd.Stdout = io.Writer(log)
	if o.verbose {
		cmd.Stdout = io.MultiWriter(log, os.Stdout)
	}
	cmd.Stderr = cmd.Stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run critest: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // received below
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = cmd.Process.Kill() // it ended: as good
		<-ended
		return nil, ctx.Err()
	}
	r, rerr := readReport(reportFile)
	if rerr != nil {
		return nil, fmt.Errorf("critest ended (%v) without a report: %w; see %s", err, rerr, log.Name())
	}
	return r, nil
}

// serveImages makes critest's images and serves them.
func serveImages(dir string) (_ *images.Registry, err error) {
	standin, err := images.BuildStandin(dir)
	if err != nil {
		return nil, err
	}
	root, err := images.Debian(images.BusyboxPackages()...)
	if err != nil {
		return nil, err
	}
	all, err := images.Critest(standin, root)
	if err != nil {
		return nil, err
	}
	registry, err := images.Serve("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	for _, im := range all {
		if err := im.Push(registry.Host); err != nil {
			return nil, errors.Join(err, registry.Close())
		}
	}
	return registry, nil
}

// withOurDigest copies critest's binary into dir, with our image's digest in it.
func withOurDigest(critest, dir string) (string, error) {
	digest, err := images.CritestDigest()
	if err != nil {
		return "", err
	}
	binary, err := os.ReadFile(critest)
	if err != nil {
		return "", err
	}
	if !bytes.Contains(binary, []byte(upstreamDigest)) {
		return "", fmt.Errorf("%s does not have the digest %s: is it critest 1.36?", critest, upstreamDigest)
	}
	path := filepath.Join(dir, "critest")
	return path, os.WriteFile(path, bytes.ReplaceAll(binary, []byte(upstreamDigest), []byte(digest)), 0o755)
}

// loopbackUp makes 127.0.0.1 work in a new network namespace.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	return nil
}
