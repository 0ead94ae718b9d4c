package auto

import (
	"context"
	"errors"
	"testing"

	"github.com/crisp-cri/crisp/network"
)

// fake is a network that notes what it was asked.
type fake struct {
	name       string
	configured bool
	present    bool // what Refresh finds
	calls      []string
}

func (f *fake) note(s string) { f.calls = append(f.calls, s) }

func (f *fake) Name() string     { return f.name }
func (f *fake) Refresh()         { f.configured = f.present }
func (f *fake) Configured() bool { return f.configured }
func (f *fake) Plan(context.Context, network.Pod) (network.Result, error) {
	f.note("plan")
	return network.Result{}, nil
}
func (f *fake) Setup(_ context.Context, _ network.Pod, r network.Result) (network.Result, error) {
	f.note("setup")
	return r, nil
}
func (f *fake) Teardown(context.Context, network.Pod, network.Result) error {
	f.note("teardown")
	return nil
}
func (f *fake) Restore(context.Context, map[string]network.Restored) error {
	f.note("restore")
	return nil
}
func (f *fake) Status() network.Condition  { return network.Condition{Message: f.name} }
func (f *fake) UpdatePodCIDR(string) error { f.note("cidr"); return nil }
func (f *fake) Close() error               { f.note("close"); return nil }

func TestPodKeepsItsNetwork(t *testing.T) {
	cni, bridge := &fake{name: "cni"}, &fake{name: "bridge"}
	a := New(cni, bridge)
	first, err := a.Plan(t.Context(), network.Pod{})
	if err != nil || first.Provider != "bridge" {
		t.Fatalf("without a configuration: got %+v, %v", first, err)
	}
	if got := a.Status().Message; got != "bridge" {
		t.Errorf("got the status of %s", got)
	}
	cni.present = true
	second, err := a.Plan(t.Context(), network.Pod{})
	if err != nil || second.Provider != "cni" {
		t.Fatalf("with a configuration: got %+v, %v", second, err)
	}
	if got := a.Status().Message; got != "cni" {
		t.Errorf("got the status of %s", got)
	}
	if r, err := a.Setup(t.Context(), network.Pod{}, first); err != nil || r.Provider != "bridge" {
		t.Errorf("got %+v, %v", r, err)
	}
	if err := a.Teardown(t.Context(), network.Pod{}, first); err != nil {
		t.Error(err)
	}
	if err := errors.Join(a.Restore(t.Context(), nil), a.UpdatePodCIDR("10.0.0.0/24"), a.Close()); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		f    *fake
		want []string
	}{{bridge, []string{"plan", "setup", "teardown", "cidr"}}, {cni, []string{"plan"}}} {
		if len(c.f.calls) != len(c.want) {
			t.Errorf("%s: got %v, want %v", c.f.name, c.f.calls, c.want)
			continue
		}
		for i := range c.want {
			if c.f.calls[i] != c.want[i] {
				t.Errorf("%s: got %v, want %v", c.f.name, c.f.calls, c.want)
			}
		}
	}
	if err := a.Teardown(t.Context(), network.Pod{}, network.Result{Provider: "other"}); !errors.Is(err, network.ErrInvalid) {
		t.Errorf("an unknown provider: got %v", err)
	}
}
