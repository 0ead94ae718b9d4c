// Command demo shows one pod, end to end, through the real CRI socket: what
// `make demo` runs (as root; hack/demo.sh builds what it needs).
//
// It starts a registry on loopback with an image of the project's own payload, a
// crispd with its own roots, bridge, nft table and cgroups, does what a kubelet
// would, shows what came of it, takes everything away again and checks that
// nothing is left. All names carry one random tag, so that demos, and whatever
// else runs on this machine, do not meet (package node).
//
//	demo -crispd bin/crispd -payload out/payload
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/node"
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

func run(ctx context.Context, crispd, payload string, verbose bool) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes namespaces, mounts and cgroups: run it as root")
	}
	began := time.Now()
	out.title("crisp: a pod runs")
	options := node.Options{Crispd: crispd}
	if verbose {
		options.Log = os.Stderr
	}
	n, err := node.New(options)
	if err != nil {
		return err
	}
	reg, err := images.Serve("127.0.0.1:0")
	if err != nil {
		return errors.Join(err, n.Remove())
	}
	// A failed demo leaves nothing behind either.
	defer func() {
		out.section("cleaning up")
		err = errors.Join(err, n.Remove(), reg.Close())
		left, lerr := n.Leftovers()
		err = errors.Join(err, lerr)
		for _, l := range left {
			out.bad("left behind: %s", l)
		}
		switch {
		case len(left) > 0:
			err = errors.Join(err, fmt.Errorf("%d things were left behind", len(left)))
		case lerr == nil:
			out.good("nothing is left: no process, mount, network namespace, link, nft table, cgroup or file")
		}
		if err == nil {
			out.note("the whole demo took %s", time.Since(began).Round(time.Millisecond))
		}
	}()

	image := images.Payload(payload)
	if err := image.Push(reg.Host); err != nil {
		return err
	}
	p := &pod{Node: n, steps: &stopwatch{}, image: reg.Host + "/" + image.Names[0]}
	for _, stage := range []func(context.Context) error{p.start, p.up, p.show, p.down} {
		if err := stage(ctx); err != nil {
			return fmt.Errorf("%w%s", err, n.LastLog())
		}
	}
	out.section("how long each step took")
	p.steps.print()
	return nil
}
