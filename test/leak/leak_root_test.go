package leak

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestSeesEveryKind leaves one thing of each kind behind, on purpose, and wants
// exactly that to be reported; a checker that sees nothing would pass everything.
func TestSeesEveryKind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes mounts, links, cgroups and nft tables")
	}
	tag := strings.ToLower(rand.Text()[:6])
	dir := t.TempDir()
	sleeper := func(t *testing.T, attr *syscall.SysProcAttr) *exec.Cmd {
		t.Helper()
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = attr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill() // it may have ended
			_ = cmd.Wait()         // with the signal
		})
		return cmd
	}
	scope := Scope{
		Daemon: os.Getpid(), Dirs: []string{dir}, NetNSDir: filepath.Join(dir, "netns"), Cgroups: []string{"/leak-" + tag},
		Bridge: "lk" + tag, LinkPrefixes: []string{"lv" + tag}, Tables: []string{"leak_" + tag},
	}
	if err := os.Mkdir(scope.NetNSDir, 0o755); err != nil {
		t.Fatal(err)
	}
	trees, err := Hierarchies()
	if err != nil || len(trees) == 0 {
		t.Fatalf("no cgroup hierarchy: %v", err)
	}
	empty, err := scope.Take()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		kind Kind
		want string // in the thing's text
		make func(t *testing.T)
	}{
		{Files, "- " + dir + "/left", func(t *testing.T) { write(t, filepath.Join(dir, "left")) }},
		{Pins, "ns1 (a plain file)", func(t *testing.T) { write(t, filepath.Join(scope.NetNSDir, "ns1")) }},
		{Mounts, "tmpfs on " + dir, func(t *testing.T) {
			point := filepath.Join(dir, "m")
			if err := os.Mkdir(point, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", point, "tmpfs", 0, "size=4k"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(point, 0); err != nil {
					t.Error(err)
				}
				if err := os.Remove(point); err != nil {
					t.Error(err)
				}
			})
		}},
		{Cgroups, "/leak-" + tag, func(t *testing.T) {
			group := trees[0] + "/leak-" + tag
			if err := os.Mkdir(group, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := os.Remove(group); err != nil {
					t.Error(err)
				}
			})
		}},
		{Links, "bridge lk" + tag, func(t *testing.T) {
			link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lk" + tag}}
			if err := netlink.LinkAdd(link); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := netlink.LinkDel(link); err != nil {
					t.Error(err)
				}
			})
		}},
		{Links, "veth lv" + tag, func(t *testing.T) {
			link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lv" + tag + "a"}, PeerName: "lv" + tag + "b"}
			if err := netlink.LinkAdd(link); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := netlink.LinkDel(link); err != nil {
					t.Error(err)
				}
			})
		}},
		{Rules, "leak_" + tag, func(t *testing.T) {
			if out, err := exec.Command("nft", "add", "table", "inet", "leak_"+tag).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			t.Cleanup(func() {
				if out, err := exec.Command("nft", "delete", "table", "inet", "leak_"+tag).CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			})
		}},
		{Processes, "sleep 1000", func(t *testing.T) { sleeper(t, nil) }},
		{Processes, "(zombie)", func(t *testing.T) {
			cmd := sleeper(t, nil)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			var info unix.Siginfo
			if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
		}},
		{Namespaces, "of type uts", func(t *testing.T) { sleeper(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS}) }},
		{FDs, "left-behind", func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "left-behind"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
		}},
		{Abstract, "@leak-" + tag, func(t *testing.T) {
			l, err := net.Listen("unix", "@leak-"+tag)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}},
		{SysV, "shm key=", func(t *testing.T) {
			id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, unix.IPC_CREAT|0o600)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); err != nil {
					t.Error(err)
				}
			})
		}},
	} {
		t.Run(fmt.Sprintf("%s %s", c.kind, strings.ReplaceAll(c.want, "/", "_")), func(t *testing.T) {
			before, err := scope.Take()
			if err != nil {
				t.Fatal(err)
			}
			c.make(t)
			after, err := scope.Take()
			if err != nil {
				t.Fatal(err)
			}
			diff := Compare(before, after)
			var seen bool
			for _, d := range diff {
				seen = seen || d.Kind == c.kind && strings.Contains(d.Thing, c.want) && d.After == d.Before+1
			}
			if !seen {
				t.Errorf("got\n%swant a %s with %q", Format(diff, 20), c.kind, c.want)
			}
		})
	}
	// All of it is gone again, and the scope says so.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if diff, err := scope.Settle(ctx, empty); err != nil || len(diff) > 0 {
		t.Errorf("got %v\n%s", err, Format(diff, 20))
	}
}

// TestSeesOnlyItsOwn: what is outside of the scope is somebody else's.
func TestSeesOnlyItsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a mount")
	}
	scope := Scope{Dirs: []string{t.TempDir()}, Cgroups: []string{"/leak-nobody"}, Bridge: "lk-nobody", Tables: []string{"leak_nobody"}}
	before, err := scope.Take()
	if err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	write(t, filepath.Join(other, "file"))
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(other, 0); err != nil {
			t.Error(err)
		}
	}()
	after, err := scope.Take()
	if err != nil {
		t.Fatal(err)
	}
	if diff := Compare(before, after); len(diff) > 0 {
		t.Errorf("got a difference, want none:\n%s", Format(diff, 20))
	}
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	})
}
