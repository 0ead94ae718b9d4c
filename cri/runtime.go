package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/runtime/apparmor"
)

const (
	// kubeAPIVersion is the only one that the kubelet accepts (cri-client, minimumSupportedVersion).
	kubeAPIVersion = "0.1.0"
	criVersion     = "v1"
	runtimeName    = "crisp"
)

func (s *runtimeService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           kubeAPIVersion,
		RuntimeName:       runtimeName,
		RuntimeVersion:    s.cfg.Version,
		RuntimeApiVersion: criVersion,
	}, nil
}

// Status answers from memory. The kubelet asks every five seconds.
func (s *runtimeService) Status(_ context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	net := s.cfg.Network.Status()
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			// The gate answers for us while it is not.
			{Type: runtimeapi.RuntimeReady, Status: true},
			{Type: runtimeapi.NetworkReady, Status: net.Ready, Reason: net.Reason, Message: net.Message},
		}},
		// What is claimed here is what works; the kubelet acts on it.
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	for _, name := range append([]string{""}, s.cfg.Handlers...) {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &runtimeapi.RuntimeHandler{
			Name: name,
			Features: &runtimeapi.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: s.cfg.Host.RecursiveReadOnly,
				UserNamespaces:          s.cfg.Host.NoUserNamespaces == "",
			},
		})
	}
	if r.GetVerbose() {
		var err error
		if resp.Info, err = s.statusInfo(); err != nil {
			return nil, fmt.Errorf("cannot describe runtime: %w", err)
		}
	}
	return resp, nil
}

// operation is one that runs now, for those who ask why a pod is stuck.
type operation struct {
	What   string `json:"what"`
	Object string `json:"object"`
	For    string `json:"for"`
	Step   string `json:"step,omitempty"`
	InStep string `json:"inStepFor,omitempty"`
}

func (s *runtimeService) statusInfo() (map[string]string, error) {
	now := time.Now()
	operations := []operation{}
	for _, o := range s.cfg.Pods.Operations() {
		op := operation{What: o.What, Object: o.Object, For: age(now, o.Began)}
		if o.Step != "" {
			op.Step, op.InStep = o.Step, age(now, o.StepBegan)
		}
		operations = append(operations, op)
	}
	devices := map[string][]string{}
	if s.cfg.CDI != nil {
		devices["devices"], devices["ignored"] = s.cfg.CDI.Names(), s.cfg.CDI.Problems()
	}
	modules := map[string]any{"enabled": s.cfg.AppArmor != nil}
	if s.cfg.AppArmor != nil {
		modules["defaultProfile"] = apparmor.Default
		if err := s.cfg.AppArmor.Problem(); err != nil {
			modules["problem"] = err.Error()
		}
	}
	return inJSON(map[string]any{
		"apparmor":   modules,
		"cdi":        devices,
		"config":     s.cfg.Settings,
		"operations": operations,
		"host":       s.cfg.Host,
		"network":    s.cfg.Network.Name(),
	})
}

func age(now, then time.Time) string { return now.Sub(then).Round(time.Millisecond).String() }

// inJSON makes an info map: CRI wants the values in JSON.
func inJSON(m map[string]any) (map[string]string, error) {
	out := make(map[string]string, len(m))
	for k, v := range m {
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		out[k] = string(b)
	}
	return out, nil
}

func (s *runtimeService) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: s.driver}}, nil
}

// UpdateRuntimeConfig: the kubelet has learnt the node's pod CIDR.
func (s *runtimeService) UpdateRuntimeConfig(_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if cidr != "" {
		if err := s.cfg.Network.UpdatePodCIDR(cidr); err != nil {
			return nil, fmt.Errorf("cannot use pod CIDR %q: %w", clip(cidr), err)
		}
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}
