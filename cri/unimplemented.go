package cri

// notImplemented are the calls of CRI 0.37 that this version does not have, each
// with a sentence for whoever called it. They answer Unimplemented, upon
// which the kubelet does without or tells its user.
// A test calls every method of both services and compares.
var notImplemented = map[string]string{
	"CheckpointContainer": "crisp does not checkpoint containers; others that did had four advisories about it (CVE-2024-8676, CVE-2026-50195, -53489, -53492)",
	"CheckpointPod":       "crisp does not checkpoint pods",
	"RestorePod":          "crisp does not restore pods",
}
