// Package cri drives a real crispd through the kubelet's own client
// (k8s.io/cri-client: its validation, time-outs and receive limit) and looks at
// what the kernel says afterwards.
//
// One crispd serves the whole suite (package node: its own roots, bridge, nft
// table and cgroups); tests that stop or kill it start one of their own. Before
// the first and after the last test the leak check of package leak compares
// everything the daemon could have left behind, and tests of failing calls do
// so around each call.
//
// The tests need root. They run what package images builds from test/payload;
// nothing is fetched from anywhere.
package cri

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	criclient "k8s.io/cri-client/pkg"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/leak"
	"github.com/crisp-cri/crisp/test/node"

	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	daemonLog = flag.Bool("daemonlog", false, "print the daemon's log as it is written")
	cycles    = flag.Int("cycles", 30, "pods to run and remove in TestPodCyclesLeaveNothing")
)

// payloadRef is the image of test/payload. Any registry's name leads to the one
// on loopback (certs.d/_default), so it is one that does not exist.
const payloadRef = "registry.example/crisp/payload:1"

// suite is what all tests share. It is nil without root.
var suite *world

// world is a crispd with what is needed to talk to it.
type world struct {
	*node.Node
	rt       internalapi.RuntimeService      // the kubelet's client
	im       internalapi.ImageManagerService // the same, of images
	image    string                          // id of payloadRef
	registry *images.Registry
	crispd   string // the binary
	certs    string // certs.d
	next     int    // number of the next pod
}

func TestMain(m *testing.M) {
	flag.Parse()
	// TestManyStreamingSessions, the only one with parallel subtests, means all of them at once, on any machine.
	if err := flag.Set("test.parallel", "100"); err != nil {
		panic(err)
	}
	klog.SetLogger(logr.Discard()) // the client logs each error that a test wants
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // every test skips and says why
	}
	code, err := runSuite(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

func runSuite(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "crisp-cri-suite-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	crispd := os.Getenv("CRISPD") // a binary to test instead of one that is built now
	if crispd == "" {
		// Not node.Build: crispd's dependencies are those of the module above.
		if out, err := exec.Command("../../hack/build.sh", dir).CombinedOutput(); err != nil {
			return 1, fmt.Errorf("cannot build crispd: %w\n%s", err, out)
		}
		crispd = filepath.Join(dir, "crispd")
	}
	payload, err := images.BuildPayload(dir)
	if err != nil {
		return 1, err
	}
	registry, err := images.Serve("127.0.0.1:0")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	if err := images.Payload(payload).Push(registry.Host); err != nil {
		return 1, err
	}
	certs := filepath.Join(dir, "certs.d")
	if err := images.WriteDefaultHosts(certs, registry.Host); err != nil {
		return 1, err
	}

	w, err := newWorld(crispd, certs, registry)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.warmUp(); err != nil {
		return 1, fmt.Errorf("the first pod does not run: %w%s", err, w.LastLog())
	}
	before, err := w.scope().Take()
	if err != nil {
		return 1, err
	}
	suite = w
	code = m.Run()

	// Namespaces and v1 cgroups go a moment after the last call.
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	diff, err := w.scope().Settle(ctx, before)
	if err == nil && len(diff) > 0 {
		err = fmt.Errorf("after all tests:\n%s", leak.Format(diff, 50))
	}
	if code != 0 || err != nil {
		fmt.Fprintln(os.Stderr, w.LastLog())
	}
	return code, err
}

// newWorld starts a crispd and pulls the payload's image.
func newWorld(crispd, certs string, registry *images.Registry, args ...string) (*world, error) {
	o := node.Options{Crispd: crispd, Args: append([]string{"--set", "image.certs_dir=" + certs}, args...)}
	if *daemonLog {
		o.Log = os.Stderr
	}
	n, err := node.New(o)
	if err != nil {
		return nil, err
	}
	w := &world{Node: n, registry: registry, crispd: crispd, certs: certs}
	if err := w.start(); err != nil {
		return nil, errors.Join(err, n.Remove())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if w.image, err = w.im.PullImage(ctx, &runtimeapi.ImageSpec{Image: payloadRef}, nil, nil); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

// start starts crispd, again too, and connects as the kubelet does.
func (w *world) start() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := w.Node.Start(ctx); err != nil {
		return err
	}
	var err error
	if w.rt, err = criclient.NewRemoteRuntimeServiceBuilder().WithEndpoint(w.Endpoint()).WithConnectionTimeout(2 * time.Minute).Build(ctx); err != nil {
		return errors.Join(err, w.Kill())
	}
	if w.im, err = criclient.NewRemoteImageServiceBuilder().WithEndpoint(w.Endpoint()).WithConnectionTimeout(2 * time.Minute).Build(ctx); err != nil {
		return errors.Join(err, w.Kill())
	}
	return nil
}

// disconnect closes the kubelet's connections; stop and kill are of the node.
func (w *world) disconnect() error {
	var errs []error
	if w.rt != nil {
		errs = append(errs, w.rt.Close(context.Background()))
	}
	if w.im != nil {
		errs = append(errs, w.im.Close(context.Background()))
	}
	w.rt, w.im = nil, nil
	return errors.Join(errs...)
}

// close takes everything away and wants nothing to be left.
func (w *world) close() error {
	err := errors.Join(w.disconnect(), w.Node.Remove())
	left, lerr := w.Leftovers()
	for _, l := range left {
		err = errors.Join(err, fmt.Errorf("left behind by crispd's node: %s", l))
	}
	return errors.Join(err, lerr)
}

// scope is what belongs to this crispd.
func (w *world) scope() leak.Scope {
	return leak.Scope{
		// Logs are the kubelet's to remove.
		Daemon: w.PID, Dirs: []string{w.StateDir, w.RunDir}, Skip: []string{w.LogDir}, NetNSDir: filepath.Join(w.RunDir, "netns"),
		Cgroups: []string{w.Cgroups}, Bridge: w.Bridge, LinkPrefixes: w.LinkPrefixes(), Tables: []string{w.Table},
	}
}

// warmUp runs a pod with everything that a daemon does only once: bridge, nft
// table, cgroup parent, profile caches.
func (w *world) warmUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := w.CRI.Version(ctx, &runtimeapi.VersionRequest{}); err != nil { // the connection is made by the first call
		return err
	}
	pc := w.podConfig("warm-up")
	id, err := w.rt.RunPodSandbox(ctx, pc, "")
	if err != nil {
		return err
	}
	cc := w.containerConfig("c", "sleep")
	cc.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	c, err := w.rt.CreateContainer(ctx, id, cc, pc)
	if err == nil {
		err = w.rt.StartContainer(ctx, c)
	}
	if err == nil {
		_, _, err = w.rt.ExecSync(ctx, c, []string{"/payload", "true"}, 10*time.Second)
	}
	err = errors.Join(err, w.rt.StopPodSandbox(ctx, id), w.rt.RemovePodSandbox(ctx, id), os.RemoveAll(pc.LogDirectory))
	// And many at a time: threads and sockets of the busiest moment stay.
	var wg sync.WaitGroup
	errs := make([]error, 24)
	for i := range errs {
		cfg := w.podConfig("warm-up")
		wg.Go(func() { errs[i] = w.life(ctx, cfg) })
	}
	wg.Wait()
	return errors.Join(err, errors.Join(errs...))
}
