// Command demo shows one pod, end to end, through the real CRI socket: what
// `make demo` runs (as root; hack/demo.sh builds what it needs).
//
// It starts a registry on loopback with an image of the project's own payload, a
// crispd with its own roots, bridge, nft table and cgroups, does what a kubelet
// would, shows what came of it, takes everything away again and checks that
// nothing is left. All names carry one random tag, so that demos, and whatever
// else runs on this machine, do not meet.
//
//	demo -crispd bin/crispd -payload out/payload
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/crisp-cri/crisp/test/images"
)

func main() {
	crispd := flag.String("crispd", "bin/crispd", "the daemon; crisp-init is beside it")
	payload := flag.String("payload", "out/payload", "test/payload, static")
	verbose := flag.Bool("v", false, "show crispd's log")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *crispd, *payload, *verbose); err != nil {
		out.bad("%v", err)
		os.Exit(1)
	}
}

// world is everything the demo makes; its names carry the tag.
type world struct {
	tag                    string
	state, runDir, logs    string // directories
	socket                 string
	bridge, table, cgroups string
	crispd, payload        string
	verbose                bool

	pids map[int]string // processes of the pod and crispd → start time, to look for afterwards
}

func newWorld(crispd, payload string, verbose bool) *world {
	b := make([]byte, 3)
	rand.Read(b) // never fails (crypto/rand)
	tag := hex.EncodeToString(b)
	runDir := "/run/crisp-demo-" + tag
	return &world{
		tag: tag, crispd: crispd, payload: payload, verbose: verbose,
		state:  "/var/tmp/crisp-demo-" + tag,
		runDir: runDir, logs: runDir + "/logs", socket: runDir + "/crisp.sock",
		bridge: "crisp-" + tag, table: "crisp_demo_" + tag, cgroups: "/crisp-demo-" + tag,
		pids: map[int]string{},
	}
}

func run(ctx context.Context, crispd, payload string, verbose bool) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes namespaces, mounts and cgroups: run it as root")
	}
	began := time.Now()
	w := newWorld(crispd, payload, verbose)
	out.title("crisp: a pod runs")
	for _, dir := range []string{w.state, w.runDir, w.logs} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	var undo undoList
	undo.add("directories", func(context.Context) error { return errors.Join(os.RemoveAll(w.state), os.RemoveAll(w.runDir)) })
	// Everything below is undone in reverse order, also after a failure; a failed demo leaves nothing either.
	defer func() {
		out.section("cleaning up")
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, undo.run(cleanup))
		left := w.leftovers()
		for _, l := range left {
			out.bad("left behind: %s", l)
		}
		if len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("%d things were left behind", len(left)))
		} else {
			out.good("nothing is left: no process, mount, network namespace, link, nft table, cgroup or file")
		}
		if err == nil {
			out.note("the whole demo took %s", time.Since(began).Round(time.Millisecond))
		}
	}()

	reg, err := images.Serve("127.0.0.1:0")
	if err != nil {
		return err
	}
	undo.add("registry", func(context.Context) error { return reg.Close() })
	image := images.Payload(w.payload)
	if err := image.Push(reg.Host); err != nil {
		return err
	}

	steps := &stopwatch{}
	var d *daemon
	if err := steps.time("start crispd", func() (err error) { d, err = w.startDaemon(ctx); return err }); err != nil {
		return err
	}
	undo.add("bridge and nft table", func(context.Context) error { return w.removeNetwork() })
	undo.add("crispd", func(context.Context) error { return d.stop() })

	p := &pod{world: w, cri: d.client, steps: steps, image: reg.Host + "/" + image.Names[0]}
	if err := p.up(ctx, &undo); err != nil {
		return fmt.Errorf("%w%s", err, d.lastLog())
	}
	w.remember(d.process.Pid)
	if err := p.show(ctx); err != nil {
		return fmt.Errorf("%w%s", err, d.lastLog())
	}
	if err := p.down(ctx); err != nil {
		return fmt.Errorf("%w%s", err, d.lastLog())
	}
	out.section("how long each step took")
	steps.print()
	return nil
}

// undoList is what has to be undone, last first.
type undoList []struct {
	name string
	undo func(context.Context) error
}

func (u *undoList) add(name string, undo func(context.Context) error) {
	*u = append(*u, struct {
		name string
		undo func(context.Context) error
	}{name, undo})
}

// run undoes everything, whatever fails.
func (u *undoList) run(ctx context.Context) error {
	var errs []error
	for i := len(*u) - 1; i >= 0; i-- {
		if err := (*u)[i].undo(ctx); err != nil {
			errs = append(errs, fmt.Errorf("cannot remove %s: %w", (*u)[i].name, err))
		}
	}
	*u = nil
	return errors.Join(errs...)
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.runDir}, elem...)...)
}
