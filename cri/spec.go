package cri

import (
	"fmt"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
)

const (
	// defaultPath is Docker's and containerd's, for images and configs that set none.
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// defaultTerm is for containers with a terminal.
	defaultTerm = "TERM=xterm"
)

const worldWritable = os.FileMode(0o666)

// Annotations of the specification: containerd's names, which Kata, gVisor and
// security agents read.
const (
	annotationType        = "io.kubernetes.cri.container-type"
	annotationContainer   = "io.kubernetes.cri.container-name"
	annotationImage       = "io.kubernetes.cri.image-name"
	annotationSandboxID   = "io.kubernetes.cri.sandbox-id"
	annotationSandboxName = "io.kubernetes.cri.sandbox-name"
	annotationNamespace   = "io.kubernetes.cri.sandbox-namespace"
	annotationUID         = "io.kubernetes.cri.sandbox-uid"
	annotationLogs        = "io.kubernetes.cri.sandbox-log-directory"
	annotationHandler     = "io.containerd.cri.runtime-handler"
)

// A specInput is everything that a container's specification is made of.
type specInput struct {
	config  *runtimeapi.ContainerConfig // validated
	image   imagespec.ImageConfig       // not trusted
	pod     *podsandbox.Pod
	pidMode podsandbox.NamespaceMode
	found   *found
	profile *runtimeapi.SecurityProfile // of seccompProfile
	// appArmor is the name of a profile that is loaded; "": none.
	appArmor string

	host         *Host
	capabilities []string // the default set
}

// buildSpec makes the OCI specification of a container. It is pure. Process.User (but for groups that CDI devices add)
// and Linux.CgroupsPath are left to package podsandbox.
func buildSpec(in *specInput) (*specs.Spec, error) {
	sc := in.config.GetLinux().GetSecurityContext()
	args, err := arguments(in.config, &in.image)
	if err != nil {
		return nil, err
	}
	capset, err := capabilities(sc, in.capabilities)
	if err != nil {
		return nil, err
	}
	profile, err := filter(in.profile, in.found.seccomp, capset.Bounding, in.host.Arch)
	if err != nil {
		return nil, err
	}
	resources := limits(in.config.GetLinux().GetResources())
	resources.Devices = deviceRules(in.found, sc.GetPrivileged())
	masked, readonly := hidden(sc, in.host)
	spec := &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Terminal:        in.config.GetTty(),
			Args:            args,
			Env:             environment(in),
			Cwd:             workingDir(in.config, &in.image),
			Capabilities:    capset,
			NoNewPrivileges: sc.GetNoNewPrivs(),
			ApparmorProfile: in.appArmor,
		},
		Root:        &specs.Root{Path: "rootfs", Readonly: sc.GetReadonlyRootfs()},
		Mounts:      mounts(in),
		Annotations: annotations(in),
		Linux: &specs.Linux{
			Namespaces:        namespaces(in),
			Devices:           devices(in),
			Resources:         resources,
			Seccomp:           profile,
			MaskedPaths:       masked,
			ReadonlyPaths:     readonly,
			RootfsPropagation: rootPropagation(in.config.GetMounts()),
		},
	}
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = idMappings(in.pod)
	if r := in.config.GetLinux().GetResources(); r != nil {
		spec.Process.OOMScoreAdj = ptr(int(r.GetOomScoreAdj()))
	}
	if h := in.found.cdi.Hooks; !reflect.ValueOf(h).IsZero() {
		spec.Hooks = &h
	}
	spec.Process.User.AdditionalGids = in.found.cdi.GIDs
	return spec, nil
}

// arguments: command replaces the image's entrypoint and, with it, its arguments; args replace
// the image's arguments alone (Kubernetes "Define a Command and Arguments for a Container").
func arguments(config *runtimeapi.ContainerConfig, image *imagespec.ImageConfig) ([]string, error) {
	command, args := config.GetCommand(), config.GetArgs()
	if len(command) == 0 {
		command = image.Entrypoint
		if len(args) == 0 {
			args = image.Cmd
		}
		if len(command) == 1 && command[0] == "" { // Docker's way to unset an entrypoint
			command = nil
		}
	}
	all := slices.Concat(command, args)
	switch {
	case len(all) == 0:
		return nil, invalid("config.command", "no command: neither the config nor the image has one")
	case all[0] == "":
		return nil, invalid("config.command", "the first word of the command is empty")
	case slices.ContainsFunc(all, func(s string) bool { return strings.ContainsRune(s, 0) }):
		return nil, invalid("config.command", "the image's command has a NUL")
	}
	return all, nil
}

// environment: defaults, then the image's, the config's, the CDI devices'. Of two for one name the later counts, at the place of the first.
func environment(in *specInput) []string {
	var list []string
	at := map[string]int{}
	set := func(entry string) {
		name, _, ok := strings.Cut(entry, "=")
		if !ok || name == "" || strings.ContainsRune(entry, 0) { // of an image; the config is checked
			return
		}
		if i, ok := at[name]; ok {
			list[i] = entry
			return
		}
		at[name] = len(list)
		list = append(list, entry)
	}
	set(defaultPath)
	if in.config.GetTty() {
		set(defaultTerm)
	}
	hostname := in.pod.Config.Hostname
	if hostname == "" {
		hostname = in.host.Hostname
	}
	set("HOSTNAME=" + hostname)
	for _, e := range in.image.Env {
		set(e)
	}
	for _, e := range in.config.GetEnvs() {
		set(e.GetKey() + "=" + string(e.GetValue()))
	}
	for _, e := range in.found.cdi.Env {
		set(e)
	}
	return list
}

// workingDir is made in the container if it is missing. An image's relative one starts at the root.
func workingDir(config *runtimeapi.ContainerConfig, image *imagespec.ImageConfig) string {
	if d := config.GetWorkingDir(); d != "" {
		return path.Clean(d)
	}
	if strings.ContainsRune(image.WorkingDir, 0) {
		return "/"
	}
	return path.Join("/", image.WorkingDir)
}

// namespaces describes what the container gets. Package spawn reads of it only
// whether there is a cgroup namespace; the others a container is born into. A privileged container sees the
// node's cgroups, unless it has a user namespace: it is privileged over its pod then.
func namespaces(in *specInput) []specs.LinuxNamespace {
	of := func(kind string) string {
		if in.pod.InitPID == 0 {
			return ""
		}
		return fmt.Sprintf("/proc/%d/ns/%s", in.pod.InitPID, kind)
	}
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	if in.pod.Config.Userns != nil {
		list = append(list, specs.LinuxNamespace{Type: specs.UserNamespace, Path: of("user")})
	}
	if in.pidMode == podsandbox.NamespaceContainer {
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if in.pod.Config.Network != podsandbox.NamespaceNode {
		list = append(list,
			specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: in.pod.NetNSPath},
			specs.LinuxNamespace{Type: specs.UTSNamespace, Path: of("uts")})
	}
	if in.pod.Config.IPC != podsandbox.NamespaceNode {
		list = append(list, specs.LinuxNamespace{Type: specs.IPCNamespace, Path: of("ipc")})
	}
	if !in.config.GetLinux().GetSecurityContext().GetPrivileged() || in.pod.Config.Userns != nil {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return list
}

func annotations(in *specInput) map[string]string {
	p := in.pod.Config
	m := map[string]string{
		annotationType:        "container",
		annotationContainer:   in.config.GetMetadata().GetName(),
		annotationImage:       imageName(in.config.GetImage()),
		annotationSandboxID:   in.pod.ID,
		annotationSandboxName: p.Name,
		annotationNamespace:   p.Namespace,
		annotationUID:         p.UID,
		annotationLogs:        p.LogDirectory,
	}
	if p.RuntimeHandler != "" {
		m[annotationHandler] = p.RuntimeHandler
	}
	return m
}

// imageName is how the user calls the image, if the caller says.
func imageName(s *runtimeapi.ImageSpec) string {
	if s.GetUserSpecifiedImage() != "" {
		return s.GetUserSpecifiedImage()
	}
	return s.GetImage()
}
