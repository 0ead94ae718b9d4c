package check

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/apparmor"
)

var hostProbes = []Probe{
	{"host", "kernel", Info, "", askRelease},
	{"host", "root", Required, "crispd needs to be root of the host's user namespace", askRoot},
	{"host", "CAP_SYS_RESOURCE", Wanted, "oom_score_adj cannot be lowered nor hard limits raised: they are clamped", askSysResource},
	{"host", "crisp-init", Required, "no pod can start", askInit},
	{"host", "state_root", Required, "images and writable layers need a disk", askStateRoot},
	{"host", "run_root", Wanted, "what is left there after a reboot is taken for old", askRunRoot},
	{"host", "AppArmor", Info, "containers have no AppArmor profile", askAppArmor},
	{"host", "SELinux", Info, "containers have no SELinux label", askSELinux},
}

func askRelease(*host) Answer {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return unknown("%v", err)
	}
	return yes("%s %s", unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:]))
}

func askRoot(*host) Answer {
	if os.Geteuid() != 0 {
		return no("uid %d", os.Geteuid())
	}
	data, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return unknown("%v", err)
	}
	if f := strings.Fields(string(data)); len(f) != 3 || f[1] != "0" || f[2] != "4294967295" {
		return no("inside a user namespace (uid_map %s)", strings.Join(f, " "))
	}
	return Answer{Verdict: Yes}
}

func askSysResource(*host) Answer {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return unknown("%v", err)
	}
	return hasCapability(status, unix.CAP_SYS_RESOURCE)
}

// hasCapability looks for a capability in the effective set of a /proc/PID/status text.
func hasCapability(status []byte, number uint) Answer {
	for line := range bytes.Lines(status) {
		hex, ok := bytes.CutPrefix(line, []byte("CapEff:"))
		if !ok {
			continue
		}
		set, err := strconv.ParseUint(string(trim(hex)), 16, 64)
		if err != nil {
			return unknown("CapEff: %v", err)
		}
		if set&(1<<number) == 0 {
			return no("not in the effective set")
		}
		return Answer{Verdict: Yes}
	}
	return unknown("no CapEff line in /proc/self/status")
}

func askInit(h *host) Answer {
	info, err := os.Stat(h.InitPath)
	if err != nil {
		return no("%v", err)
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return no("%s is not an executable file", h.InitPath)
	}
	f, err := elf.Open(h.InitPath)
	if err != nil {
		return no("%s: %v", h.InitPath, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return no("%s is dynamically linked: it must be static", h.InitPath)
		}
	}
	return yes("%s, %.1f MiB", h.InitPath, float64(info.Size())/(1<<20))
}

func askStateRoot(h *host) Answer {
	var st unix.Statfs_t
	if err := unix.Statfs(h.scratch, &st); err != nil {
		return unknown("%v", err)
	}
	where := h.StateRoot
	if dir := existing(h.StateRoot); dir != h.StateRoot {
		where += " (to be made)"
	}
	free := float64(st.Bavail) * float64(st.Bsize) / (1 << 30)
	if st.Type == unix.TMPFS_MAGIC {
		return no("%s is on tmpfs: pods' records would not survive a reboot", where)
	}
	return yes("%s on %s, %.0f GiB and %d inodes free", where, fsName(h.scratch), free, st.Ffree)
}

func askRunRoot(h *host) Answer {
	name := fsName(existing(h.RunRoot))
	if name != "tmpfs" && name != "ramfs" {
		return no("%s is on %s, not on a tmpfs", h.RunRoot, name)
	}
	return yes("%s on %s", h.RunRoot, name)
}

func askAppArmor(*host) Answer {
	if !apparmor.Enabled() {
		return no("not in this kernel, or off")
	}
	if _, err := apparmor.Parser(); err != nil {
		return no("on, but %v, and %s cannot be loaded", err, apparmor.Default)
	}
	return yes("on")
}

func askSELinux(*host) Answer {
	data, err := os.ReadFile("/sys/fs/selinux/enforce")
	if err != nil {
		return no("not in this kernel, or off")
	}
	mode := map[string]string{"1": "enforcing", "0": "permissive"}[string(trim(data))]
	return yes("%s; labels are set if runtime.selinux is", mode)
}

// existing is path, or its nearest ancestor that is there.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == "/" || path == "." {
			return path
		}
		path = filepath.Dir(path)
	}
}

// fsName names path's file system, by magic number where it is none of the usual.
func fsName(path string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return err.Error()
	}
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
		unix.RAMFS_MAGIC: "ramfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.F2FS_SUPER_MAGIC: "f2fs",
	}
	if name := names[int64(st.Type)]; name != "" {
		return name
	}
	return fmt.Sprintf("file system %#x", st.Type)
}

func trim(b []byte) []byte { return bytes.TrimSpace(b) }

func joined(a, b string) string {
	if b == "" {
		return a
	}
	return a + ": " + b
}
