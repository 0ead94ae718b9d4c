package cri

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/test/images"
)

func (w *world) imageStatus(t *testing.T, ref string) *runtimeapi.Image {
	t.Helper()
	r, err := w.im.ImageStatus(t.Context(), &runtimeapi.ImageSpec{Image: ref}, false)
	if err != nil {
		t.Fatalf("ImageStatus: %v", err)
	}
	return r.Image
}

func TestImageIDIsTheSameEverywhere(t *testing.T) {
	w := need(t)
	again, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: payloadRef}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	// From another registry's name: the same content, the same image.
	const other = "other.example/crisp/payload:1"
	elsewhere, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: other}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	st := w.imageStatus(t, payloadRef)
	if st == nil {
		t.Fatal("the image is not there")
	}
	list, err := w.im.ListImages(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var listed int
	for _, im := range list {
		if im.Id == w.image {
			listed++
			for _, want := range []string{payloadRef, other} {
				if !contains(im.RepoTags, want) {
					t.Errorf("tags: got %v, want %s", im.RepoTags, want)
				}
			}
			if len(im.RepoDigests) != 2 || !strings.Contains(im.RepoDigests[0], "@sha256:") {
				t.Errorf("digests: got %v, want one per repository", im.RepoDigests)
			}
			if im.Size == 0 {
				t.Error("size 0 is an error to the kubelet")
			}
		}
	}
	if listed != 1 {
		t.Errorf("listed %d times, want once", listed)
	}
	p := w.pod(t)
	for _, ref := range []string{w.image, payloadRef, other} {
		c := p.create([]string{"sleep"}, withImage(ref))
		cs := c.status()
		var inList string
		all, err := w.rt.ListContainers(t.Context(), &runtimeapi.ContainerFilter{Id: c.id})
		if err != nil || len(all) != 1 {
			t.Fatalf("got %v, %v", all, err)
		}
		inList = all[0].ImageId
		for name, got := range map[string]string{"pulled again": again, "pulled elsewhere": elsewhere, "ImageStatus": st.Id, "ContainerStatus": cs.ImageId, "ListContainers": inList} {
			if got != w.image {
				t.Errorf("by %s, %s: got %s, want %s", ref, name, got, w.image)
			}
		}
	}
	// The other name goes, or it would show in the comparison after the suite: pull only this one again.
	w.rmi(t, other)
	if w.imageStatus(t, payloadRef) != nil {
		t.Error("CRI 0.36: removing one tag removes all tags of the image")
	}
	if _, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: payloadRef}, nil, nil); err != nil {
		t.Fatal(err)
	}
}

func TestImageIsFoundByEveryName(t *testing.T) {
	w := need(t)
	im := w.imageStatus(t, payloadRef)
	hex := strings.TrimPrefix(w.image, "sha256:")
	for _, ref := range []string{w.image, hex, hex[:13], payloadRef, im.RepoDigests[0]} {
		if got := w.imageStatus(t, ref); got.GetId() != w.image {
			t.Errorf("%s: got %v", ref, got)
		}
	}
	for _, ref := range []string{"registry.example/crisp/payload:2", "registry.example/crisp/payload", "ffffffffffff"} {
		if got := w.imageStatus(t, ref); got != nil {
			t.Errorf("%s: got %v, want no image and no error", ref, got)
		}
	}
	list, err := w.im.ListImages(t.Context(), &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: payloadRef}})
	if err != nil || len(list) != 1 || list[0].Id != w.image {
		t.Errorf("filtered: got %v, %v", list, err)
	}
	verbose, err := w.im.ImageStatus(t.Context(), &runtimeapi.ImageSpec{Image: payloadRef}, true)
	if err != nil || len(verbose.Info) == 0 {
		t.Errorf("verbose: got info %v, %v", verbose.GetInfo(), err)
	}
}

func TestPullAndRemoveLeaveNothing(t *testing.T) {
	w := need(t)
	ref := w.push(t, "once", images.Image{Layers: [][]images.File{{{Name: "a", Dir: true}, {Name: "a/b", Text: "once"}}, {{Name: "a/b", Whiteout: true}, {Name: "c", HardLink: ""}}}})
	w.leavesNothing(t, func() {
		if _, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil); err != nil {
			t.Fatal(err)
		}
		w.rmi(t, ref)
		w.rmi(t, ref) // idempotent
		if w.imageStatus(t, ref) != nil {
			t.Error("it is still there")
		}
	})
	w.rmi(t, "registry.example/never/pulled:1")
}

func TestFailedPullLeavesNothing(t *testing.T) {
	w := need(t)
	for name, ref := range map[string]string{
		"no such tag": "registry.example/crisp/payload:no-such", "no such repository": "registry.example/no/such:1", "no such digest": "registry.example/crisp/payload@sha256:" + strings.Repeat("0", 64),
		"not a reference": "UPPER/case:1", "empty tag": "registry.example/crisp/payload:", "a registry that is not there": "localhost:1/x/y:1",
	} {
		t.Run(name, func(t *testing.T) {
			w.leavesNothing(t, func() {
				_, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
				if err == nil {
					t.Error("it was pulled")
				} else if !strings.Contains(err.Error(), strings.TrimSuffix(ref, ":")) {
					t.Errorf("got %q, want it to name %s", err, ref)
				}
			})
		})
	}
}

func TestManyPullsOfOneImage(t *testing.T) {
	w := need(t)
	ref := w.push(t, "many", images.Image{Layers: [][]images.File{{{Name: "big", Text: strings.Repeat("x", 4<<20)}}}})
	w.leavesNothing(t, func() {
		var wg sync.WaitGroup
		ids := make([]string, 8)
		for i := range ids {
			wg.Go(func() {
				id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
				if err != nil {
					t.Error(err)
				}
				ids[i] = id
			})
		}
		wg.Wait()
		for _, id := range ids {
			if id != ids[0] {
				t.Errorf("got %v, want one id", ids)
				break
			}
		}
		var removes sync.WaitGroup
		for range 4 {
			removes.Go(func() { w.rmi(t, ref) })
		}
		removes.Wait()
	})
}

func TestImageInUseIsNotTakenFromItsContainer(t *testing.T) {
	w := need(t)
	p := w.pod(t).used()
	ref := w.push(t, "in-use", images.Image{Layers: w.layers(t, images.File{Name: "mark", Text: "here\n"}), Config: v1.Config{Cmd: []string{"/payload"}}})
	w.leavesNothing(t, func() {
		id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		run, waiting := p.run([]string{"sleep"}, withImage(id)), p.create([]string{"sleep"}, withImage(id))
		w.rmi(t, ref)
		if w.imageStatus(t, ref) != nil {
			t.Error("a removed image is still shown")
		}
		if got := run.exec("cat", "/mark"); got != "here\n" {
			t.Errorf("the running container: got %q", got)
		}
		waiting.start()
		if got := waiting.exec("cat", "/mark"); got != "here\n" {
			t.Errorf("the one that had not been started: got %q", got)
		}
		if st := run.status(); st.ImageId != id {
			t.Errorf("status: got image %s, want %s", st.ImageId, id)
		}
		run.remove()
		waiting.remove()
	})
}

func TestImageFsInfo(t *testing.T) {
	w := need(t)
	info := func() *runtimeapi.FilesystemUsage {
		r, err := w.im.ImageFsInfo(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(r.ImageFilesystems) == 0 {
			t.Fatalf("got %v, want a file system", r)
		}
		return r.ImageFilesystems[0]
	}
	before := info()
	if before.UsedBytes == nil || before.UsedBytes.Value == 0 || before.InodesUsed.GetValue() == 0 || before.Timestamp == 0 {
		t.Errorf("got %v (a nil used_bytes panics the kubelet)", before)
	}
	if _, err := os.Stat(before.FsId.GetMountpoint()); err != nil || !strings.HasPrefix(before.FsId.GetMountpoint(), w.StateDir) {
		t.Errorf("mountpoint %q: %v; want one below the state root", before.FsId.GetMountpoint(), err)
	}
	// Bytes that no compression can shrink are not needed: it is the unpacked size that counts.
	w.forge(t, "weighs", images.Image{Layers: [][]images.File{{{Name: "big", Text: strings.Repeat("0123456789abcdef", 1<<18)}}}})
	eventually(t, "the image's 4 MiB show", func() bool { return info().UsedBytes.Value >= before.UsedBytes.Value+4<<20 })
}

func TestLayersAreAppliedInOrder(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "layers", images.Image{Layers: append(w.layers(t),
		[]images.File{{Name: "d", Dir: true}, {Name: "d/kept", Text: "1\n"}, {Name: "d/gone", Text: "1\n"}, {Name: "d/changed", Text: "1\n"}, {Name: "opaque", Dir: true}, {Name: "opaque/old", Text: "1\n"},
			{Name: "becomes-dir", Text: "1\n"}, {Name: "becomes-file", Dir: true}, {Name: "becomes-file/x", Text: "1\n"}},
		[]images.File{{Name: "d/gone", Whiteout: true}, {Name: "d/changed", Text: "2\n", Mode: 0o600, UID: 7, GID: 8}, {Name: "opaque", Dir: true}, {Name: "opaque/.wh..wh..opq"}, {Name: "opaque/new", Text: "2\n"},
			{Name: "becomes-dir", Dir: true}, {Name: "becomes-dir/y", Text: "2\n"}, {Name: "becomes-file", Text: "2\n"},
			{Name: "setuid", Text: "x", Mode: 0o4755}, {Name: "hard", HardLink: "setuid"}, {Name: "soft", Symlink: "d/kept"}})})
	c := w.pod(t).run([]string{"sleep"}, withImage(id))
	for dir, want := range map[string]string{"/d": "changed\nkept\n", "/opaque": "new\n", "/becomes-dir": "y\n"} {
		if got := c.exec("ls", dir); got != want {
			t.Errorf("%s: got %q, want %q", dir, got, want)
		}
	}
	if got := c.exec("cat", "/d/kept", "/d/changed", "/becomes-file", "/soft"); got != "1\n2\n2\n1\n" {
		t.Errorf("got %q", got)
	}
	if got := c.exec("stat", "/d/changed"); !strings.Contains(got, "mode=0100600 uid=7 gid=8") {
		t.Errorf("got %q", got)
	}
	if got := c.exec("stat", "/setuid", "/hard"); strings.Count(got, "mode=0104755") != 2 {
		t.Errorf("got %q, want both set-uid", got)
	}
	// Files of the lower layers stay as they are for the next container.
	c.exec("mkfile", "/d/kept", "overwritten")
	if got := w.pod(t).output([]string{"cat", "/d/kept"}, withImage(id), func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/payload"} }); got != "1\n" {
		t.Errorf("the next container sees %q", got)
	}
}

// Archives lean on the layers below them: directories they leave out look as they do there, or are links, and hard links lead there.
func TestLayersThatLeanOnThoseBelow(t *testing.T) {
	w := need(t)
	id, _ := w.forge(t, "leaning", images.Image{Layers: append(w.layers(t,
		images.File{Name: ".", Dir: true, Mode: 0o751, GID: 6},
		images.File{Name: "private", Dir: true, Mode: 0o700, UID: 5, GID: 6}, images.File{Name: "private/f", Text: "below\n", Mode: 0o640, UID: 5},
		images.File{Name: "usr/bin", Dir: true}, images.File{Name: "usr/bin/tool", Text: "tool\n"}, images.File{Name: "bin", Symlink: "usr/bin"}),
		[]images.File{{Name: "private/new", Text: "above\n"}, {Name: "bin/app", Text: "app\n"}, {Name: "linked/g", HardLink: "private/f"}})})
	c := w.pod(t).run([]string{"sleep"}, withImage(id))
	if got := c.exec("cat", "/private/f", "/private/new", "/linked/g", "/bin/app", "/usr/bin/app", "/bin/tool"); got != "below\nabove\nbelow\napp\napp\ntool\n" {
		t.Errorf("got %q", got)
	}
	for path, want := range map[string]string{"/": "mode=040751 uid=0 gid=6", "/private": "mode=040700 uid=5 gid=6", "/linked": "mode=040755 uid=0 gid=0", "/linked/g": "mode=0100640 uid=5", "/bin": "-> usr/bin"} {
		if got := c.exec("stat", path); !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	// What a container does to one name of a file, it does to no other container's.
	c.exec("mkfile", "/linked/g", "changed")
	if got := w.pod(t).output([]string{"cat", "/linked/g", "/private/f"}, withImage(id), func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/payload"} }); got != "below\nbelow\n" {
		t.Errorf("the next container sees %q", got)
	}
}

// A6: what an archive says never leads out of the image's directory.
func TestHostileLayersStayInside(t *testing.T) {
	w := need(t)
	canary := filepath.Join(w.StateDir, "canary")
	mustWrite(t, filepath.Join(canary, "secret"), "secret\n")
	t.Cleanup(func() {
		if err := os.RemoveAll(canary); err != nil {
			t.Error(err)
		}
	})
	before := fileTree(t, canary)
	up := strings.Repeat("../", 20)
	for name, files := range map[string][]images.File{
		"name with ..":                 {{Name: up + canary[1:] + "/written", Text: "x"}},
		"absolute name":                {{Name: canary + "/written", Text: "x"}},
		"through a symlink":            {{Name: "out", Symlink: canary}, {Name: "out/written", Text: "x"}},
		"through a relative symlink":   {{Name: "out", Symlink: up + canary[1:]}, {Name: "out/written", Text: "x"}},
		"hard link to the host":        {{Name: "link", HardLink: canary + "/secret"}, {Name: "link", Text: "overwritten"}},
		"hard link with ..":            {{Name: "link", HardLink: up + canary[1:] + "/secret"}},
		"hard link through a symlink":  {{Name: "out", Symlink: canary}, {Name: "link", HardLink: "out/secret"}},
		"whiteout through a symlink":   {{Name: "out", Symlink: canary}, {Name: "out/.wh.secret"}},
		"opaque through a symlink":     {{Name: "out", Symlink: canary}, {Name: "out/.wh..wh..opq"}},
		"whiteout with ..":             {{Name: "x/.wh.." + "."}},
		"symlink replaced by dir":      {{Name: "out", Symlink: canary}, {Name: "out", Dir: true}, {Name: "out/written", Text: "x"}},
		"mode through a symlink":       {{Name: "out", Symlink: canary + "/secret"}, {Name: "out", Text: "x", Mode: 0o4777}},
		"xattr of the overlay's":       {{Name: "f", Text: "x", PAX: map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.trusted.overlay.opaque": "y"}}},
		"directory named like an edge": {{Name: ".", Dir: true}, {Name: "..", Dir: true}, {Name: "/", Dir: true}},
	} {
		t.Run(name, func(t *testing.T) {
			ref := w.push(t, "hostile", images.Image{Layers: append(w.layers(t), files)})
			w.leavesNothing(t, func() {
				id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: ref}, nil, nil)
				if err != nil {
					return // refused
				}
				p := w.pod(t)
				c, err := p.tryCreate([]string{"sleep"}, withImage(id))
				if err == nil && w.rt.StartContainer(t.Context(), c.id) == nil {
					if r, err := c.try("cat", "/link"); err == nil && strings.Contains(string(r.Stdout), "secret") {
						t.Error("a file of the host is in the container")
					}
				}
				p.remove()
				w.rmi(t, ref)
			})
			if after := fileTree(t, canary); after != before {
				t.Errorf("the host changed:\n%s\nwas\n%s", after, before)
			}
		})
	}
}

func TestDockersMediaTypesAndUncompressedLayers(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for name, im := range map[string]images.Image{
		"docker": {}, "docker, bare": {Bare: true}, "docker, plain tar": {Uncompressed: true},
	} {
		t.Run(name, func(t *testing.T) {
			im.Names, im.Layers = []string{"forged/media:1"}, w.layers(t, images.File{Name: "mark", Text: name})
			if err := im.Push(w.registry.Host); err != nil {
				t.Fatal(err)
			}
			id, err := w.im.PullImage(t.Context(), &runtimeapi.ImageSpec{Image: "registry.example/forged/media:1"}, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.output([]string{"cat", "/mark"}, withImage(id)); got != name {
				t.Errorf("got %q", got)
			}
			w.rmi(t, id)
		})
	}
}
