package cri

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hanging is a directory on a file system that answers nothing, as a dead network mount does, until wake.
func hanging(t *testing.T) (dir string, wake func()) {
	t.Helper()
	dir = t.TempDir()
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd())
	if err := unix.Mount("crisp-test-hangs", dir, "fuse", unix.MS_NODEV|unix.MS_NOSUID, options); err != nil {
		server.Close()
		t.Fatal(err)
	}
	awake := false
	wake = func() { // all who wait are told that the connection is gone
		if awake {
			return
		}
		awake = true
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(wake)
	return dir, wake
}

// A volume that hangs costs the call that mounts it, until its deadline, and nothing else: not the other pods, not the lists, not
// the pod itself.
func TestHangingVolumeBlocksItsCallOnly(t *testing.T) {
	w := need(t)
	p := w.pod(t).used()
	neighbour := p.run([]string{"sleep"})
	w.leavesNothing(t, func() {
		dir, wake := hanging(t)
		for name, edit := range map[string]editContainer{
			"mount":            withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"}),
			"mount below":      withMounts(&runtimeapi.Mount{HostPath: dir + "/volume", ContainerPath: "/v", Readonly: true, RecursiveReadOnly: true}),
			"mount that moves": withMounts(&runtimeapi.Mount{HostPath: dir + "/a/b", ContainerPath: "/v", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}),
			"device": func(c *runtimeapi.ContainerConfig) {
				c.Devices = []*runtimeapi.Device{{HostPath: dir + "/device", ContainerPath: "/dev/x", Permissions: "r"}}
			},
			"seccomp profile": withSeccomp(runtimeapi.SecurityProfile_Localhost, dir+"/profile.json"),
		} {
			t.Run(name, func(t *testing.T) {
				p := p.on(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				done := make(chan error, 1)
				cfg := p.config([]string{"sleep"}, edit)
				go func() { // ends with ctx
					_, err := w.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
					done <- err
				}()
				// Meanwhile, everything else: each call has the test's deadline only to fail by.
				if _, err := w.rt.ListContainers(t.Context(), nil); err != nil {
					t.Error(err)
				}
				if got := neighbour.exec("echo", "alive"); got != "alive\n" {
					t.Errorf("exec in the same pod: got %q", got)
				}
				same := p.run([]string{"sleep"})
				same.stop(0)
				same.remove()
				other := w.pod(t)
				other.used()
				other.remove()
				select {
				case err := <-done:
					t.Errorf("the call ended by itself: %v", err)
				default:
				}
				cancel()
				wantCode(t, <-done, codes.Canceled)
			})
		}
		// With a deadline of its own, and the pod stopped while the call hangs.
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		cfg := p.config([]string{"sleep"}, withMounts(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/v"}))
		_, err := w.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
		wantCode(t, err, codes.DeadlineExceeded)
		q := w.pod(t).used()
		stopped, forget := context.WithCancel(t.Context())
		defer forget()
		hung := make(chan error, 1)
		go func() { // ends with the pod, or with stopped
			_, err := w.CRI.CreateContainer(stopped, &runtimeapi.CreateContainerRequest{PodSandboxId: q.id, Config: cfg, SandboxConfig: q.cfg})
			hung <- err
		}()
		q.remove()
		forget()
		if err := <-hung; err == nil {
			t.Error("a container was made in a pod that is removed")
		}
		wake()
	})
}
