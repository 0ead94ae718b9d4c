// Package network gives a pod its network and takes it away again.
//
// [Network] has two implementations: package bridge (embedded: netlink and
// nftables in-process) and package cni (plugins of others); package auto chooses
// between them for each new pod. A pod keeps the network it was born
// with: [Result.Provider] names it and is stored in the pod's record.
//
// The package does not own addresses: the pod's record does. An
// implementation derives its address pool from the records that it is given
// at start ([Network.Restore]), so pool and records cannot disagree.
package network

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
)

// Sentinels. Implementations wrap them with the object, the step and numbers.
var (
	// ErrExhausted is returned when no address is left in the pod range.
	ErrExhausted = errors.New("no address left")
	// ErrPortInUse is returned when a host port is held by another pod.
	ErrPortInUse = errors.New("host port in use")
	// ErrInvalid is returned for a request that can never work (bad range, bad port).
	ErrInvalid = errors.New("invalid network request")
	// ErrNotReady is returned while the network has no configuration yet.
	ErrNotReady = errors.New("network not ready")
)

// Protocol of a port mapping, in nftables' words.
type Protocol string

const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// PortMapping publishes ContainerPort of the pod on the host.
type PortMapping struct {
	Protocol      Protocol   `json:"protocol"`
	ContainerPort uint16     `json:"containerPort"`
	HostPort      uint16     `json:"hostPort"`        // 0: not published (CRI 0.33), the mapping is ignored
	HostIP        netip.Addr `json:"hostIP,omitzero"` // zero or unspecified: every local address of that family
}

// Pod is what a network needs to know of a pod.
type Pod struct {
	ID          string // 64 hex digits; names of links and rule comments are derived from it
	Namespace   string // Kubernetes namespace
	Name        string // Kubernetes name
	UID         string
	Ports       []PortMapping
	Annotations map[string]string // bandwidth annotations; read-only
	Labels      map[string]string
	DNS         DNS    // as the pod asked for it; for those networks that serve names
	CgroupPath  string // the pod's cgroup, as the cgroup driver writes it
	// NetNS is the pod's network namespace, nil in a teardown after the
	// namespace is gone. The caller owns it.
	NetNS *os.File
	// NetNSPath is where the namespace is visible on the host (/run/netns/…), "" if nowhere.
	NetNSPath string
}

// Result is what a set-up made; it is stored in the pod's record as it is and
// handed back for teardown and recovery.
type Result struct {
	Provider string       `json:"provider"` // "bridge", "cni"
	IPs      []netip.Addr `json:"ips"`      // primary first
	// Subnets are the pod ranges that IPs are from, in the same order: the node's
	// range may have changed since. Empty when the provider does not say.
	Subnets  []netip.Prefix `json:"subnets,omitempty"`
	HostLink string         `json:"hostLink,omitempty"`
	Ports    []PortMapping  `json:"ports,omitempty"`
	// CNI is of pods on a CNI network only.
	CNI *CNIAttachment `json:"cni,omitempty"`
}

// DNS is what a pod's resolver is told.
type DNS struct {
	Servers, Searches, Options []string
}

// CNIAttachment is all that is needed to take a pod off a CNI network, also when
// the network's configuration is changed or gone by then.
type CNIAttachment struct {
	Network   string          `json:"network"`         // the name of the configuration list
	File      string          `json:"file"`            // where the list was read, for people
	Interface string          `json:"interface"`       // in the pod
	Config    json.RawMessage `json:"config"`          // the whole list as it was for ADD, all plugins inlined
	Added     json.RawMessage `json:"added,omitempty"` // what ADD returned, in the list's version; nil: it is not known to have ended
}

// Condition is the network's state for the CRI NetworkReady condition.
type Condition struct {
	Ready   bool
	Reason  string // CamelCase, "" when ready
	Message string
}

// Network sets up and tears down the network of one pod at a time. All methods
// are safe for concurrent use.
type Network interface {
	// Name is the provider's name: "bridge" or "cni"; "auto" for what is made of both.
	Name() string
	// Plan reserves what the pod will get (addresses, names) without any effect
	// on the kernel; the caller records the Result before it calls Setup
	// ("record before effect"). A Result without a Provider is of Name.
	Plan(ctx context.Context, pod Pod) (Result, error)
	// Setup makes what Plan promised, in pod.NetNS. On error the caller calls
	// Teardown, as for a pod that is up: something may be left.
	Setup(ctx context.Context, pod Pod, planned Result) (Result, error)
	// Teardown undoes Setup and frees the reservation. It is idempotent and
	// works with the namespace gone, from the Result alone.
	Teardown(ctx context.Context, pod Pod, r Result) error
	// Restore tells the network, at daemon start, of every pod that still holds
	// a Result: reservations are taken again, rules are checked and rebuilt,
	// and links and rules with our prefix that belong to no pod are removed. On an
	// error the reservations are taken all the same; Status is not ready until the
	// rest is repaired, which the network goes on trying.
	Restore(ctx context.Context, pods map[string]Restored) error
	// Status never blocks on the kernel, a disk or a plugin.
	Status() Condition
	// UpdatePodCIDR takes the node's pod range(s) from the kubelet
	// (UpdateRuntimeConfig): "10.1.2.0/24" or "10.1.2.0/24,fd00:1::/64".
	// Existing pods keep their addresses. "" is ignored.
	UpdatePodCIDR(cidr string) error
	// Close stops background work (rule watching). Pods keep their network.
	Close() error
}

// Restored is one pod as Restore needs it.
type Restored struct {
	Pod    Pod
	Result Result
}
