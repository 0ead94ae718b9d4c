package cri

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/apparmor"
	"github.com/crisp-cri/crisp/runtime/caps"
	"github.com/crisp-cri/crisp/runtime/seccomp"
	"github.com/crisp-cri/crisp/runtime/selinux"
)

// capabilities: bounding, permitted and effective are the same set; inheritable
// is empty (CVE-2022-24769), ambient too unless the config adds to it. (The set of a
// user other than root is made by execve(2): effective and permitted become empty.)
func capabilities(sc *runtimeapi.LinuxContainerSecurityContext, defaults []string) (*specs.LinuxCapabilities, error) {
	if sc.GetPrivileged() {
		all, err := caps.All()
		if err != nil {
			return nil, err
		}
		return &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}, nil
	}
	c := sc.GetCapabilities()
	add := slices.Concat(c.GetAddCapabilities(), c.GetAddAmbientCapabilities())
	set, err := caps.Apply(defaults, add, c.GetDropCapabilities())
	if err != nil {
		return nil, err
	}
	out := &specs.LinuxCapabilities{Bounding: set, Effective: set, Permitted: set}
	if len(c.GetAddAmbientCapabilities()) > 0 {
		ambient, err := caps.Apply(nil, c.GetAddAmbientCapabilities(), c.GetDropCapabilities())
		if err != nil {
			return nil, err
		}
		// The kernel wants ambient ⊆ inheritable, capabilities(7).
		out.Ambient, out.Inheritable = ambient, ambient
	}
	return out, nil
}

// seccompProfile is what was asked for, in the form of today; nil is unconfined.
func seccompProfile(sc *runtimeapi.LinuxContainerSecurityContext, unset runtimeapi.SecurityProfile_ProfileType) (*runtimeapi.SecurityProfile, error) {
	if sc.GetPrivileged() {
		return nil, nil
	}
	p := sc.GetSeccomp()
	if p == nil {
		var err error
		if p, err = deprecatedProfile(sc.GetSeccompProfilePath()); err != nil {
			return nil, invalid("config.linux.security_context.seccomp_profile_path", "%v", err)
		}
	}
	if p == nil {
		p = &runtimeapi.SecurityProfile{ProfileType: unset}
	}
	if p.GetProfileType() == runtimeapi.SecurityProfile_Unconfined {
		return nil, nil
	}
	return p, nil
}

// appArmorProfile is the name of the profile that a container runs under; "" is none.
//
// Named by nobody, it is the default one; if that could not be loaded (Status says why, and the log since the start), none: a
// node without apparmor_parser still runs pods. Who asks for it by name, RuntimeDefault, gets it or an error.
func (s *runtimeService) appArmorProfile(ctx context.Context, sc *runtimeapi.LinuxContainerSecurityContext) (string, error) {
	const field = "config.linux.security_context.apparmor"
	if s.cfg.AppArmor == nil || sc.GetPrivileged() {
		return "", nil
	}
	p := askedProfile(sc)
	switch {
	case p == nil:
		if err := s.cfg.AppArmor.Ensure(ctx); err != nil {
			klog.FromContext(ctx).V(2).Info("Default AppArmor profile cannot be used, going on without", "err", err)
			return "", nil
		}
		return apparmor.Default, nil
	case p.GetProfileType() == runtimeapi.SecurityProfile_RuntimeDefault:
		if err := s.cfg.AppArmor.Ensure(ctx); err != nil {
			return "", fmt.Errorf("%s: RuntimeDefault: %w", field, err)
		}
		return apparmor.Default, nil
	case p.GetProfileType() == runtimeapi.SecurityProfile_Localhost:
		name := strings.TrimPrefix(p.GetLocalhostRef(), "localhost/") // as older kubelets sent it
		loaded, err := s.cfg.AppArmor.Has(name)
		if err != nil {
			return "", fmt.Errorf("%s: %w", field, err)
		}
		if !loaded {
			return "", invalid(field+".localhost_ref", "%v: %q (apparmor_parser loads profiles)", apparmor.ErrNotLoaded, clip(name))
		}
		return name, nil
	}
	return "", nil
}

// podLabel is the SELinux label of a pod's files. Its level, which all containers of the pod have unless they name one, is
// the pod's own, if it names none.
func (s *runtimeService) podLabel(id podsandbox.Identity, o *runtimeapi.SELinuxOption) (string, error) {
	options := selinuxOptions(o)
	if options.Level == "" {
		options.Level = selinux.Level(fmt.Sprintf("%s/%s/%s/%d", id.Namespace, id.Name, id.UID, id.Attempt), func(level string) bool {
			return slices.ContainsFunc(s.cfg.Pods.Pods(), func(p *podsandbox.Pod) bool {
				return p.Config.Identity != id && selinux.LevelOf(p.Config.Label) == level
			})
		})
	}
	_, mount, err := s.labels(options)
	if err != nil {
		return "", fmt.Errorf("config.linux.security_context.selinux_options: %w", err)
	}
	return mount, nil
}

// setLabels puts a container's labels into its specification: those that its config names, with the pod's level if it names none. The
// processes of a privileged container have none (the policy decides), its files have.
func (s *runtimeService) setLabels(spec *specs.Spec, pod *podsandbox.Pod, sc *runtimeapi.LinuxContainerSecurityContext) error {
	if !s.cfg.SELinux {
		return nil
	}
	options := selinuxOptions(sc.GetSelinuxOptions())
	if options.Level == "" {
		options.Level = selinux.LevelOf(pod.Config.Label)
	}
	if options.Level == "" { // of a pod from before labels were switched on
		return nil
	}
	process, mount, err := s.labels(options)
	if err != nil {
		return fmt.Errorf("config.linux.security_context.selinux_options: %w", err)
	}
	if !sc.GetPrivileged() {
		spec.Process.SelinuxLabel = process
	}
	spec.Linux.MountLabel = mount
	return nil
}

func selinuxOptions(o *runtimeapi.SELinuxOption) selinux.Options {
	return selinux.Options{User: o.GetUser(), Role: o.GetRole(), Type: o.GetType(), Level: o.GetLevel()}
}

// relabel gives the volumes that ask for it the label of the container's files. It may take long, and hang with their file
// system: then this call ends with ctx.
func relabel(ctx context.Context, mounts []*runtimeapi.Mount, label string) error {
	if label == "" || !slices.ContainsFunc(mounts, (*runtimeapi.Mount).GetSelinuxRelabel) {
		return nil
	}
	_, err := bounded(ctx, func() (*found, error) {
		for i, m := range mounts {
			if !m.GetSelinuxRelabel() || m.GetHostPath() == "" {
				continue
			}
			if err := selinux.Relabel(m.GetHostPath(), label); err != nil {
				return nil, fmt.Errorf("config.mounts[%d].selinux_relabel: %w", i, err)
			}
		}
		return nil, nil
	})
	return err
}

// filter is the seccomp section: nil, the default profile for these capabilities, or the file that
// was loaded.
func filter(p *runtimeapi.SecurityProfile, loaded *specs.LinuxSeccomp, bounding []string, arch string) (*specs.LinuxSeccomp, error) {
	switch {
	case p == nil:
		return nil, nil
	case p.GetProfileType() == runtimeapi.SecurityProfile_Localhost:
		return loaded, nil
	default:
		return seccomp.Default(bounding, arch)
	}
}

// hidden are the masked and read-only paths: those that the config names, and, if it masks any, the
// host's own list as well. None named is procMount Unmasked, and a privileged
// container has none.
func hidden(sc *runtimeapi.LinuxContainerSecurityContext, host *Host) (masked, readonly []string) {
	if sc.GetPrivileged() {
		return nil, nil
	}
	if len(sc.GetMaskedPaths()) > 0 {
		masked = unique(slices.Concat(sc.GetMaskedPaths(), host.Masked))
	}
	return masked, unique(sc.GetReadonlyPaths())
}

// unique cleans paths and keeps the first of each.
func unique(list []string) []string {
	seen := make(map[string]bool, len(list))
	var out []string
	for _, p := range list {
		if p = path.Clean(p); !seen[p] {
			seen[p] = true
			out = append(out, p)
		}
	}
	return out
}

// defaultDevices are the nodes of every container (OCI runtime-spec, config-linux.md "Default Devices";
// ptmx and console are made with the terminal).
var defaultDevices = []specs.LinuxDevice{
	node("/dev/null", 1, 3), node("/dev/zero", 1, 5), node("/dev/full", 1, 7),
	node("/dev/random", 1, 8), node("/dev/urandom", 1, 9), node("/dev/tty", 5, 0),
}

func node(where string, major, minor int64) specs.LinuxDevice {
	return specs.LinuxDevice{Path: where, Type: "c", Major: major, Minor: minor, FileMode: ptr(worldWritable), UID: ptr(uint32(0)), GID: ptr(uint32(0))}
}

// devices are the nodes of a container; of two for one path the later counts. In a pod with a user namespace those of all the
// host are not among them: see hostDevices. One without an owner gets the container's user, once that is known (package podsandbox).
func devices(in *specInput) []specs.LinuxDevice {
	var list []specs.LinuxDevice
	at := map[string]int{}
	all := in.found.all
	if in.pod.Config.Userns != nil {
		all = nil
	}
	for _, d := range slices.Concat(defaultDevices, all, in.found.devices, in.found.cdi.Devices) {
		if i, ok := at[d.Path]; ok {
			list[i] = d
			continue
		}
		at[d.Path] = len(list)
		list = append(list, d)
	}
	return list
}

// hostDevices are what a privileged container has of the host's devices in a pod with a user namespace: the host's own nodes, which
// belong to the host's users. It can do with them what any user of the host can, while nodes of its own would open it the disks.
func hostDevices(in *specInput) (list []specs.Mount) {
	if in.pod.Config.Userns == nil {
		return nil
	}
	own := devices(in)
	for _, d := range in.found.all {
		if !slices.ContainsFunc(own, func(o specs.LinuxDevice) bool { return o.Path == d.Path }) {
			list = append(list, specs.Mount{Destination: d.Path, Type: "bind", Source: d.Path, Options: []string{"bind", "private"}})
		}
	}
	return list
}

// defaultRules: nothing, but nodes of any kind may be made, and these used. 10:200 is /dev/net/tun: runc
// dropped it in 1.2.0-rc.1, users' VPNs broke, and it came back.
var defaultRules = []specs.LinuxDeviceCgroup{
	{Allow: false, Access: "rwm"},
	{Allow: true, Type: "c", Access: "m"},
	{Allow: true, Type: "b", Access: "m"},
	rule(1, 3), rule(1, 8), rule(1, 7), rule(5, 0), rule(1, 5), rule(1, 9),
	{Allow: true, Type: "c", Major: ptr(int64(136)), Access: "rwm"}, // /dev/pts/*
	rule(5, 2), rule(10, 200),
}

func rule(major, minor int64) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rwm"}
}

// deviceRules are the device cgroup's: everything for a privileged container.
func deviceRules(f *found, privileged bool) []specs.LinuxDeviceCgroup {
	if privileged {
		return []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	return slices.Concat(defaultRules, f.allowed, f.cdi.Rules)
}
