package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/runtime/apparmor"
)

const (
	bad  = codes.InvalidArgument
	lack = codes.Unimplemented
)

// Each row makes one thing wrong with a pod that is fine.
var badPods = []struct {
	name  string
	code  codes.Code
	field string // begins the message
	edit  func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig)
}{
	{"no config", bad, "config: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { r.Config = nil }},
	{"no metadata", bad, "config.metadata: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }},
	{"no name", bad, "config.metadata.name: ", podName("")},
	{"name with slash", bad, "config.metadata.name: ", podName("a/b")},
	{"name with dots", bad, "config.metadata.name: ", podName("..")},
	{"name with NUL", bad, "config.metadata.name: ", podName("a\x00b")},
	{"name with newline", bad, "config.metadata.name: ", podName("a\nb")},
	{"name too long", bad, "config.metadata.name: ", podName(strings.Repeat("n", 254))},
	{"no uid", bad, "config.metadata.uid: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = "" }},
	{"uid climbs", bad, "config.metadata.uid: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = "../x" }},
	{"no namespace", bad, "config.metadata.namespace: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = "" }},
	{"unknown handler", bad, "runtime_handler: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { r.RuntimeHandler = "kata" }},
	{"hostname too long", bad, "config.hostname: ", podHostname(strings.Repeat("h", 65))},
	{"hostname with space", bad, "config.hostname: ", podHostname("a b")},
	{"hostname with newline", bad, "config.hostname: ", podHostname("a\nb")},
	{"hostname with empty label", bad, "config.hostname: ", podHostname("a..b")},
	{"hostname with dash", bad, "config.hostname: ", podHostname("-a")},
	{"log directory relative", bad, "config.log_directory: ", podLogs("var/log")},
	{"log directory climbs", bad, "config.log_directory: ", podLogs("/var/log/../../etc")},
	{"log directory with NUL", bad, "config.log_directory: ", podLogs("/var/\x00")},
	{"log directory with newline", bad, "config.log_directory: ", podLogs("/var/\n")},
	{"log directory is root", bad, "config.log_directory: ", podLogs("//")},
	{"log directory too long", bad, "config.log_directory: ", podLogs("/" + strings.Repeat("x", 4096))},
	{"dns server", bad, "config.dns_config.servers[0]: ", podDNS(&runtimeapi.DNSConfig{Servers: []string{"dns.example"}})},
	{"dns search with newline", bad, "config.dns_config.searches[1]: ", podDNS(&runtimeapi.DNSConfig{Searches: []string{"a", "b\nnameserver 6.6.6.6"}})},
	{"dns option with space", bad, "config.dns_config.options[0]: ", podDNS(&runtimeapi.DNSConfig{Options: []string{"ndots:5 x"}})},
	{"dns option empty", bad, "config.dns_config.options[0]: ", podDNS(&runtimeapi.DNSConfig{Options: []string{""}})},
	{"dns comment", bad, "config.dns_config.searches[0]: ", podDNS(&runtimeapi.DNSConfig{Searches: []string{"#x"}})},
	{"dns search too long", bad, "config.dns_config.searches[0]: ", podDNS(&runtimeapi.DNSConfig{Searches: []string{strings.Repeat("a", 1025)}})},
	{"dns too many", bad, "config.dns_config.options: ", podDNS(&runtimeapi.DNSConfig{Options: make([]string, 65)})},
	{"protocol", bad, "config.port_mappings[0].protocol: ", podPort(&runtimeapi.PortMapping{Protocol: 9, ContainerPort: 1})},
	{"host port negative", bad, "config.port_mappings[0].host_port: ", podPort(&runtimeapi.PortMapping{HostPort: -1, ContainerPort: 1})},
	{"host port too large", bad, "config.port_mappings[0].host_port: ", podPort(&runtimeapi.PortMapping{HostPort: 65536, ContainerPort: 1})},
	{"container port missing", bad, "config.port_mappings[0].container_port: ", podPort(&runtimeapi.PortMapping{HostPort: 80})},
	{"container port too large", bad, "config.port_mappings[0].container_port: ", podPort(&runtimeapi.PortMapping{ContainerPort: 70000})},
	{"host ip", bad, "config.port_mappings[0].host_ip: ", podPort(&runtimeapi.PortMapping{ContainerPort: 1, HostIp: "localhost"})},
	{"host ip with zone", bad, "config.port_mappings[0].host_ip: ", podPort(&runtimeapi.PortMapping{ContainerPort: 1, HostIp: "fe80::1%eth0"})},
	{"windows", bad, "config.windows: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
		c.Windows = &runtimeapi.WindowsPodSandboxConfig{}
	}},
	{"cgroup parent", bad, "config.linux.cgroup_parent: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
		c.Linux.CgroupParent = "/../x"
	}},
	{"network CONTAINER", bad, "config.linux.security_context.namespace_options.network: ", podNS(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_CONTAINER})},
	{"network unknown", bad, "config.linux.security_context.namespace_options.network: ", podNS(&runtimeapi.NamespaceOption{Network: 17})},
	{"ipc TARGET", bad, "config.linux.security_context.namespace_options.ipc: ", podNS(&runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_TARGET})},
	{"pid TARGET", bad, "config.linux.security_context.namespace_options.pid: ", podNS(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET})},
	{"pid unknown", bad, "config.linux.security_context.namespace_options.pid: ", podNS(&runtimeapi.NamespaceOption{Pid: -1})},
	{"userns CONTAINER", bad, usernsField + ".mode: ", podUserns(runtimeapi.NamespaceMode_CONTAINER)},
	{"userns TARGET", bad, usernsField + ".mode: ", podUserns(runtimeapi.NamespaceMode_TARGET)},
	{"userns unknown", bad, usernsField + ".mode: ", podUserns(7)},
	{"userns NODE with mappings", bad, usernsField + ": ", podUserns(runtimeapi.NamespaceMode_NODE, &runtimeapi.IDMapping{Length: 1})},
	{"userns without mappings", bad, usernsField + ".uids: ", podUserns(runtimeapi.NamespaceMode_POD)},
	{"userns with two mappings", bad, usernsField + ".uids: ", podUserns(runtimeapi.NamespaceMode_POD, ids(65536), ids(1<<20))},
	{"userns without gids", bad, usernsField + ".gids: ", podNS(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{ids(65536)}}})},
	{"userns with other gids", bad, usernsField + ".gids: ", podNS(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{
		Uids: []*runtimeapi.IDMapping{ids(65536)}, Gids: []*runtimeapi.IDMapping{ids(1 << 20)},
	}})},
	{"userns without root", bad, usernsField + ".uids[0].container_id: ", podUserns(runtimeapi.NamespaceMode_POD, &runtimeapi.IDMapping{ContainerId: 1, Length: 65536})},
	{"userns of nothing", bad, usernsField + ".uids[0].length: ", podUserns(runtimeapi.NamespaceMode_POD, &runtimeapi.IDMapping{HostId: 65536})},
	{"userns of less than nobody", bad, usernsField + ".uids[0].length: ", podUserns(runtimeapi.NamespaceMode_POD, &runtimeapi.IDMapping{HostId: 65536, Length: 65535})},
	{"userns of the node's root", bad, usernsField + ".uids[0].host_id: ", podUserns(runtimeapi.NamespaceMode_POD, ids(0))},
	{"userns beyond 32 bits", bad, usernsField + ".uids[0].length: ", podUserns(runtimeapi.NamespaceMode_POD, ids(1<<32-65536))},
	{"userns on the node's network", bad, "config.linux.security_context.namespace_options.network: ", podNS(withUserns(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}))},
	{"userns with the node's processes", bad, "config.linux.security_context.namespace_options.pid: ", podNS(withUserns(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE}))},
	{"userns with the node's ipc", bad, "config.linux.security_context.namespace_options.ipc: ", podNS(withUserns(&runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_NODE}))},
	{"sysctl of the node", bad, "config.linux.sysctls[vm.swappiness]: ", podSysctl("vm.swappiness", "1")},
	{"sysctl core_pattern", bad, "config.linux.sysctls[kernel.core_pattern]: ", podSysctl("kernel.core_pattern", "|/bin/x")},
	{"sysctl hostname", bad, "config.linux.sysctls[kernel.hostname]: ", podSysctl("kernel.hostname", "x")},
	{"sysctl user", bad, "config.linux.sysctls[user.max_user_namespaces]: ", podSysctl("user.max_user_namespaces", "0")},
	{"sysctl with slashes", bad, "config.linux.sysctls: ", podSysctl("net/core/somaxconn", "1")},
	{"sysctl that climbs", bad, "config.linux.sysctls: ", podSysctl("net.ipv4.../../kernel/core_pattern", "1")},
	{"sysctl with dots", bad, "config.linux.sysctls: ", podSysctl("net..kernel", "1")},
	{"sysctl without name", bad, "config.linux.sysctls: ", podSysctl("", "1")},
	{"sysctl value with newline", bad, "config.linux.sysctls[net.x]: ", podSysctl("net.x", "1\n2")},
	{"sysctl value with NUL", bad, "config.linux.sysctls[net.x]: ", podSysctl("net.x", "1\x00")},
	{"sysctl value too long", bad, "config.linux.sysctls[net.x]: ", podSysctl("net.x", strings.Repeat("1", 4097))},
	{"sysctl of the host's network", bad, "config.linux.sysctls[net.core.somaxconn]: ", podNS(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE})},
	{"sysctl of the host's ipc", bad, "config.linux.sysctls[kernel.shm_rmid_forced]: ", podNS(&runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_NODE})},
	{"overhead negative", bad, "config.linux.overhead.cpu_shares: ", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
		c.Linux.Overhead = &runtimeapi.LinuxContainerResources{CpuShares: -1}
	}},
	{"group without user", bad, "config.linux.security_context.run_as_group: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.RunAsGroup = &runtimeapi.Int64Value{} })},
	{"user negative", bad, "config.linux.security_context.run_as_user: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.RunAsUser = &runtimeapi.Int64Value{Value: -1} })},
	{"groups policy", bad, "config.linux.security_context.supplemental_groups_policy: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.SupplementalGroupsPolicy = 3 })},
	{"seccomp type", bad, "config.linux.security_context.seccomp.profile_type: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.Seccomp.ProfileType = 3 })},
	{"seccomp Localhost without path", bad, "config.linux.security_context.seccomp.localhost_ref: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) {
		s.Seccomp.ProfileType = runtimeapi.SecurityProfile_Localhost
	})},
	{"seccomp path without Localhost", bad, "config.linux.security_context.seccomp.localhost_ref: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.Seccomp.LocalhostRef = "/x" })},
	{"selinux level", bad, "config.linux.security_context.selinux_options.level: ", podSC(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.SelinuxOptions.Level = "s0\n" })},
}

type editPod = func(*runtimeapi.RunPodSandboxRequest, *runtimeapi.PodSandboxConfig)

func podName(n string) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = n }
}
func podHostname(h string) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Hostname = h }
}
func podLogs(d string) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.LogDirectory = d }
}
func podDNS(d *runtimeapi.DNSConfig) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.DnsConfig = d }
}
func podPort(p *runtimeapi.PortMapping) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
		c.PortMappings = []*runtimeapi.PortMapping{p}
	}
}
func podNS(n *runtimeapi.NamespaceOption) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = n
	}
}
func podUserns(mode runtimeapi.NamespaceMode, ids ...*runtimeapi.IDMapping) editPod {
	return podNS(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: mode, Uids: ids, Gids: ids}})
}

// ids is a mapping as the kubelet makes them.
func ids(host uint32) *runtimeapi.IDMapping {
	return &runtimeapi.IDMapping{HostId: host, Length: 65536}
}

func withUserns(o *runtimeapi.NamespaceOption) *runtimeapi.NamespaceOption {
	o.UsernsOptions = &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{ids(65536)}, Gids: []*runtimeapi.IDMapping{ids(65536)}}
	return o
}
func podSysctl(k, v string) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{k: v}
	}
}
func podSC(f func(*runtimeapi.LinuxSandboxSecurityContext)) editPod {
	return func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { f(c.Linux.SecurityContext) }
}

const usernsField = "config.linux.security_context.namespace_options.userns_options"

func TestRunPodSandboxRefuses(t *testing.T) {
	w := newWorld(t)
	for _, tt := range badPods {
		t.Run(tt.name, func(t *testing.T) {
			r := podRequest()
			tt.edit(r, r.Config)
			_, err := w.runtime.RunPodSandbox(t.Context(), r)
			wantRefusal(t, w, err, tt.code, tt.field)
		})
	}
}

// wantRefusal: the message begins with the field, and nothing below was called.
func wantRefusal(t *testing.T, w *world, err error, code codes.Code, field string) {
	t.Helper()
	wantStatus(t, err, code, field)
	if w.pods.reached() {
		t.Errorf("a refused request reached the manager: %v", w.pods.calls)
		w.pods.calls = nil
	}
}

// What is odd but fine.
func TestRunPodSandboxAccepts(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit editPod
	}{
		{"everything", func(*runtimeapi.RunPodSandboxRequest, *runtimeapi.PodSandboxConfig) {}},
		{"no linux", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Linux = nil }},
		{"default handler", func(r *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { r.RuntimeHandler = "" }},
		{"no hostname", podHostname("")},
		{"long name", podName(strings.Repeat("n", 253))},
		{"port without host port", podPort(&runtimeapi.PortMapping{})},
		{"domainname", podSysctl("kernel.domainname", "example.com")},
		{"mqueue", podSysctl("fs.mqueue.msg_max", "10")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			r := podRequest()
			tt.edit(r, r.Config)
			resp, err := w.runtime.RunPodSandbox(t.Context(), r)
			if err != nil || resp.GetPodSandboxId() != podID {
				t.Fatalf("got %v, %v", resp, err)
			}
		})
	}
}

type editContainer = func(*runtimeapi.CreateContainerRequest, *runtimeapi.ContainerConfig)

func ctrMount(m *runtimeapi.Mount) editContainer {
	return func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{m}
	}
}
func ctrTarget(p string) editContainer {
	return ctrMount(&runtimeapi.Mount{ContainerPath: p, HostPath: "/tmp"})
}
func ctrDevice(d *runtimeapi.Device) editContainer {
	return func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{d}
	}
}
func ctrSC(f func(*runtimeapi.LinuxContainerSecurityContext)) editContainer {
	return func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { f(c.Linux.SecurityContext) }
}
func ctrNS(n *runtimeapi.NamespaceOption) editContainer {
	return ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NamespaceOptions = n })
}
func ctrLimits(l *runtimeapi.LinuxContainerResources) editContainer {
	return func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Linux.Resources = l }
}
func ctrLog(p string) editContainer {
	return func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.LogPath = p }
}

const scField = "config.linux.security_context."

var badContainers = []struct {
	name  string
	code  codes.Code
	field string
	edit  editContainer
}{
	{"no pod", bad, "pod_sandbox_id: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { r.PodSandboxId = "" }},
	{"unknown pod", codes.NotFound, "pod ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { r.PodSandboxId = "ffff" }},
	{"no config", bad, "config: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { r.Config = nil }},
	{"no metadata", bad, "config.metadata: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Metadata = nil }},
	{"no name", bad, "config.metadata.name: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Metadata.Name = "" }},
	{"name climbs", bad, "config.metadata.name: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Metadata.Name = "../../x" }},
	{"no image", bad, "config.image.image: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Image = nil }},
	{"image handler", bad, "config.image.runtime_handler: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Image.RuntimeHandler = "x"
	}},
	{"unknown image", codes.NotFound, "image not found", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Image = &runtimeapi.ImageSpec{Image: "nothere"}
	}},
	{"command with NUL", bad, "config.command[0]: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Command = []string{"a\x00"}
	}},
	{"args with NUL", bad, "config.args[1]: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Args = []string{"", "a\x00"}
	}},
	{"command empty", bad, "config.command: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Command = []string{""} }},
	{"working dir relative", bad, "config.working_dir: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.WorkingDir = "x" }},
	{"env without name", bad, "config.envs[0].key: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Envs[0].Key = "" }},
	{"env name with =", bad, "config.envs[1].key: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Envs[1].Key = "A=B" }},
	{"env value with NUL", bad, "config.envs[0].value: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.Envs[0].Value = []byte{0} }},
	{"log path absolute", bad, "config.log_path: ", ctrLog("/etc/passwd")},
	{"log path climbs", bad, "config.log_path: ", ctrLog("a/../../b")},
	{"log path is the directory", bad, "config.log_path: ", ctrLog("./")},
	{"log path with NUL", bad, "config.log_path: ", ctrLog("a\x00")},
	{"log path too long", bad, "config.log_path: ", ctrLog(strings.Repeat("a", 5000))},
	{"stop signal", bad, "config.stop_signal: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) { c.StopSignal = 99 }},
	{"cdi name", bad, "config.CDI_devices[1].name: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v.com/gpu=0"}, {Name: "v.com/gpu"}}
	}},
	{"cdi switched off", lack, "config.CDI_devices: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v.com/gpu=0"}}
	}},
	{"windows", bad, "config.windows: ", func(r *runtimeapi.CreateContainerRequest, c *runtimeapi.ContainerConfig) {
		c.Windows = &runtimeapi.WindowsContainerConfig{}
	}},

	{"mount without target", bad, "config.mounts[0].container_path: ", ctrTarget("")},
	{"mount relative", bad, "config.mounts[0].container_path: ", ctrTarget("a")},
	{"mount on root", bad, "config.mounts[0].container_path: ", ctrTarget("/a/..")},
	{"mount with NUL", bad, "config.mounts[0].container_path: ", ctrTarget("/a\x00")},
	{"mount on /proc", bad, "config.mounts[0].container_path: ", ctrTarget("/proc")},
	{"mount on /proc/self", bad, "config.mounts[0].container_path: ", ctrTarget("/proc/self")},
	{"mount on /proc/self/attr", bad, "config.mounts[0].container_path: ", ctrTarget("/proc/self/attr")},
	{"mount on /proc/sys", bad, "config.mounts[0].container_path: ", ctrTarget("/proc/sys")},
	{"mount on /proc/sys/net/ipv4", bad, "config.mounts[0].container_path: ", ctrTarget("/proc/sys/net/ipv4")},
	{"mount on /proc/1", bad, "config.mounts[0].container_path: ", ctrTarget("/proc/1")},
	{"mount on /proc in disguise", bad, "config.mounts[0].container_path: ", ctrTarget("//proc/../proc/sys")},
	{"mount on /proc by climbing", bad, "config.mounts[0].container_path: ", ctrTarget("/../../proc/")},
	{"mount on /sys", bad, "config.mounts[0].container_path: ", ctrTarget("/sys")},
	{"mount on /sys/kernel", bad, "config.mounts[0].container_path: ", ctrTarget("/sys/kernel")},
	{"mount without source", bad, "config.mounts[0].host_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a"})},
	{"mount source relative", bad, "config.mounts[0].host_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "b"})},
	{"mount source climbs", bad, "config.mounts[0].host_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b/../c"})},
	{"mount propagation", bad, "config.mounts[0].propagation: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/tmp", Propagation: 9})},
	{"rro not read-only", bad, "config.mounts[0].recursive_read_only: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/tmp", RecursiveReadOnly: true})},
	{"rro that propagates", bad, "config.mounts[0].recursive_read_only: ", ctrMount(&runtimeapi.Mount{
		ContainerPath: "/a", HostPath: "/tmp", RecursiveReadOnly: true, Readonly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
	})},
	{"image mount without image", bad, "config.mounts[0].image.image: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{}})},
	{"image mount of an unknown handler", bad, "config.mounts[0].image.runtime_handler: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "busybox", RuntimeHandler: "kata"}})},
	{"image mount that propagates", bad, "config.mounts[0].propagation: ", ctrMount(&runtimeapi.Mount{
		ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "busybox"}, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL})},
	{"sub path absolute", bad, "config.mounts[0].image_sub_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "busybox"}, ImageSubPath: "/etc"})},
	{"sub path climbs", bad, "config.mounts[0].image_sub_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "busybox"}, ImageSubPath: "a/../../b"})},
	{"sub path with NUL", bad, "config.mounts[0].image_sub_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "busybox"}, ImageSubPath: "a\x00"})},
	{"image mount writable", bad, "config.mounts[0].readonly: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Image: &runtimeapi.ImageSpec{Image: "x"}})},
	{"image mount with source", bad, "config.mounts[0].host_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", Image: &runtimeapi.ImageSpec{Image: "x"}})},
	{"sub path without image", bad, "config.mounts[0].image_sub_path: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", ImageSubPath: "c"})},
	{"mount mappings of users alone", bad, "config.mounts[0].gidMappings: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: []*runtimeapi.IDMapping{ids(65536)}})},
	{"mount mappings of groups alone", bad, "config.mounts[0].uidMappings: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", GidMappings: []*runtimeapi.IDMapping{ids(65536)}})},
	{"mount mappings without root", bad, "config.mounts[0].uidMappings[0].container_id: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b",
		UidMappings: []*runtimeapi.IDMapping{{ContainerId: 1, Length: 65536}}, GidMappings: []*runtimeapi.IDMapping{{ContainerId: 1, Length: 65536}}})},
	{"mount mappings without a user namespace", bad, "config.mounts[0].uidMappings: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b",
		UidMappings: []*runtimeapi.IDMapping{ids(65536)}, GidMappings: []*runtimeapi.IDMapping{ids(65536)}})},
	{"mount option unknown", bad, "config.mounts[0].mount_options[1]: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", MountOptions: []string{"noexec", "suid"}})},
	{"mount option of an image", bad, "config.mounts[0].mount_options[0]: ", ctrMount(&runtimeapi.Mount{ContainerPath: "/a", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "busybox"}, MountOptions: []string{"rw"}})},

	{"device without path", bad, "config.devices[0].host_path: ", ctrDevice(&runtimeapi.Device{ContainerPath: "/dev/x", Permissions: "r"})},
	{"device climbs", bad, "config.devices[0].host_path: ", ctrDevice(&runtimeapi.Device{HostPath: "/dev/../etc", ContainerPath: "/dev/x", Permissions: "r"})},
	{"device without target", bad, "config.devices[0].container_path: ", ctrDevice(&runtimeapi.Device{HostPath: "/dev/null", Permissions: "r"})},
	{"device in /proc", bad, "config.devices[0].container_path: ", ctrDevice(&runtimeapi.Device{HostPath: "/dev/null", ContainerPath: "/dev/../proc/x", Permissions: "r"})},
	{"device permissions", bad, "config.devices[0].permissions: ", ctrDevice(&runtimeapi.Device{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rx"})},
	{"device without permissions", bad, "config.devices[0].permissions: ", ctrDevice(&runtimeapi.Device{HostPath: "/dev/null", ContainerPath: "/dev/x"})},
	{"device that is none", bad, "config.devices[0].host_path: ", ctrDevice(&runtimeapi.Device{HostPath: "/etc/passwd", ContainerPath: "/dev/x", Permissions: "r"})},
	{"device that is not there", bad, "config.devices[0].host_path: ", ctrDevice(&runtimeapi.Device{HostPath: "/dev/crisp-nothere", ContainerPath: "/dev/x", Permissions: "r"})},

	{"user and username", bad, scField + "run_as_username: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "x" })},
	{"username", bad, scField + "run_as_username: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsUsername = nil, "a:b" })},
	{"group without user", bad, scField + "run_as_group: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = nil })},
	{"user negative", bad, scField + "run_as_user: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser.Value = -1 })},
	{"user beyond 31 bits", bad, scField + "run_as_user: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser.Value = 1 << 32 })},
	{"group beyond 31 bits", bad, scField + "run_as_group: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup.Value = 1 << 31 })},
	{"supplemental group", bad, scField + "supplemental_groups[1]: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{1, -1} })},
	{"too many groups", bad, scField + "supplemental_groups: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = make([]int64, 65537) })},
	{"add capability", bad, scField + "capabilities.add_capabilities: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities.AddCapabilities = []string{"CAP_FLY"}
	})},
	{"drop capability", bad, scField + "capabilities.drop_capabilities: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities.DropCapabilities = []string{""}
	})},
	{"ambient capability", bad, scField + "capabilities.add_ambient_capabilities: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities.AddAmbientCapabilities = []string{"x"}
	})},
	{"masked path", bad, scField + "masked_paths[1]: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.MaskedPaths = []string{"/a", "b"} })},
	{"readonly path", bad, scField + "readonly_paths[0]: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.ReadonlyPaths = []string{""} })},
	{"seccomp type", bad, scField + "seccomp.profile_type: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: 5}
	})},
	{"seccomp without path", bad, scField + "seccomp.localhost_ref: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost}
	})},
	{"seccomp path relative", bad, scField + "seccomp.localhost_ref: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x.json"}
	})},
	{"seccomp of the old form", bad, scField + "seccomp_profile_path: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SeccompProfilePath = "localhost/" })},
	{"apparmor by name", lack, scField + "apparmor: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x"}
	})},
	{"apparmor of the old form", lack, scField + "apparmor: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.ApparmorProfile = "localhost/x" })},
	{"apparmor nonsense", bad, scField + "apparmor_profile: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.ApparmorProfile = "x" })},
	{"selinux type", bad, scField + "selinux_options.type: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "a:b"}
	})},
	{"privileged in a pod that is not", bad, scField + "privileged: ", ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true })},

	{"network CONTAINER", bad, scField + "namespace_options.network: ", ctrNS(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_CONTAINER})},
	{"network of the node", bad, scField + "namespace_options.network: ", ctrNS(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE})},
	{"ipc of the node", bad, scField + "namespace_options.ipc: ", ctrNS(&runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_NODE})},
	{"pid of the node", bad, scField + "namespace_options.pid: ", ctrNS(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE})},
	{"pid of the pod", bad, scField + "namespace_options.pid: ", ctrNS(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD})},
	{"pid unknown", bad, scField + "namespace_options.pid: ", ctrNS(&runtimeapi.NamespaceOption{Pid: 8})},
	{"target missing", bad, scField + "namespace_options.target_id: ", ctrNS(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET})},
	{"target unknown", codes.NotFound, "target container", ctrNS(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "ffff"})},
	{"userns that the pod has not", bad, scField + "namespace_options.userns_options.mode: ", ctrNS(withUserns(&runtimeapi.NamespaceOption{}))},

	{"period negative", bad, "config.linux.resources.cpu_period: ", ctrLimits(&runtimeapi.LinuxContainerResources{CpuPeriod: -1})},
	{"quota negative", bad, "config.linux.resources.cpu_quota: ", ctrLimits(&runtimeapi.LinuxContainerResources{CpuQuota: -2})},
	{"shares negative", bad, "config.linux.resources.cpu_shares: ", ctrLimits(&runtimeapi.LinuxContainerResources{CpuShares: -1})},
	{"memory negative", bad, "config.linux.resources.memory_limit_in_bytes: ", ctrLimits(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -1})},
	{"swap negative", bad, "config.linux.resources.memory_swap_limit_in_bytes: ", ctrLimits(&runtimeapi.LinuxContainerResources{MemorySwapLimitInBytes: -2})},
	{"oom score", bad, "config.linux.resources.oom_score_adj: ", ctrLimits(&runtimeapi.LinuxContainerResources{OomScoreAdj: 1001})},
	{"cpuset", bad, "config.linux.resources.cpuset_cpus: ", ctrLimits(&runtimeapi.LinuxContainerResources{CpusetCpus: "0\n1"})},
	{"mems", bad, "config.linux.resources.cpuset_mems: ", ctrLimits(&runtimeapi.LinuxContainerResources{CpusetMems: "all"})},
	{"huge page size", bad, "config.linux.resources.hugepage_limits[0].page_size: ", ctrLimits(&runtimeapi.LinuxContainerResources{
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "../x"}},
	})},
	{"unified key", bad, "config.linux.resources.unified: ", ctrLimits(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"../cgroup.procs": "1"}})},
	{"unified value", bad, "config.linux.resources.unified[memory.high]: ", ctrLimits(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "1\n"}})},
}

func TestCreateContainerRefuses(t *testing.T) {
	w := newWorld(t)
	for _, tt := range badContainers {
		t.Run(tt.name, func(t *testing.T) {
			r := containerRequest()
			tt.edit(r, r.Config)
			_, err := w.runtime.CreateContainer(t.Context(), r)
			wantRefusal(t, w, err, tt.code, tt.field)
		})
	}
}

// What an unprivileged container may mount over, and a privileged one.
func TestMountTargets(t *testing.T) {
	for _, tt := range []struct {
		target             string
		anyone, privileged bool
	}{
		{"/data", true, true},
		{"/dev", true, true},
		{"/dev/termination-log", true, true},
		{"/proc/cpuinfo", true, true},
		{"/proc/meminfo/x", false, false},
		{"/proc/sysrq-trigger", false, false},
		{"/process", true, true},
		{"/sys", false, true},
		{"/sys/fs/bpf", true, true},
		{"/sys/fs/bpf/x", true, true},
		{"/sys/fs/cgroup", true, true},
		{"/sys/fs", false, true},
		{"/sys/kernel/debug", true, true},
		{"/sys/firmware", false, true},
		{"/system", true, true},
	} {
		for _, privileged := range []bool{false, true} {
			var c checker
			c.target("f", tt.target, privileged)
			if want := map[bool]bool{false: tt.anyone, true: tt.privileged}[privileged]; (c.err() == nil) != want {
				t.Errorf("%s, privileged %v: got %v, want allowed %v", tt.target, privileged, c.err(), want)
			}
		}
	}
}

// Security modules count where the host has them.
func TestSecurityModules(t *testing.T) {
	labelled := ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "spc_t"}
	})
	standard := ctrSC(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	})
	for _, tt := range []struct {
		name              string
		selinux, apparmor bool
		edit              editContainer
		want              codes.Code
	}{
		{"label without SELinux has no effect", false, false, labelled, codes.OK},
		{"label with SELinux", true, false, labelled, lack},
		{"default profile without AppArmor", false, false, standard, lack},
		{"default profile with AppArmor", false, true, standard, codes.OK},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, func(c *Config) {
				c.Host.SELinux = tt.selinux
				if tt.apparmor {
					c.AppArmor = &fakeProfiles{loaded: []string{apparmor.Default}}
				}
			})
			r := containerRequest()
			tt.edit(r, r.Config)
			_, err := w.runtime.CreateContainer(t.Context(), r)
			wantStatus(t, err, tt.want, "")
		})
	}
}

// A missing mount source is made, but not by a request that is refused.
func TestMountSource(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	missing := filepath.Join(dir, "a", "b")
	r := containerRequest()
	r.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/x", HostPath: missing}}

	r.Config.Devices = []*runtimeapi.Device{{HostPath: "/dev/crisp-nothere", ContainerPath: "/dev/x", Permissions: "r"}}
	if _, err := w.runtime.CreateContainer(t.Context(), r); err == nil {
		t.Fatal("a device that is not there was accepted")
	}
	if _, err := os.Stat(missing); !os.IsNotExist(err) {
		t.Fatalf("a refused request made %s: %v", missing, err)
	}

	r.Config.Devices = nil
	if _, err := w.runtime.CreateContainer(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(missing); err != nil || st.Mode().Perm() != 0o755 {
		t.Fatalf("got %v, %v, want a directory of mode 0755", st, err)
	}

	dangling := filepath.Join(dir, "dangling")
	if err := os.Symlink(filepath.Join(dir, "c"), dangling); err != nil {
		t.Fatal(err)
	}
	r.Config.Mounts[0].HostPath = dangling
	_, err := w.runtime.CreateContainer(t.Context(), r)
	wantStatus(t, err, bad, "config.mounts[0].host_path: ")
	if _, err := os.Lstat(filepath.Join(dir, "c")); !os.IsNotExist(err) {
		t.Errorf("made something through a link: %v", err)
	}
}
