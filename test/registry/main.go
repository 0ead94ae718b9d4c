// Command registry serves the images of package images from loopback, plain
// HTTP, until SIGTERM or SIGINT. It prints one line per image, then "ready".
//
//	registry [-listen 127.0.0.1:5000] [-payload FILE] [-certs-d DIR] [-critest]
//
// With -certs-d it also writes a hosts.toml that sends every registry's names
// here. With -critest the images are those that critest pulls, and the payload's.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/crisp-cri/crisp/test/images"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run() error {
	listen := flag.String("listen", "127.0.0.1:0", "address; port 0: any")
	payload := flag.String("payload", "", "the payload binary; none: it is built")
	certs := flag.String("certs-d", "", "directory for _default/hosts.toml")
	critest := flag.Bool("critest", false, "critest's images, too (fetches Debian packages)")
	flag.Parse()

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)

	reg, err := images.Serve(*listen)
	if err != nil {
		return err
	}
	defer reg.Close()
	dir, err := os.MkdirTemp("", "crisp-registry-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if *payload == "" {
		if *payload, err = images.BuildPayload(dir); err != nil {
			return err
		}
	}
	all := []*images.Image{images.Payload(*payload)}
	if *critest {
		more, err := critestImages(dir)
		if err != nil {
			return err
		}
		all = append(all, more...)
	} else {
		busybox, err := images.Busybox()
		if err != nil {
			return err
		}
		all = append(all, busybox)
	}
	for _, im := range all {
		if err := im.Push(reg.Host); err != nil {
			return err
		}
		for _, n := range im.Names {
			fmt.Printf("%s/%s\n", reg.Host, n)
		}
	}
	if *certs != "" {
		if err := images.WriteDefaultHosts(*certs, reg.Host); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	<-stop
	return nil
}

func critestImages(dir string) ([]*images.Image, error) {
	standin, err := images.BuildStandin(dir)
	if err != nil {
		return nil, err
	}
	root, err := images.Debian(images.BusyboxPackages()...)
	if err != nil {
		return nil, err
	}
	return images.Critest(standin, root)
}
