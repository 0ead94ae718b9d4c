package cri

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// wire makes the Echo of a message. It is deterministic, so that the same config
// gives the same bytes: that is how a repeated call is recognised.
var wire = proto.MarshalOptions{Deterministic: true}

func (s *runtimeService) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	var c checker
	if c.runPod(r, s.cfg); c.err() != nil {
		return nil, c.err()
	}
	config, err := s.podConfig(r)
	if err != nil {
		return nil, err
	}
	id, err := s.cfg.Pods.RunPod(ctx, config)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// podConfig translates a checked request.
func (s *runtimeService) podConfig(r *runtimeapi.RunPodSandboxRequest) (*podsandbox.PodConfig, error) {
	config := r.GetConfig()
	echo, err := wire.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the pod's config: %w", err)
	}
	ns := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	out := &podsandbox.PodConfig{
		Identity: podsandbox.Identity{
			Name: config.GetMetadata().GetName(), UID: config.GetMetadata().GetUid(),
			Namespace: config.GetMetadata().GetNamespace(), Attempt: config.GetMetadata().GetAttempt(),
		},
		Hostname:       config.GetHostname(),
		CgroupParent:   config.GetLinux().GetCgroupParent(),
		RuntimeHandler: r.GetRuntimeHandler(),
		Labels:         config.GetLabels(),
		Annotations:    config.GetAnnotations(),
		DNS: podsandbox.DNSConfig{
			Servers: config.GetDnsConfig().GetServers(), Searches: config.GetDnsConfig().GetSearches(), Options: config.GetDnsConfig().GetOptions(),
		},
		Network:    namespaceModes[ns.GetNetwork()],
		PID:        namespaceModes[ns.GetPid()],
		IPC:        namespaceModes[ns.GetIpc()],
		Userns:     idMap(ns),
		Sysctls:    s.sysctls(config.GetLinux().GetSysctls(), ns),
		Privileged: config.GetLinux().GetSecurityContext().GetPrivileged(),
		Echo:       echo,
	}
	if s.cfg.SELinux {
		if out.Label, err = s.podLabel(out.Identity, config.GetLinux().GetSecurityContext().GetSelinuxOptions()); err != nil {
			return nil, err
		}
	}
	if d := config.GetLogDirectory(); d != "" {
		out.LogDirectory = path.Clean(d)
	}
	// The kubelet leaves it empty for pods with the node's network; others for pods without one.
	if out.Hostname == "" {
		out.Hostname = s.cfg.Host.Hostname
	}
	if out.Network == podsandbox.NamespacePod {
		for _, p := range config.GetPortMappings() {
			if p.GetHostPort() != 0 { // 0 is "no host port" (CRI 0.33)
				out.Ports = append(out.Ports, portMapping(p))
			}
		}
	}
	return out, nil
}

// idMap is the checked mapping of a pod with a user namespace, nil of others.
func idMap(ns *runtimeapi.NamespaceOption) *spawn.IDMap {
	if !hasUserns(ns) {
		return nil
	}
	u, g := ns.GetUsernsOptions().GetUids()[0], ns.GetUsernsOptions().GetGids()[0]
	return &spawn.IDMap{UID: u.GetHostId(), GID: g.GetHostId(), Size: u.GetLength()}
}

var namespaceModes = map[runtimeapi.NamespaceMode]podsandbox.NamespaceMode{
	runtimeapi.NamespaceMode_POD:       podsandbox.NamespacePod,
	runtimeapi.NamespaceMode_CONTAINER: podsandbox.NamespaceContainer,
	runtimeapi.NamespaceMode_NODE:      podsandbox.NamespaceNode,
	runtimeapi.NamespaceMode_TARGET:    podsandbox.NamespaceTarget,
}

var protocols = map[runtimeapi.Protocol]network.Protocol{
	runtimeapi.Protocol_TCP: network.TCP, runtimeapi.Protocol_UDP: network.UDP, runtimeapi.Protocol_SCTP: network.SCTP,
}

func portMapping(p *runtimeapi.PortMapping) network.PortMapping {
	m := network.PortMapping{
		Protocol: protocols[p.GetProtocol()], ContainerPort: uint16(p.GetContainerPort()), HostPort: uint16(p.GetHostPort()),
	}
	if ip, err := netip.ParseAddr(p.GetHostIp()); err == nil { // checked; "" is every address
		m.HostIP = ip.Unmap()
	}
	return m
}

// sysctls adds the default ones, where the pod has the namespace of its own.
func (s *runtimeService) sysctls(asked map[string]string, ns *runtimeapi.NamespaceOption) map[string]string {
	out := maps.Clone(asked)
	for key, v := range s.cfg.DefaultSysctls {
		if _, set := asked[key]; !set && sysctlForbidden(key, ns) == "" {
			if out == nil {
				out = map[string]string{}
			}
			if ids := idMap(ns); ids != nil && key == pingGroupRange {
				v = mappedRange(v, ids.Size)
			}
			out[key] = v
		}
	}
	return out
}

// pingGroupRange are the groups that may open ICMP echo sockets, icmp(7).
const pingGroupRange = "net.ipv4.ping_group_range"

// mappedRange ends a range of ids, "0 2147483647", where a user namespace of that size does: the kernel refuses ids that it does
// not know. What is no such range is left for the kernel to judge.
func mappedRange(value string, size uint32) string {
	var low, high uint32
	if n, err := fmt.Sscan(value, &low, &high); n != 2 || err != nil || low >= size || high < size {
		return value
	}
	return fmt.Sprintf("%d\t%d", low, size-1)
}

func (s *runtimeService) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.cfg.Pods.StopPod(ctx, r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (s *runtimeService) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.cfg.Pods.RemovePod(ctx, r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (s *runtimeService) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	pod, err := s.cfg.Pods.Pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	status, config, err := podStatus(pod)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.PodSandboxStatusResponse{Status: status}
	if r.GetVerbose() {
		if resp.Info, err = podInfo(pod, config); err != nil {
			return nil, fmt.Errorf("cannot describe pod %q: %w", pod.ID, err)
		}
	}
	return resp, nil
}

// podStatus is a pod's status, with the config it was made from and what the kubelet said later of its resources.
func podStatus(pod *podsandbox.Pod) (*runtimeapi.PodSandboxStatus, *runtimeapi.PodSandboxConfig, error) {
	config := &runtimeapi.PodSandboxConfig{}
	if err := proto.Unmarshal(pod.Config.Echo, config); err != nil {
		return nil, nil, fmt.Errorf("cannot read the config of pod %q: %w", pod.ID, err)
	}
	if err := overlayResources(config, pod.Resources); err != nil {
		return nil, nil, fmt.Errorf("cannot read the resources of pod %q: %w", pod.ID, err)
	}
	// The kubelet compares the network mode and makes a new pod if it is absent or another.
	options := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if options == nil {
		options = &runtimeapi.NamespaceOption{}
	}
	out := &runtimeapi.PodSandboxStatus{
		Id:             pod.ID,
		Metadata:       podMetadata(pod),
		State:          podStates[pod.State],
		CreatedAt:      pod.CreatedAt.UnixNano(),
		Network:        &runtimeapi.PodSandboxNetworkStatus{},
		Linux:          &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: options}},
		Labels:         pod.Config.Labels,
		Annotations:    pod.Config.Annotations,
		RuntimeHandler: pod.Config.RuntimeHandler,
	}
	for i, ip := range pod.IPs {
		if i == 0 {
			out.Network.Ip = ip.String()
		} else {
			out.Network.AdditionalIps = append(out.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip.String()})
		}
	}
	return out, config, nil
}

// info is under the key "info" of a verbose status, in the form that containerd gave it:
// tools read pid, sandboxID and runtimeSpec there.
type info struct {
	SandboxID      string      `json:"sandboxID"`
	PID            int         `json:"pid"`
	RuntimeHandler string      `json:"runtimeHandler,omitempty"`
	Reason         string      `json:"reason,omitempty"`
	CgroupPath     string      `json:"cgroupPath,omitempty"`
	UpperDir       string      `json:"upperDir,omitempty"`
	NetNS          string      `json:"netNS,omitempty"`
	Config         any         `json:"config"`
	RuntimeSpec    *specs.Spec `json:"runtimeSpec"`
	// LogLost is how many bytes of output a full or broken log disk has cost; known when the container has ended.
	LogLost uint64 `json:"logLostBytes,omitempty"`
	// Timings are how long the steps of making it took: "12.3ms" by step.
	Timings []timing `json:"timings,omitempty"`
}

type timing struct {
	Step string `json:"step"`
	Took string `json:"took"`
}

func timings(l []podsandbox.Timing) (out []timing) {
	for _, t := range l {
		out = append(out, timing{t.Step, t.Duration.String()})
	}
	return out
}

// podInfo: a pod is not run from a specification; the one shown is a sketch with
// the pod's namespaces, which is what tools look for.
func podInfo(pod *podsandbox.Pod, config *runtimeapi.PodSandboxConfig) (map[string]string, error) {
	spec := &specs.Spec{Version: specs.Version, Hostname: pod.Config.Hostname, Linux: &specs.Linux{
		Sysctl: pod.Config.Sysctls, CgroupsPath: pod.CgroupPath,
	}}
	for _, ns := range []struct {
		kind specs.LinuxNamespaceType
		file string
		has  bool
	}{
		{specs.UserNamespace, "user", pod.Config.Userns != nil},
		{specs.MountNamespace, "mnt", true},
		{specs.NetworkNamespace, "net", pod.Config.Network != podsandbox.NamespaceNode},
		{specs.UTSNamespace, "uts", pod.Config.Network != podsandbox.NamespaceNode},
		{specs.IPCNamespace, "ipc", pod.Config.IPC != podsandbox.NamespaceNode},
	} {
		if !ns.has || pod.InitPID == 0 {
			continue
		}
		where := fmt.Sprintf("/proc/%d/ns/%s", pod.InitPID, ns.file)
		if ns.kind == specs.NetworkNamespace && pod.NetNSPath != "" {
			where = pod.NetNSPath
		}
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: ns.kind, Path: where})
	}
	return inJSON(map[string]any{"info": &info{
		SandboxID: pod.ID, PID: pod.InitPID, RuntimeHandler: pod.Config.RuntimeHandler, Reason: pod.Reason,
		CgroupPath: pod.CgroupPath, NetNS: pod.NetNSPath, Config: config, RuntimeSpec: spec, Timings: timings(pod.Timings),
	}})
}

var podStates = map[podsandbox.PodState]runtimeapi.PodSandboxState{
	podsandbox.PodReady:    runtimeapi.PodSandboxState_SANDBOX_READY,
	podsandbox.PodNotReady: runtimeapi.PodSandboxState_SANDBOX_NOTREADY,
}

func podMetadata(pod *podsandbox.Pod) *runtimeapi.PodSandboxMetadata {
	i := &pod.Config.Identity
	return &runtimeapi.PodSandboxMetadata{Name: i.Name, Uid: i.UID, Namespace: i.Namespace, Attempt: i.Attempt}
}

// ListPodSandbox answers from memory; the kubelet asks every second.
func (s *runtimeService) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	f := r.GetFilter()
	if st := f.GetState(); st != nil {
		var c checker
		if enum(&c, "filter.state.state", st.GetState(), runtimeapi.PodSandboxState_name); c.err() != nil {
			return nil, c.err()
		}
	}
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, pod := range s.cfg.Pods.Pods() {
		state := podStates[pod.State]
		if !matches(pod.ID, f.GetId(), pod.Config.Labels, f.GetLabelSelector()) || f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{
			Id:             pod.ID,
			Metadata:       podMetadata(pod),
			State:          state,
			CreatedAt:      pod.CreatedAt.UnixNano(),
			Labels:         pod.Config.Labels,
			Annotations:    pod.Config.Annotations,
			RuntimeHandler: pod.Config.RuntimeHandler,
		})
	}
	return resp, nil
}

// matches is what all filters have in common: an id, which may be the beginning of one
// (crictl), and labels, all of which must be there.
func matches(id, wantID string, labels, want map[string]string) bool {
	if !strings.HasPrefix(id, wantID) {
		return false
	}
	for k, v := range want {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}
