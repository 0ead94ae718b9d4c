package cri

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// defaultMounts are what every container has, in this order; containerd's
// (pkg/oci/mounts.go), without its tmpfs at /run.
func defaultMounts(pod *podsandbox.Pod, privileged bool) []specs.Mount {
	kernel := func(where, what string, options ...string) specs.Mount {
		return specs.Mount{Destination: where, Type: what, Source: what, Options: options}
	}
	access := "ro"
	if privileged {
		access = "rw"
	}
	shm := specs.Mount{Destination: "/dev/shm", Type: "bind", Source: spawn.ShmSource, Options: []string{"nosuid", "noexec", "nodev"}}
	if pod.Config.IPC == podsandbox.NamespaceNode {
		shm = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "rprivate"}}
	}
	return []specs.Mount{
		kernel("/proc", "proc", "nosuid", "noexec", "nodev"),
		kernel("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
		kernel("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
		shm,
		kernel("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
		kernel("/sys", "sysfs", "nosuid", "noexec", "nodev", access),
		kernel("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", access),
	}
}

// mounts are the default ones, then the pod's files and what the config and the CDI devices name, sorted
// by depth, so that none hides another. A default mount at or below one that the config names
// is left out: it would be hidden.
func mounts(in *specInput) []specs.Mount {
	config, pod := in.config, in.pod
	sc := config.GetLinux().GetSecurityContext()
	var named []specs.Mount
	for i, m := range config.GetMounts() {
		named = append(named, bind(i, m))
	}
	for _, m := range in.found.cdi.Mounts { // of two for one place the device's counts, and of two devices' the later
		named = slices.DeleteFunc(named, func(n specs.Mount) bool { return n.Destination == m.Destination })
		if m.Type == "bind" {
			m.UIDMappings, m.GIDMappings = idMappings(pod)
		}
		named = append(named, m)
	}
	covers := func(where string) bool {
		return slices.ContainsFunc(named, func(m specs.Mount) bool { return below(where, m.Destination) })
	}
	list := slices.DeleteFunc(defaultMounts(pod, sc.GetPrivileged()), func(m specs.Mount) bool { return covers(m.Destination) })

	access := "rw"
	if sc.GetReadonlyRootfs() {
		access = "ro"
	}
	var files []specs.Mount
	for _, f := range []struct{ where, source string }{
		{"/etc/hostname", pod.HostnameFile}, {"/etc/hosts", pod.Hosts}, {"/etc/resolv.conf", pod.ResolvConf},
	} {
		if f.source != "" && !slices.ContainsFunc(named, func(m specs.Mount) bool { return m.Destination == f.where }) {
			m := specs.Mount{Destination: f.where, Type: "bind", Source: f.source, Options: []string{"rbind", "rprivate", access}}
			m.UIDMappings, m.GIDMappings = idMappings(pod)
			files = append(files, m)
		}
	}
	files = append(files, named...)
	slices.SortStableFunc(files, func(a, b specs.Mount) int {
		return strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/")
	})
	nodes := slices.DeleteFunc(hostDevices(in), func(m specs.Mount) bool { return covers(m.Destination) })
	return slices.Concat(list, nodes, files)
}

// idMappings are those of the pod's user namespace, in the words of the specification; nil if it has none.
func idMappings(pod *podsandbox.Pod) (uids, gids []specs.LinuxIDMapping) {
	ids := pod.Config.Userns
	if ids == nil {
		return nil, nil
	}
	return []specs.LinuxIDMapping{{HostID: ids.UID, Size: ids.Size}}, []specs.LinuxIDMapping{{HostID: ids.GID, Size: ids.Size}}
}

// propagations are mount(8)'s words for CRI's. That the source is shared (or a slave) is checked where it is opened.
var propagations = map[runtimeapi.MountPropagation]string{
	runtimeapi.MountPropagation_PROPAGATION_PRIVATE:           "rprivate",
	runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: "rslave",
	runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:     "rshared",
}

// bind translates mount i of a config.
func bind(i int, m *runtimeapi.Mount) specs.Mount {
	access := "rw"
	switch {
	case m.GetRecursiveReadOnly():
		access = "rro"
	case m.GetReadonly():
		access = "ro"
	}
	out := specs.Mount{
		Destination: path.Clean(m.GetContainerPath()),
		Type:        "bind",
		Source:      path.Clean(m.GetHostPath()),
		Options:     []string{"rbind", propagations[m.GetPropagation()], access},
	}
	if m.GetImage() != nil {
		// Its layers are mapped where it is mounted, whatever the kubelet says of the mount.
		out.Source, out.Options = imageSource(i), []string{"bind", "rprivate", "ro"}
	} else {
		out.UIDMappings, out.GIDMappings = linuxMappings(m.GetUidMappings()), linuxMappings(m.GetGidMappings())
	}
	for _, o := range mountOptions { // in an order of ours, each once
		if slices.Contains(m.GetMountOptions(), o) {
			// With all that is mounted below ("r"): a volume from which nothing may be executed has no corner where it may.
			out.Options = append(out.Options, "r"+o)
		}
	}
	return out
}

// linuxMappings are a mount's as asked for, and no further: to a host directory that the kubelet did not map the pod's root is nobody.
func linuxMappings(l []*runtimeapi.IDMapping) (out []specs.LinuxIDMapping) {
	for _, m := range l {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}

// imageSource is the Mount.Source of mount i of a config, which is an image's.
func imageSource(i int) string { return spawn.ImageSource + strconv.Itoa(i) }

// imageVolumes finds the images of a config's mounts, and notes in a copy of the config which they are: the kubelet reads
// that in ContainerStatus (KEP-5365), as the id, which is what PullImage returned.
func (s *runtimeService) imageVolumes(config *runtimeapi.ContainerConfig) ([]podsandbox.ImageVolume, *runtimeapi.ContainerConfig, error) {
	var volumes []podsandbox.ImageVolume
	noted := config
	for i, m := range config.GetMounts() {
		if m.GetImage() == nil {
			continue
		}
		img, err := s.cfg.Images.Resolve(m.GetImage().GetImage())
		if err != nil {
			return nil, nil, fmt.Errorf("%w at %s: image %q: %w", podsandbox.ErrImageVolume, clip(m.GetContainerPath()), clip(imageName(m.GetImage())), err)
		}
		volumes = append(volumes, podsandbox.ImageVolume{Source: imageSource(i), ImageID: img.ID, SubPath: m.GetImageSubPath(), Target: m.GetContainerPath()})
		if noted == config {
			noted = proto.Clone(config).(*runtimeapi.ContainerConfig)
		}
		noted.Mounts[i].Image.ImageRef = img.ID
	}
	return volumes, noted, nil
}

// rootPropagation lets mounts travel as far as the farthest travelling volume.
func rootPropagation(list []*runtimeapi.Mount) string {
	propagation := ""
	for _, m := range list {
		if m.GetImage() != nil {
			continue
		}
		switch m.GetPropagation() {
		case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			return "rshared"
		case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			propagation = "rslave"
		}
	}
	return propagation
}
