// Package auto chooses the network of each new pod: CNI where a configuration for
// it is found at that moment, and else the embedded bridge. What exists stays with
// what it was born with.
package auto

import (
	"context"
	"fmt"

	"github.com/crisp-cri/crisp/network"
)

// Name of this network. No Result has it as its provider.
const Name = "auto"

// CNI is a network that may or may not be configured. *cni.CNI is one.
type CNI interface {
	network.Network
	// Refresh looks for a configuration.
	Refresh()
	// Configured says whether there was one, usable or not, when last looked for. It
	// does not block.
	Configured() bool
}

// Auto is made of two networks, which it borrows: their owner restores and closes them.
type Auto struct {
	cni    CNI
	bridge network.Network
}

var _ network.Network = (*Auto)(nil)

// New returns an Auto.
func New(cni CNI, bridge network.Network) *Auto { return &Auto{cni, bridge} }

// Name implements network.Network.
func (a *Auto) Name() string { return Name }

// Plan implements network.Network by the network that the pod will have.
func (a *Auto) Plan(ctx context.Context, p network.Pod) (network.Result, error) {
	a.cni.Refresh()
	n := a.chosen()
	r, err := n.Plan(ctx, p)
	r.Provider = n.Name()
	return r, err
}

// chosen is CNI also where its configuration is broken: a pod is not to come up on
// a network that nobody meant for it.
func (a *Auto) chosen() network.Network {
	if a.cni.Configured() {
		return a.cni
	}
	return a.bridge
}

// Setup implements network.Network by the network that planned it.
func (a *Auto) Setup(ctx context.Context, p network.Pod, planned network.Result) (network.Result, error) {
	n, err := a.of(planned)
	if err != nil {
		return network.Result{}, err
	}
	return n.Setup(ctx, p, planned)
}

// Teardown implements network.Network by the network that planned it.
func (a *Auto) Teardown(ctx context.Context, p network.Pod, r network.Result) error {
	n, err := a.of(r)
	if err != nil {
		return err
	}
	return n.Teardown(ctx, p, r)
}

func (a *Auto) of(r network.Result) (network.Network, error) {
	for _, n := range []network.Network{a.cni, a.bridge} {
		if n.Name() == r.Provider {
			return n, nil
		}
	}
	return nil, fmt.Errorf("%w: provider %q", network.ErrInvalid, r.Provider)
}

// Restore implements network.Network: no pod is its own.
func (a *Auto) Restore(context.Context, map[string]network.Restored) error { return nil }

// Status implements network.Network by the network that a new pod would have.
func (a *Auto) Status() network.Condition { return a.chosen().Status() }

// UpdatePodCIDR implements network.Network. CNI has no use for it.
func (a *Auto) UpdatePodCIDR(cidr string) error { return a.bridge.UpdatePodCIDR(cidr) }

// Close implements network.Network. There is nothing of its own.
func (a *Auto) Close() error { return nil }
