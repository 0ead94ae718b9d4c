package cri

import (
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/caps"
	"github.com/crisp-cri/crisp/runtime/cdi"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// Limits of the specification and of the kernel.
const (
	maxPath     = 4096 // PATH_MAX, with the NUL
	maxHostname = 64   // __NEW_UTS_LEN, uname(2)
	maxOOMScore = 1000 // proc_pid_oom_score_adj(5)
)

// Limits of ours. They are far above what the kubelet sends and keep a record
// or a file of the pod readable.
const (
	// maxName bounds a pod's name, namespace and uid and a container's name: the
	// length of a DNS subdomain (RFC 1123), which is what Kubernetes allows.
	maxName = 253
	// maxID is four times what ours are long; it keeps errors and log lines short.
	maxID = 256
	// maxRef bounds an image reference: a name of 255 bytes, a tag of 128, a digest of 71, and room.
	maxRef = 1024
	// maxDNSEntries and maxDNSEntry: resolv.conf(5) reads three servers and, since glibc 2.26,
	// any number of search domains; the kubelet sends at most 32.
	maxDNSEntries = 64
	maxDNSEntry   = 1024
	maxSysctl     = 4096 // bytes of a value: proc_sys_call_handler takes less than a page of most
)

// A fieldError says which field of a request is wrong. It unwraps to its kind:
// podsandbox.ErrInvalid or podsandbox.ErrUnsupported.
type fieldError struct {
	field   string // "config.linux.sysctls[net.x]"
	problem string
	kind    error
}

func (e *fieldError) Error() string { return e.field + ": " + e.problem }
func (e *fieldError) Unwrap() error { return e.kind }

func invalid(field, format string, args ...any) error {
	return &fieldError{field, problem(format, args...), podsandbox.ErrInvalid}
}

// problem is Sprintf, but no longer than somebody reads: args can hold foreign text that others quoted whole.
func problem(format string, args ...any) string {
	return cut(fmt.Sprintf(format, args...), 600)
}

// A checker walks a request. It keeps the first field that can never work, and
// the first that asks for what this version or host lacks; the former counts more.
type checker struct {
	wrong, missing error
}

// bad notes a field that can never work.
func (c *checker) bad(field, format string, args ...any) {
	if c.wrong == nil {
		c.wrong = invalid(field, format, args...)
	}
}

// lacks notes a field that asks for what is not there; format is a sentence on why.
func (c *checker) lacks(field, format string, args ...any) {
	if c.missing == nil {
		c.missing = &fieldError{field, problem(format, args...), podsandbox.ErrUnsupported}
	}
}

func (c *checker) err() error {
	if c.wrong != nil {
		return c.wrong
	}
	return c.missing
}

// clip shortens foreign text for an error or a log line.
func clip(s string) string { return cut(s, 128) }

// cut shortens text to some bytes, between characters: a message with half a one cannot be sent (proto3 strings are UTF-8).
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) { // at 0: it is no UTF-8 anyway
		most--
	}
	return s[:most] + "..."
}

// id checks the one field that most calls have. An id that nobody has is not this function's business.
func (c *checker) id(field, id string) {
	switch {
	case id == "":
		c.bad(field, "must not be empty")
	case len(id) > maxID || hasControl(id):
		c.bad(field, "%q is no id: it is longer than %d bytes, or has control characters", clip(id), maxID)
	}
}

// checkID is for the calls whose only field to check is an id.
func checkID(field, id string) error {
	var c checker
	c.id(field, id)
	return c.err()
}

// hasControl finds NUL, newline and their like: nothing that reaches a line of a file,
// a path or a terminal has them.
func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f })
}

// name checks a part of an identity: it becomes a part of log paths, titles and records (CVE-2025-0750).
func (c *checker) name(field, s string) {
	switch {
	case s == "":
		c.bad(field, "must not be empty")
	case len(s) > maxName:
		c.bad(field, "is %d bytes long, at most %d are allowed", len(s), maxName)
	case strings.Contains(s, "/") || strings.Contains(s, "..") || s == "." || hasControl(s):
		c.bad(field, "%q must not contain '/', '..' or control characters", clip(s))
	}
}

// absPath checks a path of the host or of a container.
func (c *checker) absPath(field, p string) bool {
	switch {
	case p == "":
		c.bad(field, "must not be empty")
	case len(p) >= maxPath:
		c.bad(field, "is %d bytes long, at most %d are allowed", len(p), maxPath-1)
	case strings.ContainsRune(p, 0):
		c.bad(field, "must not contain NUL")
	case !path.IsAbs(p):
		c.bad(field, "%q must be an absolute path", clip(p))
	default:
		return true
	}
	return false
}

// climbs says whether a path has an element "..".
func climbs(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }

// enum checks that a value is one of the proto's.
func enum[E ~int32](c *checker, field string, v E, names map[int32]string) bool {
	if _, ok := names[int32(v)]; !ok {
		c.bad(field, "unknown value %d", v)
		return false
	}
	return true
}

// ---- RunPodSandbox

// runPod checks a RunPodSandboxRequest.
func (c *checker) runPod(r *runtimeapi.RunPodSandboxRequest, cfg *Config) {
	config := r.GetConfig()
	if config == nil {
		c.bad("config", "must be set")
		return
	}
	m := config.GetMetadata()
	if m == nil {
		c.bad("config.metadata", "must be set")
		return
	}
	c.name("config.metadata.name", m.GetName())
	c.name("config.metadata.uid", m.GetUid())
	c.name("config.metadata.namespace", m.GetNamespace())
	c.handler("runtime_handler", r.GetRuntimeHandler(), cfg)
	c.hostname("config.hostname", config.GetHostname())
	if d := config.GetLogDirectory(); d != "" && c.absPath("config.log_directory", d) {
		switch {
		case climbs(d):
			c.bad("config.log_directory", "%q must not contain '..'", clip(d))
		case hasControl(d):
			c.bad("config.log_directory", "%q must not contain control characters", clip(d))
		case path.Clean(d) == "/":
			c.bad("config.log_directory", "must not be the root directory")
		}
	}
	c.dns("config.dns_config", config.GetDnsConfig())
	for i, p := range config.GetPortMappings() {
		c.port(fmt.Sprintf("config.port_mappings[%d]", i), p)
	}
	if config.GetWindows() != nil {
		c.bad("config.windows", "this is a Linux node")
	}
	linux := config.GetLinux()
	if p := linux.GetCgroupParent(); p != "" {
		if err := cfg.CheckCgroupParent(p); err != nil {
			c.bad("config.linux.cgroup_parent", "%v", err)
		}
	}
	sc := linux.GetSecurityContext()
	ns := sc.GetNamespaceOptions()
	c.podNamespaces("config.linux.security_context.namespace_options", ns, &cfg.Host)
	c.sysctls("config.linux.sysctls", linux.GetSysctls(), ns)
	c.resources("config.linux.overhead", linux.GetOverhead())
	c.resources("config.linux.resources", linux.GetResources())
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		c.bad("config.linux.security_context.run_as_group", "needs run_as_user")
	}
	c.uid("config.linux.security_context.run_as_user", sc.GetRunAsUser())
	c.uid("config.linux.security_context.run_as_group", sc.GetRunAsGroup())
	c.groups("config.linux.security_context", sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
	// No process of the pod's own runs what a user brought, so these are checked for
	// sense only; the containers bring their own.
	c.profile("config.linux.security_context.seccomp", sc.GetSeccomp())
	c.profile("config.linux.security_context.apparmor", sc.GetApparmor())
	c.selinux("config.linux.security_context.selinux_options", sc.GetSelinuxOptions(), cfg)
}

// handler checks a runtime handler's name; "" is the default one.
func (c *checker) handler(field, name string, cfg *Config) {
	if name != "" && !slices.Contains(cfg.Handlers, name) {
		c.bad(field, "unknown runtime handler %q (there is the default one, \"\"%s)", clip(name), quoted(cfg.Handlers))
	}
}

func quoted(l []string) string {
	var b strings.Builder
	for _, s := range l {
		b.WriteString(", " + strconv.Quote(s))
	}
	return b.String()
}

// hostnamePattern is a DNS subdomain (RFC 1123), in whatever case: sethostname(2) itself takes anything.
var hostnamePattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*$`)

func (c *checker) hostname(field, s string) {
	switch {
	case s == "": // the node's
	case len(s) > maxHostname:
		c.bad(field, "is %d bytes long, the kernel allows %d", len(s), maxHostname)
	case !hostnamePattern.MatchString(s):
		c.bad(field, "%q is no DNS name", s)
	}
}

// A namedList is a repeated field with its name.
type namedList struct {
	name   string
	values []string
}

// dns: each entry becomes a word of /etc/resolv.conf.
func (c *checker) dns(field string, d *runtimeapi.DNSConfig) {
	for _, list := range []namedList{{"servers", d.GetServers()}, {"searches", d.GetSearches()}, {"options", d.GetOptions()}} {
		if len(list.values) > maxDNSEntries {
			c.bad(field+"."+list.name, "has %d entries, at most %d are allowed", len(list.values), maxDNSEntries)
			continue
		}
		for i, v := range list.values {
			f := fmt.Sprintf("%s.%s[%d]", field, list.name, i)
			switch {
			case v == "":
				c.bad(f, "must not be empty")
			case len(v) > maxDNSEntry:
				c.bad(f, "is %d bytes long, at most %d are allowed", len(v), maxDNSEntry)
			case hasControl(v) || strings.ContainsAny(v, " #;"): // a comment would swallow the rest
				c.bad(f, "%q must be one word without '#', ';' and control characters", clip(v))
			case list.name == "servers":
				if _, err := netip.ParseAddr(v); err != nil {
					c.bad(f, "%q is no IP address", clip(v))
				}
			}
		}
	}
}

func (c *checker) port(field string, p *runtimeapi.PortMapping) {
	enum(c, field+".protocol", p.GetProtocol(), runtimeapi.Protocol_name)
	if n := p.GetHostPort(); n < 0 || n > 65535 {
		c.bad(field+".host_port", "%d is not between 0 and 65535", n)
	}
	switch n := p.GetContainerPort(); {
	case n < 0 || n > 65535:
		c.bad(field+".container_port", "%d is not between 0 and 65535", n)
	case n == 0 && p.GetHostPort() != 0:
		c.bad(field+".container_port", "must be set, because host_port is %d", p.GetHostPort())
	}
	if ip := p.GetHostIp(); ip != "" {
		if a, err := netip.ParseAddr(ip); err != nil || a.Zone() != "" {
			c.bad(field+".host_ip", "%q is no IP address", clip(ip))
		}
	}
}

func (c *checker) podNamespaces(field string, ns *runtimeapi.NamespaceOption, host *Host) {
	for _, f := range []struct {
		name string
		mode runtimeapi.NamespaceMode
	}{{"network", ns.GetNetwork()}, {"ipc", ns.GetIpc()}} {
		if enum(c, field+"."+f.name, f.mode, runtimeapi.NamespaceMode_name) &&
			f.mode != runtimeapi.NamespaceMode_POD && f.mode != runtimeapi.NamespaceMode_NODE {
			c.bad(field+"."+f.name, "%s is not possible: containers of a pod share it, POD and NODE are", f.mode)
		}
	}
	// TARGET is an ephemeral container's; the kubelet never sends it for a pod.
	if enum(c, field+".pid", ns.GetPid(), runtimeapi.NamespaceMode_name) && ns.GetPid() == runtimeapi.NamespaceMode_TARGET {
		c.bad(field+".pid", "TARGET is possible for a container only")
	}
	c.userns(field+".userns_options", ns.GetUsernsOptions(), host)
	if !hasUserns(ns) {
		return
	}
	// The kernel mounts /proc, /sys and /dev/mqueue for the owner of the namespace that each shows, and the node's belong to
	// the node's root. What the kubelet knows of this is features.user_namespaces_host_network.
	for _, f := range []struct {
		name string
		mode runtimeapi.NamespaceMode
	}{{"network", ns.GetNetwork()}, {"pid", ns.GetPid()}, {"ipc", ns.GetIpc()}} {
		if f.mode == runtimeapi.NamespaceMode_NODE {
			c.bad(field+"."+f.name, "NODE is not possible in a pod with a user namespace (userns_options.mode POD): the node's does not belong to it")
		}
	}
}

// hasUserns says whether these are the namespaces of a pod with a user namespace. No userns_options are NODE, whatever the
// proto's comment says: the kubelet sends none for pods without hostUsers: false.
func hasUserns(ns *runtimeapi.NamespaceOption) bool {
	u := ns.GetUsernsOptions()
	return u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD
}

// userns checks what KEP-127 and critest ask for.
func (c *checker) userns(field string, u *runtimeapi.UserNamespace, host *Host) {
	if u == nil || !enum(c, field+".mode", u.GetMode(), runtimeapi.NamespaceMode_name) {
		return
	}
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			c.bad(field, "mode NODE has no mappings")
		}
	case runtimeapi.NamespaceMode_POD:
		c.mappings(field+".uids", u.GetUids(), field+".gids", u.GetGids())
		if host.NoUserNamespaces != "" {
			c.lacks(field+".mode", "pods cannot have a user namespace on this node: %s. The kubelet is told so by Status (runtime_handlers[].features.user_namespaces)", host.NoUserNamespaces)
		}
	default:
		c.bad(field+".mode", "%s is not possible, POD and NODE are", u.GetMode())
	}
}

// minIDs is how many ids a pod with a user namespace has at least: images and tools count on all 16-bit ones (65534 is
// nobody), and KEP-127 gives pods multiples of it.
const minIDs = 65536

// mappings checks a pair: one mapping each, and the same one. Volumes have the same owners for users and groups then, and a
// pod's ids are one range of the node's.
func (c *checker) mappings(uidField string, uids []*runtimeapi.IDMapping, gidField string, gids []*runtimeapi.IDMapping) {
	c.mapping(uidField, uids)
	c.mapping(gidField, gids)
	if len(uids) == 1 && len(gids) == 1 && !sameIDs(uids[0], gids[0]) {
		c.bad(gidField, "maps to %s, but the user ids map to %s: they must be the same", hostIDs(gids[0]), hostIDs(uids[0]))
	}
}

func sameIDs(a, b *runtimeapi.IDMapping) bool {
	return a.GetContainerId() == b.GetContainerId() && a.GetHostId() == b.GetHostId() && a.GetLength() == b.GetLength()
}

func hostIDs(m *runtimeapi.IDMapping) string {
	return fmt.Sprintf("%d and the next %d", m.GetHostId(), m.GetLength())
}

func (c *checker) mapping(field string, l []*runtimeapi.IDMapping) {
	if len(l) != 1 {
		c.bad(field, "has %d mappings, exactly one is supported", len(l))
		return
	}
	switch m := l[0]; {
	case m.GetContainerId() != 0:
		c.bad(field+"[0].container_id", "is %d: id 0 must be mapped", m.GetContainerId())
	case m.GetLength() < minIDs:
		c.bad(field+"[0].length", "is %d: a pod needs %d ids at least", m.GetLength(), minIDs)
	case m.GetHostId() == 0:
		c.bad(field+"[0].host_id", "is 0: the pod's root would be the node's")
	case uint64(m.GetHostId())+uint64(m.GetLength()) > 1<<32-1: // the last 32-bit id is none, user_namespaces(7)
		c.bad(field+"[0].length", "host ids %s reach beyond 32 bits", hostIDs(m))
	}
}

// sysctlPattern is the dotted form. A '/' (in place of a dot in a name of an interface) is refused: no pod needs it
// for what it may set, and nothing then can lead to another file.
var sysctlPattern = regexp.MustCompile(`^[a-z0-9_]+(\.[a-zA-Z0-9_-]+)+$`)

// ipcSysctls are those of the IPC namespace (sysctl(2), ipc_namespaces(7)); so is fs.mqueue.*.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
	"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// sysctlValue: numbers, names and lists of them, as in ip_local_reserved_ports (tabs separate, too). Nothing that some tool could
// take for a second sysctl (CVE-2022-0811).
var sysctlValue = regexp.MustCompile(`^[a-zA-Z0-9 \t.,_:/-]*$`)

// sysctls refuses what is not the pod's own (CVE-2022-0532) and values that
// say more than one thing (CVE-2022-0811).
func (c *checker) sysctls(field string, m map[string]string, ns *runtimeapi.NamespaceOption) {
	for _, key := range slices.Sorted(maps.Keys(m)) {
		f := fmt.Sprintf("%s[%s]", field, clip(key))
		if !sysctlPattern.MatchString(key) || len(key) > maxName {
			c.bad(field, "%q is no name of a sysctl, like net.ipv4.ip_forward", clip(key))
			continue
		}
		if why := sysctlForbidden(key, ns); why != "" {
			c.bad(f, "%s", why)
		}
		value := m[key]
		switch {
		case len(value) > maxSysctl:
			c.bad(f, "value is %d bytes long, at most %d are allowed", len(value), maxSysctl)
		case !sysctlValue.MatchString(value):
			c.bad(f, "value %q has a character that no sysctl's value needs: letters, digits, blanks and . , _ : / - are allowed", clip(value))
		}
	}
}

// sysctlForbidden says why a pod with these namespaces may not set key, "" if it may.
func sysctlForbidden(key string, ns *runtimeapi.NamespaceOption) string {
	hostNetwork := ns.GetNetwork() == runtimeapi.NamespaceMode_NODE
	switch {
	case strings.HasPrefix(key, "net."):
		if hostNetwork {
			return "is of the network namespace, and the pod shares the node's (hostNetwork)"
		}
	case slices.Contains(ipcSysctls, key), strings.HasPrefix(key, "fs.mqueue."):
		if ns.GetIpc() == runtimeapi.NamespaceMode_NODE {
			return "is of the IPC namespace, and the pod shares the node's (hostIPC)"
		}
	case key == "kernel.domainname":
		if hostNetwork {
			return "is of the UTS namespace, and the pod shares the node's (hostNetwork)"
		}
	case strings.HasPrefix(key, "user."):
		if !hasUserns(ns) {
			return "is of the user namespace, and the pod shares the node's (hostUsers)"
		}
	case key == "kernel.hostname":
		return "is set by config.hostname"
	default:
		return "is not of a namespace and would change the node"
	}
	return ""
}

// ---- Security context, of pods and containers

// uid checks a user or group id; nil is none.
func (c *checker) uid(field string, v *runtimeapi.Int64Value) {
	if v != nil {
		c.numericID(field, v.GetValue())
	}
}

// numericID: the last 32-bit id means "no change" to the kernel, and ids beyond
// 31 bits are refused by Kubernetes and by image configs (CVE-2024-40635).
func (c *checker) numericID(field string, id int64) {
	if id < 0 || id > 1<<31-1 {
		c.bad(field, "%d is not between 0 and %d", id, 1<<31-1)
	}
}

func (c *checker) groups(field string, l []int64, policy runtimeapi.SupplementalGroupsPolicy) {
	enum(c, field+".supplemental_groups_policy", policy, runtimeapi.SupplementalGroupsPolicy_name)
	if len(l) > 65536 { // NGROUPS_MAX, setgroups(2)
		c.bad(field+".supplemental_groups", "has %d groups, the kernel allows 65536", len(l))
		return
	}
	for i, id := range l {
		if id < 0 || id > 1<<31-1 {
			c.numericID(fmt.Sprintf("%s.supplemental_groups[%d]", field, i), id)
		}
	}
}

// profile checks the form of a seccomp or AppArmor profile (CVE-2023-2431: an empty path ran unconfined).
func (c *checker) profile(field string, p *runtimeapi.SecurityProfile) {
	if p == nil || !enum(c, field+".profile_type", p.GetProfileType(), runtimeapi.SecurityProfile_ProfileType_name) {
		return
	}
	ref := p.GetLocalhostRef()
	localhost := p.GetProfileType() == runtimeapi.SecurityProfile_Localhost
	switch {
	case localhost && ref == "":
		c.bad(field+".localhost_ref", "must be set with profile type Localhost")
	case !localhost && ref != "":
		c.bad(field+".localhost_ref", "is for profile type Localhost only, this is %s", p.GetProfileType())
	case hasControl(ref) || len(ref) >= maxPath:
		c.bad(field+".localhost_ref", "%q must be shorter than %d bytes and without control characters", clip(ref), maxPath)
	}
}

var selinuxPattern = regexp.MustCompile(`^[a-zA-Z0-9_.-]*$`)
var selinuxLevel = regexp.MustCompile(`^[a-zA-Z0-9_.:,-]*$`)

// selinux checks the form; see the package documentation for when options count.
func (c *checker) selinux(field string, o *runtimeapi.SELinuxOption, cfg *Config) {
	if o == nil {
		return
	}
	for _, part := range []struct {
		name, value string
		pattern     *regexp.Regexp
	}{{"user", o.GetUser(), selinuxPattern}, {"role", o.GetRole(), selinuxPattern}, {"type", o.GetType(), selinuxPattern}, {"level", o.GetLevel(), selinuxLevel}} {
		if len(part.value) > maxName || !part.pattern.MatchString(part.value) {
			c.bad(field+"."+part.name, "%q is no part of an SELinux label", clip(part.value))
		}
	}
	if cfg.Host.SELinux && !cfg.SELinux && o.GetUser()+o.GetRole()+o.GetType()+o.GetLevel() != "" {
		c.lacks(field, "this crispd sets no SELinux labels: set runtime.selinux in its configuration, or leave seLinuxOptions out")
	}
}

// ---- CreateContainer

// createContainer checks a CreateContainerRequest as far as that is possible without
// the pod; podAllows does the rest. sandbox_config is not looked at: the pod's own counts.
func (c *checker) createContainer(r *runtimeapi.CreateContainerRequest, cfg *Config) {
	c.id("pod_sandbox_id", r.GetPodSandboxId())
	config := r.GetConfig()
	if config == nil {
		c.bad("config", "must be set")
		return
	}
	if config.GetMetadata() == nil {
		c.bad("config.metadata", "must be set")
		return
	}
	c.name("config.metadata.name", config.GetMetadata().GetName())
	c.imageSpec("config.image", config.GetImage(), cfg)
	c.command(config)
	c.envs("config.envs", config.GetEnvs())
	c.logPath("config.log_path", config.GetLogPath())
	enum(c, "config.stop_signal", config.GetStopSignal(), runtimeapi.Signal_name)
	privileged := config.GetLinux().GetSecurityContext().GetPrivileged()
	for i, m := range config.GetMounts() {
		c.mount(fmt.Sprintf("config.mounts[%d]", i), m, privileged, cfg)
	}
	for i, d := range config.GetDevices() {
		c.device(fmt.Sprintf("config.devices[%d]", i), d)
	}
	for i, d := range config.GetCDIDevices() {
		if name := d.GetName(); !cdi.IsName(name) {
			c.bad(fmt.Sprintf("config.CDI_devices[%d].name", i), "%q is no name of a device, like vendor.com/class=name", clip(name))
		}
	}
	if config.GetWindows() != nil {
		c.bad("config.windows", "this is a Linux node")
	}
	c.resources("config.linux.resources", config.GetLinux().GetResources())
	c.security("config.linux.security_context", config.GetLinux().GetSecurityContext(), cfg)
}

func (c *checker) imageSpec(field string, s *runtimeapi.ImageSpec, cfg *Config) {
	if s.GetImage() == "" {
		c.bad(field+".image", "must not be empty")
	}
	for _, f := range []struct{ name, ref string }{{"image", s.GetImage()}, {"user_specified_image", s.GetUserSpecifiedImage()}} {
		if len(f.ref) > maxRef || hasControl(f.ref) {
			c.bad(field+"."+f.name, "%q is no image: it is longer than %d bytes, or has control characters", clip(f.ref), maxRef)
		}
	}
	c.handler(field+".runtime_handler", s.GetRuntimeHandler(), cfg)
}

// command: what execve(2) cannot take.
func (c *checker) command(config *runtimeapi.ContainerConfig) {
	for _, list := range []namedList{{"config.command", config.GetCommand()}, {"config.args", config.GetArgs()}} {
		if i := slices.IndexFunc(list.values, func(s string) bool { return strings.ContainsRune(s, 0) }); i >= 0 {
			c.bad(fmt.Sprintf("%s[%d]", list.name, i), "must not contain NUL")
		}
	}
	if d := config.GetWorkingDir(); d != "" {
		c.absPath("config.working_dir", d)
	}
}

// envs: values are bytes (CRI 0.36), any but NUL; a name has no '='.
func (c *checker) envs(field string, l []*runtimeapi.KeyValue) {
	for i, e := range l {
		switch {
		case e.GetKey() == "":
			c.bad(fmt.Sprintf("%s[%d].key", field, i), "must not be empty")
		case strings.ContainsAny(e.GetKey(), "=\x00"):
			c.bad(fmt.Sprintf("%s[%d].key", field, i), "%q must not contain '=' or NUL", clip(e.GetKey()))
		case slices.Contains(e.GetValue(), 0):
			c.bad(fmt.Sprintf("%s[%d].value", field, i), "must not contain NUL (the variable is %q)", clip(e.GetKey()))
		}
	}
}

// logPath is joined to the pod's log directory (CVE-2025-0750).
func (c *checker) logPath(field, p string) {
	switch {
	case p == "": // no log
	case len(p) >= maxPath:
		c.bad(field, "is %d bytes long, at most %d are allowed", len(p), maxPath-1)
	case path.IsAbs(p) || climbs(p) || path.Clean(p) == "." || hasControl(p):
		c.bad(field, "%q must be a path below the pod's log directory: relative, without '..' and control characters", clip(p))
	}
}

// procFiles may be covered by a file system that shows a container its own
// limits (lxcfs): runc's list (libcontainer, checkProcMount), but without /proc/net/dev, whose
// parent is a link, and links below /proc are not followed.
var procFiles = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/loadavg", "/proc/meminfo", "/proc/slabinfo", "/proc/stat", "/proc/swaps",
	"/proc/uptime", "/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled",
}

// sysDirs are the mount points that the kernel makes in /sys for other file
// systems. Node agents mount the host's over them, also without being privileged.
var sysDirs = []string{
	"/sys/fs/bpf", "/sys/fs/cgroup", "/sys/fs/pstore", "/sys/fs/resctrl", "/sys/fs/selinux",
	"/sys/kernel/config", "/sys/kernel/debug", "/sys/kernel/security", "/sys/kernel/tracing", "/sys/firmware/efi/efivars",
}

// below says whether p is dir or in it; both are clean.
func below(p, dir string) bool { return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/") }

// target checks where a mount appears in the container. A mount over /proc would decide what the
// runtime itself reads and writes there while it starts the container
// (CVE-2025-52881, CVE-2019-16884); over /sys, what is masked.
func (c *checker) target(field, p string, privileged bool) {
	if !c.absPath(field, p) {
		return
	}
	switch clean := path.Clean(p); {
	case clean == "/":
		c.bad(field, "must not be the root file system")
	case below(clean, "/proc") && !slices.Contains(procFiles, clean):
		c.bad(field, "%q: mounts on /proc are not allowed", clip(p))
	case below(clean, "/sys") && !privileged && !slices.ContainsFunc(sysDirs, func(d string) bool { return below(clean, d) }):
		c.bad(field, "%q: mounts on /sys are for privileged containers only, except on %s", clip(p), strings.Join(sysDirs, ", "))
	}
}

func (c *checker) mount(field string, m *runtimeapi.Mount, privileged bool, cfg *Config) {
	c.target(field+".container_path", m.GetContainerPath(), privileged)
	propagation := m.GetPropagation()
	enum(c, field+".propagation", propagation, runtimeapi.MountPropagation_name)
	if m.GetRecursiveReadOnly() {
		switch {
		case !m.GetReadonly():
			c.bad(field+".recursive_read_only", "needs readonly")
		case propagation != runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
			c.bad(field+".recursive_read_only", "needs propagation PRIVATE, this is %s", propagation)
		case !cfg.Host.RecursiveReadOnly:
			c.lacks(field+".recursive_read_only", "RROUnsupported: this kernel cannot make mounts read-only recursively (mount_setattr, Linux 5.12)")
		}
	}
	for i, o := range m.GetMountOptions() {
		if !slices.Contains(mountOptions, o) {
			c.bad(fmt.Sprintf("%s.mount_options[%d]", field, i), "unknown option %q, possible are %s", clip(o), strings.Join(mountOptions, ", "))
		}
	}
	if m.GetImage() != nil {
		c.imageMount(field, m, cfg)
		return
	}
	if m.GetImageSubPath() != "" {
		c.bad(field+".image_sub_path", "needs image")
	}
	if c.absPath(field+".host_path", m.GetHostPath()) && climbs(m.GetHostPath()) {
		c.bad(field+".host_path", "%q must not contain '..'", clip(m.GetHostPath()))
	}
	if len(m.GetUidMappings())+len(m.GetGidMappings()) > 0 {
		c.mappings(field+".uidMappings", m.GetUidMappings(), field+".gidMappings", m.GetGidMappings())
	}
}

// mountOptions are those that CRI names for Mount.mount_options (KEP-5855): they only ever take something away.
var mountOptions = []string{"noexec", "nosuid", "nodev"}

// imageMount checks what is different in a mount of an image. Its id mappings are not looked at: the
// kubelet sends the pod's with every mount, and an image's files are mapped as the root file system's are.
func (c *checker) imageMount(field string, m *runtimeapi.Mount, cfg *Config) {
	if m.GetHostPath() != "" {
		c.bad(field+".host_path", "must be empty, because image is set")
	}
	c.imageSpec(field+".image", m.GetImage(), cfg)
	if !m.GetReadonly() {
		c.bad(field+".readonly", "must be set: an image is mounted read-only")
	}
	if m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL {
		c.bad(field+".propagation", "%s is not possible: nothing of the host is below an image", m.GetPropagation())
	}
	switch p := m.GetImageSubPath(); {
	case len(p) >= maxPath:
		c.bad(field+".image_sub_path", "is %d bytes long, at most %d are allowed", len(p), maxPath-1)
	case path.IsAbs(p) || climbs(p) || strings.ContainsRune(p, 0):
		c.bad(field+".image_sub_path", "%q must be a path below the image's root: relative, without '..' and NUL", clip(p))
	}
}

func (c *checker) device(field string, d *runtimeapi.Device) {
	if c.absPath(field+".host_path", d.GetHostPath()) && climbs(d.GetHostPath()) {
		c.bad(field+".host_path", "%q must not contain '..'", clip(d.GetHostPath()))
	}
	// The node is made inside the container, at this path.
	if p := d.GetContainerPath(); c.absPath(field+".container_path", p) {
		switch clean := path.Clean(p); {
		case clean == "/", below(clean, "/proc"), below(clean, "/sys"):
			c.bad(field+".container_path", "%q is no place for a device", clip(p))
		}
	}
	if p := d.GetPermissions(); p == "" || strings.Trim(p, "rwm") != "" || len(p) > 3 {
		c.bad(field+".permissions", "%q must be one or more of r, w and m", clip(p))
	}
}

func (c *checker) security(field string, sc *runtimeapi.LinuxContainerSecurityContext, cfg *Config) {
	if sc.GetRunAsUser() != nil && sc.GetRunAsUsername() != "" {
		c.bad(field+".run_as_username", "cannot be set together with run_as_user")
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil && sc.GetRunAsUsername() == "" {
		c.bad(field+".run_as_group", "needs run_as_user or run_as_username")
	}
	c.uid(field+".run_as_user", sc.GetRunAsUser())
	c.uid(field+".run_as_group", sc.GetRunAsGroup())
	if n := sc.GetRunAsUsername(); len(n) > maxName || hasControl(n) || strings.Contains(n, ":") {
		c.bad(field+".run_as_username", "%q is no name of a user", clip(n))
	}
	c.groups(field, sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
	c.containerNamespaces(field+".namespace_options", sc.GetNamespaceOptions(), &cfg.Host)
	for _, list := range []namedList{
		{"add_capabilities", sc.GetCapabilities().GetAddCapabilities()}, {"drop_capabilities", sc.GetCapabilities().GetDropCapabilities()},
		{"add_ambient_capabilities", sc.GetCapabilities().GetAddAmbientCapabilities()},
	} {
		if _, err := caps.Apply(nil, list.values, nil); err != nil {
			c.bad(field+".capabilities."+list.name, "%v", err)
		}
	}
	for _, list := range []namedList{{"masked_paths", sc.GetMaskedPaths()}, {"readonly_paths", sc.GetReadonlyPaths()}} {
		for i, p := range list.values {
			if len(p) >= maxPath || !path.IsAbs(p) || strings.ContainsRune(p, 0) { // there can be hundreds
				c.absPath(fmt.Sprintf("%s.%s[%d]", field, list.name, i), p)
			}
		}
	}
	c.profile(field+".seccomp", sc.GetSeccomp())
	if p := sc.GetSeccomp(); p.GetProfileType() == runtimeapi.SecurityProfile_Localhost && !path.IsAbs(p.GetLocalhostRef()) {
		c.bad(field+".seccomp.localhost_ref", "%q must be an absolute path", clip(p.GetLocalhostRef()))
	}
	if _, err := deprecatedProfile(sc.GetSeccompProfilePath()); err != nil {
		c.bad(field+".seccomp_profile_path", "%v", err)
	}
	c.apparmor(field, sc, cfg)
	c.selinux(field+".selinux_options", sc.GetSelinuxOptions(), cfg)
}

func (c *checker) containerNamespaces(field string, ns *runtimeapi.NamespaceOption, host *Host) {
	for _, f := range []struct {
		name string
		mode runtimeapi.NamespaceMode
	}{{"network", ns.GetNetwork()}, {"ipc", ns.GetIpc()}} {
		if enum(c, field+"."+f.name, f.mode, runtimeapi.NamespaceMode_name) &&
			f.mode != runtimeapi.NamespaceMode_POD && f.mode != runtimeapi.NamespaceMode_NODE {
			c.bad(field+"."+f.name, "%s is not possible: containers of a pod share it, POD and NODE are", f.mode)
		}
	}
	if enum(c, field+".pid", ns.GetPid(), runtimeapi.NamespaceMode_name) {
		if target := ns.GetPid() == runtimeapi.NamespaceMode_TARGET; target && ns.GetTargetId() == "" {
			c.bad(field+".target_id", "must be set with pid TARGET")
		}
	}
	c.userns(field+".userns_options", ns.GetUsernsOptions(), host)
}

// apparmor checks the form; a profile that is asked for on a host without AppArmor is a promise that cannot be kept.
func (c *checker) apparmor(field string, sc *runtimeapi.LinuxContainerSecurityContext, cfg *Config) {
	c.profile(field+".apparmor", sc.GetApparmor())
	if _, err := deprecatedProfile(sc.GetApparmorProfile()); err != nil {
		c.bad(field+".apparmor_profile", "%v", err)
		return
	}
	p := askedProfile(sc)
	if p == nil || sc.GetPrivileged() || cfg.AppArmor != nil {
		return
	}
	switch p.GetProfileType() {
	case runtimeapi.SecurityProfile_Localhost:
		c.lacks(field+".apparmor", "profile %q was asked for, but this kernel has no AppArmor", clip(p.GetLocalhostRef()))
	case runtimeapi.SecurityProfile_RuntimeDefault:
		c.lacks(field+".apparmor", "RuntimeDefault was asked for, but this kernel has no AppArmor; leave it out or say Unconfined")
	}
}

// askedProfile is the AppArmor profile that a checked config asks for, in the form of today; nil: none is named.
func askedProfile(sc *runtimeapi.LinuxContainerSecurityContext) *runtimeapi.SecurityProfile {
	if p := sc.GetApparmor(); p != nil {
		return p
	}
	p, _ := deprecatedProfile(sc.GetApparmorProfile()) // checked
	return p
}

// deprecatedProfile reads the strings that preceded SecurityProfile; "" is nil.
func deprecatedProfile(s string) (*runtimeapi.SecurityProfile, error) {
	ref, localhost := strings.CutPrefix(s, "localhost/")
	switch {
	case s == "":
		return nil, nil
	case s == "runtime/default" || s == "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case s == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case localhost && ref != "" && !hasControl(ref) && len(ref) < maxPath:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}, nil
	default:
		return nil, fmt.Errorf("%q is neither runtime/default nor unconfined nor localhost/NAME", clip(s))
	}
}

// ---- Resources

var (
	cpuList  = regexp.MustCompile(`^[0-9,-]*$`)                  // cpuset(7) "List format"; the kernel checks the rest
	pageSize = regexp.MustCompile(`^[0-9]{1,6}[KMG]B$`)          // "2MB": a part of a file's name
	v2File   = regexp.MustCompile(`^[a-z_]+(\.[a-zA-Z0-9_]+)+$`) // "memory.high": a file's name
)

// resources checks the limits of a container, a pod or an update; nil is none.
func (c *checker) resources(field string, r *runtimeapi.LinuxContainerResources) {
	if r == nil {
		return
	}
	for _, f := range []struct {
		name  string
		value int64
		least int64 // -1: unlimited
	}{
		{"cpu_period", r.GetCpuPeriod(), 0}, {"cpu_quota", r.GetCpuQuota(), -1}, {"cpu_shares", r.GetCpuShares(), 0},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes(), 0}, {"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1},
	} {
		if f.value < f.least {
			c.bad(field+"."+f.name, "%d is less than %d", f.value, f.least)
		}
	}
	if n := r.GetOomScoreAdj(); n < -maxOOMScore || n > maxOOMScore {
		c.bad(field+".oom_score_adj", "%d is not between -%d and %d", n, maxOOMScore, maxOOMScore)
	}
	for _, f := range []struct{ name, list string }{{"cpuset_cpus", r.GetCpusetCpus()}, {"cpuset_mems", r.GetCpusetMems()}} {
		if !cpuList.MatchString(f.list) || len(f.list) > maxPath {
			c.bad(field+"."+f.name, "%q is no list like 0-3,7", clip(f.list))
		}
	}
	for i, h := range r.GetHugepageLimits() {
		if !pageSize.MatchString(h.GetPageSize()) {
			c.bad(fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i), "%q is no size like 2MB", clip(h.GetPageSize()))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(r.GetUnified())) {
		if !v2File.MatchString(key) || len(key) > maxName {
			c.bad(field+".unified", "%q is no name of a cgroup v2 file, like memory.high", clip(key))
		} else if v := r.GetUnified()[key]; hasControl(v) || len(v) > maxPath {
			c.bad(fmt.Sprintf("%s.unified[%s]", field, key), "value %q must be one line of at most %d bytes", clip(v), maxPath)
		}
	}
}

// sameUserns checks what a container says of its pod's user namespace, whose mapping is ids (nil: it has none). It may say
// nothing.
func (c *checker) sameUserns(config *runtimeapi.ContainerConfig, ids *spawn.IDMap) {
	same := func(uids, gids []*runtimeapi.IDMapping) bool {
		return ids != nil && len(uids) == 1 && len(gids) == 1 && uids[0].GetHostId() == ids.UID && gids[0].GetHostId() == ids.GID &&
			uids[0].GetLength() == ids.Size && gids[0].GetLength() == ids.Size
	}
	sc := config.GetLinux().GetSecurityContext()
	const field = "config.linux.security_context."
	if ns := sc.GetNamespaceOptions(); ns.GetUsernsOptions() != nil {
		const field = field + "namespace_options.userns_options"
		switch u := ns.GetUsernsOptions(); {
		case hasUserns(ns) != (ids != nil):
			c.bad(field+".mode", "%s is not the pod's: containers of a pod share its user namespace", u.GetMode())
		case hasUserns(ns) && !same(u.GetUids(), u.GetGids()):
			c.bad(field+".uids", "is not the pod's mapping: containers of a pod share its user namespace")
		}
	}
	for i, m := range config.GetMounts() {
		switch {
		case m.GetImage() != nil: // its layers are mapped, and the kubelet copies the pod's mappings to all mounts alike
		case len(m.GetUidMappings()) == 0 || same(m.GetUidMappings(), m.GetGidMappings()):
		case ids == nil:
			c.bad(fmt.Sprintf("config.mounts[%d].uidMappings", i), "the pod has no user namespace to map to")
		default:
			c.bad(fmt.Sprintf("config.mounts[%d].uidMappings", i), "is not the mapping of the pod's user namespace")
		}
	}
	if ids == nil {
		return
	}
	for i, m := range config.GetMounts() {
		// The pod's root may mount what it likes, and here that would appear on the node.
		if m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL {
			c.bad(fmt.Sprintf("config.mounts[%d].propagation", i), "BIDIRECTIONAL is not possible in a pod with a user namespace: its root is not the node's, whose mounts it would make")
		}
	}
	mapped := func(name string, id int64) {
		if id >= int64(ids.Size) {
			c.bad(field+name, "%d is not in the pod's user namespace, which has the ids 0 to %d", id, ids.Size-1)
		}
	}
	mapped("run_as_user", sc.GetRunAsUser().GetValue())
	mapped("run_as_group", sc.GetRunAsGroup().GetValue())
	for i, id := range sc.GetSupplementalGroups() {
		mapped(fmt.Sprintf("supplemental_groups[%d]", i), id)
	}
}
