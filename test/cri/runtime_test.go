package cri

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestVersionIsWhatTheKubeletAccepts(t *testing.T) {
	w := need(t)
	v, err := w.rt.Version(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	// The kubelet exits on any other (cri-reference C.1).
	if v.Version != "0.1.0" || v.RuntimeApiVersion != "v1" {
		t.Errorf("got version %q, API %q; want 0.1.0, v1", v.Version, v.RuntimeApiVersion)
	}
	if v.RuntimeName == "" || v.RuntimeVersion == "" {
		t.Errorf("got name %q, version %q; want both", v.RuntimeName, v.RuntimeVersion)
	}
}

func TestStatusIsReady(t *testing.T) {
	w := need(t)
	s, err := w.rt.Status(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, c := range s.Status.Conditions {
		got[c.Type] = c.Status
	}
	for _, want := range []string{"RuntimeReady", "NetworkReady"} {
		if !got[want] {
			t.Errorf("condition %s: got %v, want true", want, s.Status.Conditions)
		}
	}
	if len(s.Info) != 0 {
		t.Errorf("got info %v without verbose", s.Info)
	}
	var byDefault bool
	for _, h := range s.RuntimeHandlers {
		byDefault = byDefault || h.Name == ""
	}
	if !byDefault {
		t.Errorf(`got handlers %v, want one named ""`, s.RuntimeHandlers)
	}
	if s.Features == nil || !s.Features.SupplementalGroupsPolicy {
		t.Errorf("got features %v, want supplemental_groups_policy", s.Features)
	}
	verbose, err := w.rt.Status(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if len(verbose.Info) == 0 {
		t.Error("verbose status has no info")
	}
}

func TestRuntimeConfigNamesTheCgroupDriver(t *testing.T) {
	w := need(t)
	r, err := w.rt.RuntimeConfig(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := r.GetLinux().GetCgroupDriver(); got != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("got %v, want CGROUPFS", got)
	}
}

func TestUpdateRuntimeConfigMovesNewPodsToThePodCIDR(t *testing.T) {
	w := own(t)
	old := w.pod(t)
	oldIP := old.ip()
	// Ranges beside the node's own, in its /24-per-tag scheme: 10.(64…127).x.0/24 is nobody's.
	octets := strings.Split(oldIP, ".")
	prefix := "10." + map[bool]string{true: "64", false: "65"}[octets[1] < "160"] + "." + octets[2] + "."
	err := w.rt.UpdateRuntimeConfig(t.Context(), &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: prefix + "0/24"}})
	if err != nil {
		t.Fatal(err)
	}
	p := w.pod(t)
	if ip := p.ip(); !strings.HasPrefix(ip, prefix) {
		t.Errorf("got address %s, want one of %s0/24", ip, prefix)
	}
	if got := old.ip(); got != oldIP {
		t.Errorf("the older pod's address changed from %s to %s", oldIP, got)
	}
	// Both ranges work.
	c := p.run([]string{"http", ":8080"})
	c.says("listening")
	if got := old.run([]string{"sleep"}).exec("get", "http://"+p.ip()+":8080/hostname"); got != "p\n" {
		t.Errorf("between the ranges: got %q, want %q", got, "p\n")
	}
	// The kubelet sends "" until it knows; that changes nothing.
	if err := w.rt.UpdateRuntimeConfig(t.Context(), &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{}}); err != nil {
		t.Errorf("empty pod CIDR: %v", err)
	}
	err = w.rt.UpdateRuntimeConfig(t.Context(), &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.1.2.3.4/24"}})
	wantCode(t, err, codes.InvalidArgument, "10.1.2.3.4/24")
}

func TestWhatIsNotImplementedSaysSo(t *testing.T) {
	w := need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for name, call := range map[string]func() error{
		"CheckpointContainer": func() error {
			_, err := w.CRI.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: "x"})
			return err
		},
		"CheckpointPod": func() error {
			_, err := w.CRI.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{})
			return err
		},
		"RestorePod": func() error { _, err := w.CRI.RestorePod(ctx, &runtimeapi.RestorePodRequest{}); return err },
	} {
		t.Run(name, func(t *testing.T) {
			err := call()
			wantCode(t, err, codes.Unimplemented)
			// gRPC's own text for a missing method is no sentence that helps anybody.
			if err != nil && (strings.Contains(err.Error(), "method "+name) || len(err.Error()) < 70) {
				t.Errorf("got %q, want a sentence", err)
			}
		})
	}
}

func TestSecondInstanceRefusesAndNamesTheFirst(t *testing.T) {
	w := need(t)
	out, err := exec.Command(w.crispd, append(w.Args(), "--socket", w.RunDir+"/second.sock")...).CombinedOutput()
	if err == nil {
		t.Fatal("a second crispd ran on the same root")
	}
	if !strings.Contains(string(out), "pid "+itoa(w.PID)) {
		t.Errorf("got %q, want it to name pid %d", out, w.PID)
	}
	if _, err := w.rt.Version(t.Context(), ""); err != nil {
		t.Errorf("the first crispd suffered: %v", err)
	}
}
