package cri

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/user"
)

func (s *runtimeService) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	var c checker
	if c.createContainer(r, s.cfg); c.err() != nil {
		return nil, c.err()
	}
	pod, err := s.cfg.Pods.Pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	config, err := s.containerConfig(ctx, pod, r.GetConfig())
	if err != nil {
		return nil, fmt.Errorf("cannot create container %q: %w", r.GetConfig().GetMetadata().GetName(), err)
	}
	id, err := s.cfg.Pods.CreateContainer(ctx, pod.ID, config)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// containerConfig translates a checked config for a pod.
func (s *runtimeService) containerConfig(ctx context.Context, pod *podsandbox.Pod, config *runtimeapi.ContainerConfig) (*podsandbox.ContainerConfig, error) {
	if pod.State != podsandbox.PodReady {
		return nil, fmt.Errorf("%w: pod %q is not ready (%s)", podsandbox.ErrState, pod.ID, pod.Reason)
	}
	sc := config.GetLinux().GetSecurityContext()
	if sc.GetPrivileged() && !pod.Config.Privileged {
		return nil, invalid("config.linux.security_context.privileged", "the pod was not made for privileged containers (its security_context.privileged is not set)")
	}
	var c checker
	if c.sameUserns(config, pod.Config.Userns); c.err() != nil {
		return nil, c.err()
	}
	pid, target, err := s.pidMode(pod, sc.GetNamespaceOptions())
	if err != nil {
		return nil, err
	}
	img, err := s.cfg.Images.Resolve(config.GetImage().GetImage())
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", clip(imageName(config.GetImage())), err)
	}
	profile, err := seccompProfile(sc, s.unsetSeccomp)
	if err != nil {
		return nil, err
	}
	volumes, noted, err := s.imageVolumes(config)
	if err != nil {
		return nil, err
	}
	echo, err := wire.Marshal(noted)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the config: %w", err)
	}
	alike, err := alike(noted)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the config: %w", err)
	}
	s.noteClasses(ctx, pod, config)
	confined, err := s.appArmorProfile(ctx, sc)
	if err != nil {
		return nil, err
	}
	found, err := s.lookUp(ctx, pod.ID, config, profile)
	if err != nil {
		return nil, err
	}
	spec, err := buildSpec(&specInput{
		config: config, image: img.Config.Config, pod: pod, pidMode: pid, found: found, profile: profile, appArmor: confined,
		host: &s.cfg.Host, capabilities: s.cfg.DefaultCapabilities,
	})
	if err != nil {
		return nil, err
	}
	if err := s.setLabels(spec, pod, sc); err != nil {
		return nil, err
	}
	if err := relabel(ctx, config.GetMounts(), spec.Linux.MountLabel); err != nil {
		return nil, err
	}
	out := &podsandbox.ContainerConfig{
		Name:        config.GetMetadata().GetName(),
		Attempt:     config.GetMetadata().GetAttempt(),
		Labels:      config.GetLabels(),
		Annotations: config.GetAnnotations(),
		ImageID:     img.ID,
		ImageRef:    digestedRef(&img, config.GetImage()),
		Stdin:       config.GetStdin(),
		StdinOnce:   config.GetStdinOnce(),
		StopSignal:  stopSignal(config.GetStopSignal(), img.Config.Config.StopSignal),
		PID:         pid,
		TargetID:    target,
		Spec:        spec,
		Volumes:     volumes,
		User:        userRequest(sc, img.Config.Config.User),
		Echo:        echo,
		Alike:       alike,
	}
	if p := config.GetLogPath(); p != "" && pod.Config.LogDirectory != "" {
		out.LogPath = path.Clean(p)
	}
	return out, nil
}

// pidMode is the container's PID namespace. A config without namespace_options has the pod's mode; the proto's default
// for both is POD. What a container may not have is one that the pod does not: the node's.
func (s *runtimeService) pidMode(pod *podsandbox.Pod, ns *runtimeapi.NamespaceOption) (mode podsandbox.NamespaceMode, target string, err error) {
	const field = "config.linux.security_context.namespace_options."
	if ns == nil {
		return pod.Config.PID, "", nil
	}
	for _, f := range []struct {
		name  string
		asked runtimeapi.NamespaceMode
		has   podsandbox.NamespaceMode
	}{{"network", ns.GetNetwork(), pod.Config.Network}, {"ipc", ns.GetIpc(), pod.Config.IPC}} {
		if f.asked == runtimeapi.NamespaceMode_NODE && f.has != podsandbox.NamespaceNode {
			return "", "", invalid(field+f.name, "NODE is not possible: the pod has a namespace of its own")
		}
	}
	mode = namespaceModes[ns.GetPid()]
	switch {
	case mode == podsandbox.NamespaceNode && pod.Config.PID != podsandbox.NamespaceNode:
		return "", "", invalid(field+"pid", "NODE is not possible: the pod was not made with the node's PID namespace")
	case mode == podsandbox.NamespacePod && pod.Config.PID == podsandbox.NamespaceNode:
		return podsandbox.NamespaceNode, "", nil // the pod's is the node's
	case mode == podsandbox.NamespacePod && pod.Config.PID != podsandbox.NamespacePod:
		return "", "", invalid(field+"pid", "POD is not possible: the pod was made with a PID namespace for each container (pid CONTAINER)")
	case mode != podsandbox.NamespaceTarget:
		return mode, "", nil
	}
	t, err := s.cfg.Pods.Container(ns.GetTargetId())
	switch {
	case err != nil:
		return "", "", fmt.Errorf("target container: %w", err)
	case t.PodID != pod.ID:
		return "", "", invalid(field+"target_id", "container %q is in another pod", t.ID)
	case t.State != podsandbox.ContainerRunning:
		return "", "", fmt.Errorf("%w: target container %q is not running", podsandbox.ErrState, t.ID)
	}
	return mode, t.ID, nil
}

// userRequest is resolved where the container's files can be read.
func userRequest(sc *runtimeapi.LinuxContainerSecurityContext, image string) user.Request {
	r := user.Request{
		Username: sc.GetRunAsUsername(), ImageUser: image, SupplementalGroups: sc.GetSupplementalGroups(),
		Strict: sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Strict,
	}
	if v := sc.GetRunAsUser(); v != nil {
		r.UID = ptr(v.GetValue())
	}
	if v := sc.GetRunAsGroup(); v != nil {
		r.GID = ptr(v.GetValue())
	}
	return r
}

// stopSignal is the config's, or the image's, or SIGTERM; also if the image's is no
// signal: an image must not make its containers unstoppable. Which one it is, status says.
func stopSignal(config runtimeapi.Signal, image string) string {
	if config != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		return signalName(config)
	}
	if sig, err := podsandbox.ParseSignal(image); err == nil {
		if name, ok := signalsByNumber[int(sig)]; ok {
			return signalName(name)
		}
	}
	return "SIGTERM"
}

// signalName spells CRI's SIGNAL_SIGRTMINPLUS3 as "SIGRTMIN+3".
func signalName(s runtimeapi.Signal) string {
	name := strings.TrimPrefix(s.String(), "SIGNAL_")
	name = strings.Replace(name, "RTMINPLUS", "RTMIN+", 1)
	return strings.Replace(name, "RTMAXMINUS", "RTMAX-", 1)
}

var (
	signalsByName   = map[string]runtimeapi.Signal{}
	signalsByNumber = map[int]runtimeapi.Signal{}
)

func init() {
	for v := range runtimeapi.Signal_name {
		s := runtimeapi.Signal(v)
		if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		name := signalName(s)
		signalsByName[name] = s
		// SIGCLD, SIGIOT and SIGPOLL are second names.
		if n, err := podsandbox.ParseSignal(name); err == nil && !slices.Contains([]string{"SIGCLD", "SIGIOT", "SIGPOLL"}, name) {
			signalsByNumber[int(n)] = s
		}
	}
}

// digestedRef is what the kubelet shows as imageID: name@digest, of the repository
// that the user named if the image is known by several; the image id if by none.
func digestedRef(img *image.Image, spec *runtimeapi.ImageSpec) string {
	if named, err := reference.ParseNormalizedNamed(imageName(spec)); err == nil {
		prefix := reference.TrimNamed(named).Name() + "@"
		if i := slices.IndexFunc(img.RepoDigests, func(d string) bool { return strings.HasPrefix(d, prefix) }); i >= 0 {
			return img.RepoDigests[i]
		}
	}
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0]
	}
	return img.ID
}

func (s *runtimeService) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.cfg.Pods.StartContainer(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

func (s *runtimeService) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	var c checker
	c.id("container_id", r.GetContainerId())
	if r.GetTimeout() < 0 {
		c.bad("timeout", "%d is negative", r.GetTimeout())
	}
	if c.err() != nil {
		return nil, c.err()
	}
	if err := s.cfg.Pods.StopContainer(ctx, r.GetContainerId(), seconds(r.GetTimeout())); err != nil {
		return nil, err
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

func (s *runtimeService) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.cfg.Pods.RemoveContainer(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

var containerStates = map[podsandbox.ContainerState]runtimeapi.ContainerState{
	podsandbox.ContainerCreated: runtimeapi.ContainerState_CONTAINER_CREATED,
	podsandbox.ContainerRunning: runtimeapi.ContainerState_CONTAINER_RUNNING,
	podsandbox.ContainerExited:  runtimeapi.ContainerState_CONTAINER_EXITED,
	podsandbox.ContainerUnknown: runtimeapi.ContainerState_CONTAINER_UNKNOWN,
}

// ListContainers answers from memory; the kubelet asks every second.
func (s *runtimeService) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	f := r.GetFilter()
	if st := f.GetState(); st != nil {
		var c checker
		if enum(&c, "filter.state.state", st.GetState(), runtimeapi.ContainerState_name); c.err() != nil {
			return nil, c.err()
		}
	}
	resp := &runtimeapi.ListContainersResponse{}
	for _, ctr := range s.cfg.Pods.Containers() {
		state := containerStates[ctr.State]
		if !matches(ctr.ID, f.GetId(), ctr.Config.Labels, f.GetLabelSelector()) || !strings.HasPrefix(ctr.PodID, f.GetPodSandboxId()) ||
			f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		spec, err := echoedImage(ctr.Config.Echo)
		if err != nil {
			return nil, fmt.Errorf("cannot read the config of container %q: %w", ctr.ID, err)
		}
		resp.Containers = append(resp.Containers, &runtimeapi.Container{
			Id:           ctr.ID,
			PodSandboxId: ctr.PodID,
			Metadata:     containerMetadata(ctr),
			Image:        spec,
			ImageRef:     ctr.Config.ImageRef,
			ImageId:      ctr.Config.ImageID,
			State:        state,
			CreatedAt:    ctr.CreatedAt.UnixNano(),
			Labels:       ctr.Config.Labels,
			Annotations:  ctr.Config.Annotations,
		})
	}
	return resp, nil
}

func containerMetadata(c *podsandbox.Container) *runtimeapi.ContainerMetadata {
	return &runtimeapi.ContainerMetadata{Name: c.Config.Name, Attempt: c.Config.Attempt}
}

// echoedImage reads field 2 (image) of an encoded ContainerConfig and nothing else: the whole
// of it, with its environment, costs tens of microseconds, and a list has a thousand.
func echoedImage(echo []byte) (*runtimeapi.ImageSpec, error) {
	const imageField = 2
	spec := &runtimeapi.ImageSpec{}
	for len(echo) > 0 {
		num, kind, n := protowire.ConsumeTag(echo)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		echo = echo[n:]
		if num != imageField || kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, kind, echo); n < 0 {
				return nil, protowire.ParseError(n)
			}
			echo = echo[n:]
			continue
		}
		b, n := protowire.ConsumeBytes(echo)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		return spec, proto.Unmarshal(b, spec)
	}
	return spec, nil
}

func (s *runtimeService) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	ctr, err := s.cfg.Pods.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	limits, err := s.limitsOf(ctr)
	if err != nil {
		return nil, err
	}
	status, config, err := s.containerStatus(ctr, limits)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: status}
	if r.GetVerbose() {
		resp.Info, err = inJSON(map[string]any{"info": &info{
			SandboxID: ctr.PodID, PID: ctr.PID, CgroupPath: ctr.CgroupPath, UpperDir: ctr.UpperDir, LogLost: ctr.LogLost,
			Config: config, RuntimeSpec: ctr.Spec, Timings: timings(ctr.Timings),
		}})
		if err != nil {
			return nil, fmt.Errorf("cannot describe container %q: %w", ctr.ID, err)
		}
	}
	return resp, nil
}

// containerStatus is all of a container's status but what needs a look at the kernel; with the config it was made from.
func (s *runtimeService) containerStatus(ctr *podsandbox.Container, limits *runtimeapi.LinuxContainerResources) (*runtimeapi.ContainerStatus, *runtimeapi.ContainerConfig, error) {
	config := &runtimeapi.ContainerConfig{}
	if err := proto.Unmarshal(ctr.Config.Echo, config); err != nil {
		return nil, nil, fmt.Errorf("cannot read the config of container %q: %w", ctr.ID, err)
	}
	out := &runtimeapi.ContainerStatus{
		Id:          ctr.ID,
		Metadata:    containerMetadata(ctr),
		State:       containerStates[ctr.State],
		CreatedAt:   ctr.CreatedAt.UnixNano(),
		ExitCode:    int32(ctr.ExitCode),
		Image:       s.shownImage(ctr, config.GetImage()),
		ImageRef:    ctr.Config.ImageRef,
		ImageId:     ctr.Config.ImageID,
		Reason:      ctr.Reason,
		Message:     ctr.Message,
		Labels:      ctr.Config.Labels,
		Annotations: ctr.Config.Annotations,
		// The kubelet finds the termination message and image volumes in use by these.
		Mounts:     config.GetMounts(),
		LogPath:    ctr.LogPath,
		Resources:  &runtimeapi.ContainerResources{Linux: limits},
		User:       &runtimeapi.ContainerUser{Linux: linuxUser(ctr.User)},
		StopSignal: signalsByName[ctr.Config.StopSignal],
	}
	if !ctr.StartedAt.IsZero() {
		out.StartedAt = ctr.StartedAt.UnixNano()
	}
	if !ctr.FinishedAt.IsZero() {
		out.FinishedAt = ctr.FinishedAt.UnixNano()
	}
	return out, config, nil
}

// limitsOf is what is applied to a container: what the kernel says while there is a cgroup, else what was asked for last.
func (s *runtimeService) limitsOf(ctr *podsandbox.Container) (*runtimeapi.LinuxContainerResources, error) {
	out := askedOf(ctr)
	if ctr.State != podsandbox.ContainerCreated && ctr.State != podsandbox.ContainerRunning {
		return out, nil
	}
	a, err := s.cfg.Pods.Resources(ctr.ID)
	switch {
	case errors.Is(err, cgroup.ErrNotFound), errors.Is(err, podsandbox.ErrNotFound), errors.Is(err, podsandbox.ErrState):
		return out, nil // it has just exited
	case err != nil:
		return nil, fmt.Errorf("cannot read the limits of container %q: %w", ctr.ID, err)
	}
	return applied(out, a), nil
}

// askedOf is what was asked for last.
func askedOf(ctr *podsandbox.Container) *runtimeapi.LinuxContainerResources {
	if spec := ctr.Spec; spec != nil && spec.Linux != nil && spec.Process != nil {
		return asked(spec.Linux.Resources, spec.Process.OOMScoreAdj)
	}
	return &runtimeapi.LinuxContainerResources{}
}

// shownImage is what users see as the image of a container: a name with tag, if the image still has one.
func (s *runtimeService) shownImage(ctr *podsandbox.Container, spec *runtimeapi.ImageSpec) *runtimeapi.ImageSpec {
	if spec == nil {
		spec = &runtimeapi.ImageSpec{}
	}
	img, err := s.cfg.Images.Resolve(ctr.Config.ImageID)
	switch {
	case err == nil && len(img.RepoTags) > 0:
		spec.Image = preferred(img.RepoTags, imageName(spec))
	case err == nil && len(img.RepoDigests) > 0:
		spec.Image = ctr.Config.ImageRef
	}
	return spec
}

// preferred is the tag that the user named, or the first.
func preferred(tags []string, name string) string {
	if named, err := reference.ParseNormalizedNamed(name); err == nil {
		if want := reference.TagNameOnly(named).String(); slices.Contains(tags, want) {
			return want
		}
	}
	return tags[0]
}

func linuxUser(u user.Identity) *runtimeapi.LinuxContainerUser {
	out := &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.Groups {
		out.SupplementalGroups = append(out.SupplementalGroups, int64(g))
	}
	return out
}

func (s *runtimeService) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	var c checker
	c.id("container_id", r.GetContainerId())
	c.resources("linux", r.GetLinux())
	if r.GetWindows() != nil {
		c.bad("windows", "this is a Linux node")
	}
	if c.err() != nil {
		return nil, c.err()
	}
	var oomScoreAdj *int
	if v := r.GetLinux().GetOomScoreAdj(); v != 0 { // zero is "leave it"
		oomScoreAdj = ptr(int(v))
	}
	if err := s.cfg.Pods.UpdateContainer(ctx, r.GetContainerId(), limits(r.GetLinux()), oomScoreAdj); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

func (s *runtimeService) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.cfg.Pods.ReopenLog(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}

// terminationLog is the random name that the kubelet gives the file of the termination message at each try
// to create one and the same container (makeUID in pkg/kubelet/kuberuntime/kuberuntime_container.go).
var terminationLog = regexp.MustCompile(`^[0-9a-f]{8}$`)

// alike is the same of two configs that ask for the same, though that name differs: without it, a
// kubelet that tries again while its first try is under way would not join that, but be told that the name is taken.
func alike(config *runtimeapi.ContainerConfig) ([]byte, error) {
	config = proto.Clone(config).(*runtimeapi.ContainerConfig)
	for _, m := range config.GetMounts() {
		if dir, file := path.Split(m.GetHostPath()); terminationLog.MatchString(file) {
			m.HostPath = dir
		}
	}
	b, err := wire.Marshal(config)
	sum := sha256.Sum256(b)
	return sum[:], err
}
