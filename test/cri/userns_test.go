package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The ids that this suite's pods with a user namespace have on the node.
const (
	firstID = 1 << 24
	idCount = 65536
)

// mappedTo is what the kubelet sends, for users and groups.
func mappedTo(first, count uint32) []*runtimeapi.IDMapping {
	return []*runtimeapi.IDMapping{{ContainerId: 0, HostId: first, Length: count}}
}

func userns(first, count uint32) *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{Mode: nsPod, Uids: mappedTo(first, count), Gids: mappedTo(first, count)}
}

// mapped is a mount as the kubelet sends it for such a pod.
func mapped(m *runtimeapi.Mount) *runtimeapi.Mount {
	m.UidMappings, m.GidMappings = mappedTo(firstID, idCount), mappedTo(firstID, idCount)
	return m
}

// usernsPod runs a pod with a user namespace of its own.
func (w *world) usernsPod(t *testing.T, edits ...editPod) *pod {
	t.Helper()
	return w.pod(t, append([]editPod{func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userns(firstID, idCount)
	}}, edits...)...)
}

func hostOwner(t *testing.T, path string) (uid, gid uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Uid, st.Gid
}

func TestUsernsOwners(t *testing.T) {
	w := need(t)
	p := w.usernsPod(t)
	volume, foreign, log := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "termination-log")
	mustWrite(t, log, "")
	mustWrite(t, volume+"/of-1000", "")
	if err := os.Lchown(volume+"/of-1000", 1000, 2000); err != nil {
		t.Fatal(err)
	}
	c := p.run([]string{"sleep"}, withMounts(
		mapped(&runtimeapi.Mount{HostPath: volume, ContainerPath: "/v"}),
		mapped(&runtimeapi.Mount{HostPath: log, ContainerPath: "/dev/termination-log"}),
		&runtimeapi.Mount{HostPath: foreign, ContainerPath: "/foreign"},
	))
	for path, want := range map[string]string{
		"/": "uid=0 gid=0", "/payload": "uid=0 gid=0", "/etc/hosts": "uid=0 gid=0", "/etc/resolv.conf": "uid=0 gid=0", "/etc/hostname": "uid=0 gid=0",
		"/dev/shm": "uid=0 gid=0", "/dev/null": "uid=0 gid=0", "/dev/pts": "uid=0 gid=0", "/proc/self/status": "uid=0 gid=0",
		"/proc/sys/net/ipv4/ip_forward": "uid=0 gid=0",
		"/v":                            "uid=0 gid=0", "/v/of-1000": "uid=1000 gid=2000", "/dev/termination-log": "uid=0 gid=0",
		// What the kubelet did not map belongs to nobody.
		"/foreign": "uid=65534 gid=65534",
		// So does the root of the file system that the kernel made with the IPC namespace, before the init was root in there;
		// it is 1777, and what is made in it belongs to the maker.
		"/dev/mqueue": "uid=65534 gid=65534",
		"/sys":        "uid=65534 gid=65534", "/sys/class/net": "uid=65534 gid=65534",
	} {
		if got := c.exec("stat", path); !strings.Contains(got, want+" ") {
			t.Errorf("got %q, want %s", got, want)
		}
	}
	if got := strings.Fields(c.exec("cat", "/proc/self/uid_map")); len(got) != 3 || got[1] != itoa(firstID) || got[2] != itoa(idCount) {
		t.Errorf("uid_map: got %v", got)
	}
	c.exec("mkfile", "/v/made", "x", ",", "mkfile", "/dev/shm/made", "x", ",", "mkfile", "/dev/termination-log", "bye", ",", "mkfile", "/made", "x", ",", "mkfile", "/etc/hosts", "x")
	if uid, gid := hostOwner(t, volume+"/made"); uid != 0 || gid != 0 {
		t.Errorf("a file of the container's root on a volume is %d:%d, want root's: the kubelet and other pods read it", uid, gid)
	}
	if got := readFile(t, log); got != "bye\n" {
		t.Errorf("termination log: got %q", got)
	}
	if msg := c.fails("mkfile", "/foreign/made", "x"); !strings.Contains(msg, "permission denied") {
		t.Errorf("a directory that is not mapped: got %q", msg)
	}
}
