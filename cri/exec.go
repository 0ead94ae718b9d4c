package cri

import (
	"context"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// execEnvelope is room in a reply for what is not output.
const execEnvelope = 4096

// ExecSync runs a command to its end. An exit code is no error; running out of
// time is DeadlineExceeded, which the kubelet takes for a failed probe.
func (s *runtimeService) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	var c checker
	c.id("container_id", r.GetContainerId())
	c.argv("cmd", r.GetCmd())
	if r.GetTimeout() < 0 {
		c.bad("timeout", "%d is negative", r.GetTimeout())
	}
	if c.err() != nil {
		return nil, c.err()
	}
	result, err := s.cfg.Pods.ExecSync(ctx, r.GetContainerId(), r.GetCmd(), seconds(r.GetTimeout()))
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ExecSyncResponse{ExitCode: int32(result.ExitCode)}
	resp.Stdout, resp.Stderr = fit(result.Stdout, result.Stderr, maxMessage-execEnvelope)
	return resp, nil
}

// argv checks a command to execute.
func (c *checker) argv(field string, argv []string) {
	switch {
	case len(argv) == 0 || argv[0] == "":
		c.bad(field, "must not be empty")
	case slices.ContainsFunc(argv, func(s string) bool { return strings.ContainsRune(s, 0) }):
		c.bad(field, "must not contain NUL")
	}
}

// fit cuts output to what one reply can carry: each stream is capped at 16 MiB
// where it is read (CVE-2022-1708), and so is the whole reply. The shorter
// stream is kept whole if it can be.
func fit(stdout, stderr []byte, most int) (out, errs []byte) {
	half := most / 2
	switch {
	case len(stdout)+len(stderr) <= most:
	case len(stderr) <= half:
		stdout = stdout[:most-len(stderr)]
	case len(stdout) <= half:
		stderr = stderr[:most-len(stdout)]
	default:
		stdout, stderr = stdout[:half], stderr[:half]
	}
	return stdout, stderr
}
