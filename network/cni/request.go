package cni

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/crisp-cri/crisp/network"
)

// ifName is the pod's link, as everybody expects it (CRI has no word for it).
const ifName = "eth0"

// Capabilities that plugins can ask for (CNI CONVENTIONS.md "Dynamic Plugin specific
// Fields"; the last is containerd's).
const (
	capPortMappings = "portMappings"
	capBandwidth    = "bandwidth"
	capDNS          = "dns"
	capCgroupPath   = "cgroupPath"
	capAnnotations  = "io.kubernetes.cri.pod-annotations"
)

type portMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// bandwidth is in bits per second, bursts in bits.
type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

type dns struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// request is what the plugins are told of a pod. It follows from the pod's record, so
// that DEL says what ADD said.
func request(p network.Pod, netns string) (*libcni.RuntimeConf, error) {
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace},
		{"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
		{"K8S_POD_UID", p.UID},
	}
	for _, a := range args {
		// CNI_ARGS is KEY=VALUE;KEY=VALUE, without quoting.
		if strings.ContainsAny(a[1], ";=\x00") {
			return nil, fmt.Errorf("%w: %s %q cannot be part of CNI_ARGS, for its ; or =", network.ErrInvalid, a[0], shorten(a[1]))
		}
	}
	capabilities, err := capabilitiesOf(p)
	if err != nil {
		return nil, err
	}
	return &libcni.RuntimeConf{ContainerID: p.ID, NetNS: netns, IfName: ifName, Args: args, CapabilityArgs: capabilities}, nil
}

// capabilitiesOf is what goes to the plugins that declare the capability. What the pod
// does not ask for is left out.
func capabilitiesOf(p network.Pod) (map[string]any, error) {
	c := map[string]any{}
	var ports []portMapping
	for _, m := range p.Ports {
		if m.HostPort == 0 {
			continue
		}
		one := portMapping{HostPort: m.HostPort, ContainerPort: m.ContainerPort, Protocol: string(m.Protocol)}
		if m.HostIP.IsValid() {
			one.HostIP = m.HostIP.String()
		}
		ports = append(ports, one)
	}
	if len(ports) > 0 {
		c[capPortMappings] = ports
	}
	limit, err := network.BandwidthOf(p.Annotations)
	if err != nil {
		return nil, err
	}
	if limit != (network.Bandwidth{}) {
		b := bandwidth{IngressRate: limit.Ingress, EgressRate: limit.Egress}
		// The plugin wants a burst with each rate. This is containerd's: no limit.
		if b.IngressRate > 0 {
			b.IngressBurst = math.MaxUint32
		}
		if b.EgressRate > 0 {
			b.EgressBurst = math.MaxUint32
		}
		c[capBandwidth] = b
	}
	if d := p.DNS; len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		c[capDNS] = dns(d)
	}
	if p.CgroupPath != "" {
		c[capCgroupPath] = p.CgroupPath
	}
	if len(p.Annotations) > 0 {
		c[capAnnotations] = p.Annotations
	}
	return c, nil
}

// addresses are those of ifName in a result of ADD, in its order. An address that names
// no interface is the pod's (before CNI 0.3 there was no other).
func addresses(result types.Result) (ips []netip.Addr, err error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, err
	}
	for i, c := range r.IPs {
		if c == nil {
			return nil, fmt.Errorf("address %d is none", i)
		}
		if c.Interface != nil {
			n := *c.Interface
			if n < 0 || n >= len(r.Interfaces) {
				return nil, fmt.Errorf("address %d is of interface %d, and there are %d", i, n, len(r.Interfaces))
			}
			if link := r.Interfaces[n]; link == nil || link.Sandbox == "" || link.Name != ifName {
				continue
			}
		}
		ip, ok := netip.AddrFromSlice(c.Address.IP)
		if !ok {
			return nil, fmt.Errorf("address %d is none", i)
		}
		ips = append(ips, ip.Unmap())
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("the result has no address for %s in the pod", ifName)
	}
	return ips, nil
}

// withPrevious gives each plugin of list the result of ADD, as libcni would from a cache
// of its own: the pod's record is the only place where it is kept. There is no
// prevResult for DEL before CNI 0.4.0.
func withPrevious(list *libcni.NetworkConfigList, added json.RawMessage) error {
	later, err := version.GreaterThanOrEqualTo(list.CNIVersion, "0.4.0")
	if err != nil || !later || added == nil {
		return err
	}
	var previous map[string]any
	if err := json.Unmarshal(added, &previous); err != nil {
		return fmt.Errorf("recorded result: %w", err)
	}
	for i, p := range list.Plugins {
		if list.Plugins[i], err = libcni.InjectConf(p, map[string]any{"prevResult": previous}); err != nil {
			return err
		}
	}
	return nil
}
