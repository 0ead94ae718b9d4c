package cri

// notImplemented are the calls of CRI 0.37 that this version does not have, each
// with a sentence for whoever called it. They answer Unimplemented, upon
// which the kubelet does without (Stream*: it lists instead) or tells its user.
// A test calls every method of both services and compares.
var notImplemented = map[string]string{
	"CheckpointContainer": "crisp does not checkpoint containers; others that did had four advisories about it (CVE-2024-8676, CVE-2026-50195, -53489, -53492)",
	"CheckpointPod":       "crisp does not checkpoint pods",
	"RestorePod":          "crisp does not restore pods",

	"PodSandboxStats":       "statistics of whole pods are not there yet; those of containers are (ContainerStats)",
	"ListPodSandboxStats":   "statistics of whole pods are not there yet; those of containers are (ListContainerStats)",
	"ListMetricDescriptors": "metrics through CRI (PodAndContainerStatsFromCRI) are not there yet",
	"ListPodSandboxMetrics": "metrics through CRI (PodAndContainerStatsFromCRI) are not there yet",
	"GetContainerEvents":    "container events (EventedPLEG) are not there yet; the kubelet relists instead",

	"UpdatePodSandboxResources": "there is nothing to update: a pod's own cgroup is the kubelet's, and it has resized that already",

	"StreamPodSandboxes":      "streamed lists (CRIListStreaming) are not there yet; ListPodSandbox is",
	"StreamContainers":        "streamed lists (CRIListStreaming) are not there yet; ListContainers is",
	"StreamContainerStats":    "streamed lists (CRIListStreaming) are not there yet; ListContainerStats is",
	"StreamPodSandboxStats":   "streamed lists (CRIListStreaming) are not there yet",
	"StreamPodSandboxMetrics": "streamed lists (CRIListStreaming) are not there yet",
	"StreamImages":            "streamed lists (CRIListStreaming) are not there yet; ListImages is",
}
