package cri

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

// volume mounts an image, or what sub leads to in it, at /v, as the kubelet does.
func volume(image, sub string) editContainer {
	return withMounts(&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: image}, ImageSubPath: sub, ContainerPath: "/v", Readonly: true})
}

// models is an image with nothing to run in it: two layers, the upper one changes and removes things of the lower one.
var models = [][]images.File{
	{{Name: "weights", Text: "1\n", Mode: 0o640, UID: 7, GID: 8}, {Name: "gone", Text: "1\n"}, {Name: "dir", Dir: true}, {Name: "dir/a", Text: "1\n"}},
	{{Name: "dir/a", Text: "2\n"}, {Name: "gone", Whiteout: true}, {Name: "nothing", Whiteout: true},
		{Name: "to-dir", Symlink: "/dir"}, {Name: "out", Symlink: "../../../../etc"}, {Name: "to-file", Symlink: "dir/../weights"}, {Name: "dangling", Symlink: "/nowhere"}},
}

func TestImageVolume(t *testing.T) {
	w := need(t)
	id, ref := w.forge(t, "models", images.Image{Layers: models})
	one, _ := w.forge(t, "model", images.Image{Layers: [][]images.File{{{Name: "weights", Text: "one\n"}, {Name: "below-nothing", Whiteout: true}}}})
	p := w.pod(t)
	c := p.run([]string{"sleep"}, withMounts(
		&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: ref}, ContainerPath: "/by-id", Readonly: true},
		&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: ref}, ContainerPath: "/by-name", Readonly: true, MountOptions: []string{"noexec"}},
		// The kubelet sends the pod's mappings with every mount.
		&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: one}, ContainerPath: "/one", Readonly: true, RecursiveReadOnly: true,
			UidMappings: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}}, GidMappings: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}}},
		&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: w.image}, ContainerPath: "/program", Readonly: true},
	))
	for _, dir := range []string{"/by-id", "/by-name"} {
		if got := c.exec("ls", dir); got != "dangling\ndir\nout\nto-dir\nto-file\nweights\n" {
			t.Errorf("%s: got %q", dir, got)
		}
		if got := c.exec("cat", dir+"/weights", dir+"/dir/a"); got != "1\n2\n" {
			t.Errorf("%s: got %q", dir, got)
		}
		if got := c.exec("stat", dir+"/weights"); !strings.Contains(got, "mode=0100640 uid=7 gid=8") {
			t.Errorf("%s: got %q", dir, got)
		}
	}
	if got := c.exec("ls", "/one"); got != "weights\n" {
		t.Errorf("an image of one layer: got %q", got)
	}
	for _, dir := range []string{"/by-id", "/by-name", "/one", "/program"} {
		if msg := c.fails("touch", dir+"/x"); !strings.Contains(msg, "read-only") {
			t.Errorf("%s: got %q, want EROFS", dir, msg)
		}
		if line := mountLine(c.exec("mountinfo"), dir); !strings.Contains(line, " ro,") || strings.Contains(line, "noexec") != (dir == "/by-name") {
			t.Errorf("got %q, want it read-only, and noexec only where asked for", line)
		}
	}
	// Not noexec by itself.
	if r, err := w.execSync(t, &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/program/payload", "true"}, Timeout: 20}); err != nil || r.ExitCode != 0 {
		t.Errorf("a program of an image volume: got %v, %v", r, err)
	}
	for i, m := range c.status().Mounts {
		want := c.cfg.Mounts[i]
		if m.ContainerPath != want.ContainerPath || m.GetImage().GetImage() != want.Image.Image || m.GetImage().GetUserSpecifiedImage() != want.Image.UserSpecifiedImage || !m.Readonly || m.HostPath != "" {
			t.Errorf("status: got %v, want it echoed: %v", m, want)
		}
		if ref := m.GetImage().GetImageRef(); ref != map[string]string{"/by-id": id, "/by-name": id, "/one": one, "/program": w.image}[m.ContainerPath] {
			t.Errorf("status: %s: got image_ref %q, want what PullImage returned", m.ContainerPath, ref)
		}
	}
	// Another container of the pod has its own.
	if got := p.output([]string{"cat", "/v/weights"}, volume(id, "")); got != "1\n" {
		t.Errorf("got %q", got)
	}
	if table := readFile(t, "/proc/self/mountinfo"); strings.Contains(table, c.id) || strings.Contains(table, w.StateDir+"/images/layers") {
		t.Errorf("the host's mount table shows image volumes: %s", table)
	}
}

func TestImageVolumeSubPath(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "models", images.Image{Layers: models})
	p := w.pod(t)
	for sub, want := range map[string]struct{ args, out string }{
		"":              {"/v/dir/a", "2\n"},
		"dir":           {"/v/a", "2\n"},
		"dir/":          {"/v/a", "2\n"},
		"./dir/.":       {"/v/a", "2\n"},
		"to-dir":        {"/v/a", "2\n"},
		"dir/a":         {"/v", "2\n"}, // a file
		"to-file":       {"/v", "1\n"},
		"to-dir/a":      {"/v", "2\n"},
		"dir//a":        {"/v", "2\n"},
		"weights":       {"/v", "1\n"},
		"./././to-file": {"/v", "1\n"},
	} {
		if got := p.output([]string{"cat", want.args}, volume(id, sub)); got != want.out {
			t.Errorf("%q: got %q, want %q", sub, got, want.out)
		}
	}
	// Nothing above the part is reached from it.
	if got := p.output([]string{"ls", "/v/.."}, volume(id, "dir")); !strings.Contains(got, "payload\n") || strings.Contains(got, "weights") {
		t.Errorf("got %q, want the container's own root", got)
	}
	p.used()
	w.leavesNothing(t, func() {
		for _, sub := range []string{"not-there", "dir/not-there", "gone", "nothing", "weights/x", "out", "out/passwd", "dangling"} {
			_, err := p.tryCreate([]string{"sleep"}, volume(id, sub))
			if err == nil || !strings.HasPrefix(status.Convert(err).Message(), "ImageVolumeMountFailed") || !strings.Contains(err.Error(), sub) {
				t.Errorf("%q: got %v, want an error that begins as the kubelet expects and names the path", sub, err)
			}
		}
		for _, sub := range []string{"/dir", "..", "dir/../../etc"} {
			_, err := p.tryCreate([]string{"sleep"}, volume(id, sub))
			wantCode(t, err, codes.InvalidArgument, "config.mounts[0].image_sub_path")
		}
	})
}

func TestImageVolumeThatCannotBe(t *testing.T) {
	w := need(t)
	p := w.pod(t).used()
	w.leavesNothing(t, func() {
		_, err := p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: w.image}, ContainerPath: "/v"}))
		wantCode(t, err, codes.InvalidArgument, "config.mounts[0].readonly")
		_, err = p.tryCreate([]string{"sleep"}, withMounts(&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: w.image}, HostPath: "/etc", ContainerPath: "/v", Readonly: true}))
		wantCode(t, err, codes.InvalidArgument, "config.mounts[0].host_path")
		_, err = p.tryCreate([]string{"sleep"}, volume("registry.example/not/pulled:1", ""))
		if wantCode(t, err, codes.NotFound, "/v", "not/pulled"); !strings.HasPrefix(status.Convert(err).Message(), "ImageVolumeMountFailed") {
			t.Errorf("got %v, want it to begin with ImageVolumeMountFailed", err)
		}
	})
}

// An image that a container mounts stays until the container is removed, whoever removes it and whatever becomes of crispd.
func TestImageVolumeInUseIsKept(t *testing.T) {
	need(t)
	w := own(t)
	id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: w.push(t, "models", images.Image{Layers: models})}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := w.pod(t)
	run, waiting := p.run([]string{"sleep"}, volume(id, "")), p.create([]string{"sleep"}, volume(id, "dir"))
	used := func() uint64 {
		r, err := w.im.ImageFsInfo(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r.ImageFilesystems[0].InodesUsed.Value
	}
	before := used()
	w.rmi(t, id)
	check := func(when string) {
		t.Helper()
		if got := run.exec("cat", "/v/weights"); got != "1\n" {
			t.Errorf("%s: got %q", when, got)
		}
		if used() != before {
			t.Errorf("%s: got %d inodes in use, want %d", when, used(), before)
		}
	}
	check("removed")
	if w.imageStatus(t, id) != nil {
		t.Error("a removed image is still shown")
	}
	w.crash(t)
	w.again(t)
	// What garbage collection there is runs at the start and after each removal.
	w.rmi(t, "registry.example/no/such:1")
	check("removed, and crispd started anew")
	waiting.start()
	if got := waiting.exec("cat", "/v/a"); got != "2\n" {
		t.Errorf("started later: got %q", got)
	}
	for _, m := range run.status().Mounts {
		if m.GetImage().GetImageRef() != id {
			t.Errorf("status after the restart: got %v", m)
		}
	}
	// And a container that is created now cannot have it.
	_, err = p.tryCreate([]string{"sleep"}, volume(id, ""))
	wantCode(t, err, codes.NotFound)
	run.remove()
	waiting.remove()
	eventually(t, "its space is free", func() bool { return used() < before })
}
