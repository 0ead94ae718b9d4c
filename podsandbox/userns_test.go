package podsandbox

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/spawn"
)

// ownIDs map a user namespace's root to who runs the test: nobody else may give files away.
func ownIDs() *spawn.IDMap {
	return &spawn.IDMap{UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Size: 65536}
}

// What a pod with a user namespace gets, and one without does not: also from the next daemon.
func TestUserNamespaceOfAPod(t *testing.T) {
	for _, tt := range []struct {
		name string
		ids  *spawn.IDMap
	}{{"with", ownIDs()}, {"without", nil}} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := context.Background()
			w := newWorld(t)
			d := w.daemon(nil)
			cfg := podConfig("p")
			cfg.Userns = tt.ids
			pod, err := d.RunPod(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			has := tt.ids != nil
			check := func(d *daemon, name string) {
				t.Helper()
				clear(w.noted)
				c := containerConfig(name)
				c.Volumes = []ImageVolume{{Source: spawn.ImageSource + "0", ImageID: "sha256:volume", Target: "/v"}}
				id, err := d.CreateContainer(ctx, pod, c)
				if err != nil {
					t.Fatal(err)
				}
				if err := d.StartContainer(ctx, id); err != nil {
					t.Fatal(err)
				}
				if _, err := d.ExecSync(ctx, id, []string{"echo"}, 0); err != nil {
					t.Fatal(err)
				}
				if want := map[string]bool{"rootfs": has, "image": has, "join container": has, "exec": has}; !maps.Equal(w.noted, want) {
					t.Errorf("%s: got %v, want %v", name, w.noted, want)
				}
				var st unix.Stat_t
				for _, dir := range []string{upperDir, workDir} {
					if err := unix.Stat(filepath.Join(d.store.containerDir(pod, id), dir), &st); err != nil || int(st.Uid) != os.Getuid() {
						t.Errorf("%s belongs to %d (%v)", dir, st.Uid, err)
					}
				}
			}
			// The daemon clones the init itself: it is born in its cgroup in either case.
			if w.noted["join pod"] {
				t.Error("the pod's init has to enter its cgroup")
			}
			if got := w.all[0].args.Userns; (got != nil) != has || has && *got != *tt.ids {
				t.Errorf("the init was given %v, want %v", got, tt.ids)
			}
			check(d, "a")
			d.close()
			d = w.daemon(nil)
			defer d.close()
			check(d, "b")
			d.removeAll()
		})
	}
}

// A user that the image or the accounts in it name is checked, too, once it is known; nothing is left.
func TestUserOutsideTheUserNamespace(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	defer d.close()
	cfg := podConfig("p")
	cfg.Userns = ownIDs()
	pod, err := d.RunPod(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		user string
		fine bool
	}{{"70000", false}, {"1000:65536", false}, {"65535", true}, {"user", true}} {
		c := containerConfig(strings.ReplaceAll(tt.user, ":", "-"))
		c.User.ImageUser = tt.user
		id, err := d.CreateContainer(context.Background(), pod, c)
		switch {
		case tt.fine && err != nil:
			t.Errorf("%s: got %v", tt.user, err)
		case !tt.fine && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "0 to 65535")):
			t.Errorf("%s: got %q, %v; want ErrInvalid that says which ids there are", tt.user, id, err)
		}
	}
	if got := len(d.Containers()); got != 2 {
		t.Errorf("there are %d containers, want 2", got)
	}
	d.removeAll()
}
