package cri

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Host is what translation needs to know of this node. It is probed once; a
// value, so that tests can describe any node.
type Host struct {
	Hostname          string
	Arch              string // as runtime.GOARCH
	RecursiveReadOnly bool   // mount_setattr(2) with AT_RECURSIVE, Linux 5.12
	SELinux           bool   // enabled in the running kernel
	// NoUserNamespaces is why pods cannot have a user namespace; "": they can. Not ProbeHost's to find out: package spawn
	// tries it on the file systems that pods will use.
	NoUserNamespaces string
	// Masked are paths that are hidden from a container in addition to those that
	// the kubelet names, if it names any.
	Masked []string
}

// maskedPaths are CRI-O's (server/masked_paths.go), which has the longest list of
// the runtimes: what shows or changes the host's state through files that have no namespace.
var maskedPaths = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
	"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
	"/sys/devices/virtual/powercap", "/sys/firmware", "/sys/fs/selinux",
}

// throttleFiles are one directory for each CPU with its thermal throttling.
const throttleFiles = "/sys/devices/system/cpu/cpu*/thermal_throttle"

// ProbeHost looks at this node. It changes nothing.
func ProbeHost() (Host, error) {
	name, err := os.Hostname()
	if err != nil {
		return Host{}, fmt.Errorf("cannot read the node's hostname: %w", err)
	}
	throttle, err := filepath.Glob(throttleFiles)
	if err != nil {
		return Host{}, err
	}
	// An invalid descriptor is looked at after the system call is known to exist.
	rro := !errors.Is(unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{}), unix.ENOSYS)
	var fs unix.Statfs_t
	selinux := unix.Statfs("/sys/fs/selinux", &fs) == nil && fs.Type == unix.SELINUX_MAGIC
	return Host{
		Hostname:          name,
		Arch:              runtime.GOARCH,
		RecursiveReadOnly: rro,
		SELinux:           selinux,
		Masked:            append(throttle, maskedPaths...),
	}, nil
}
