package cri

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/caps"
	"github.com/crisp-cri/crisp/runtime/cdi"
	"github.com/crisp-cri/crisp/runtime/cgroup"
	"github.com/crisp-cri/crisp/runtime/seccomp"
	"github.com/crisp-cri/crisp/runtime/spawn"
	"github.com/crisp-cri/crisp/runtime/user"
)

// A meaning is what a cause says to the caller of an RPC.
type meaning struct {
	cause error
	code  codes.Code
	// prefix begins the message, where the kubelet looks for one.
	prefix string
}

// meanings is walked from the top; the first cause that the error wraps
// counts. What is not here is Internal: our bug or the host's.
//
// What the kubelet does with codes: NotFound of a Status call means gone;
// DeadlineExceeded of ExecSync is a failed probe; Unimplemented makes it fall
// back; of Unknown, and only of Unknown, it reads the message's prefix as the
// reason of a failed pull (kubelet images.evalCRIPullErr).
var meanings = []meaning{
	{cause: podsandbox.ErrInvalid, code: codes.InvalidArgument},
	// Before the caller's own: of a registry that does not answer, net and http say that it is context.DeadlineExceeded.
	{cause: image.ErrRegistryUnavailable, code: codes.Unknown, prefix: crierrors.ErrRegistryUnavailable.Error()},

	{cause: context.DeadlineExceeded, code: codes.DeadlineExceeded},
	{cause: context.Canceled, code: codes.Canceled},
	{cause: errPanic, code: codes.Internal},
	{cause: errTokens, code: codes.ResourceExhausted},

	{cause: podsandbox.ErrAmbiguous, code: codes.InvalidArgument},
	{cause: podsandbox.ErrNotFound, code: codes.NotFound},
	{cause: podsandbox.ErrExists, code: codes.AlreadyExists},
	{cause: podsandbox.ErrState, code: codes.FailedPrecondition},
	{cause: podsandbox.ErrUnavailable, code: codes.Unavailable},
	{cause: podsandbox.ErrUnsupported, code: codes.Unimplemented},
	{cause: podsandbox.ErrSlow, code: codes.ResourceExhausted},

	{cause: image.ErrInvalidReference, code: codes.InvalidArgument},
	{cause: image.ErrNotFound, code: codes.NotFound},
	{cause: image.ErrUnauthorized, code: codes.Unauthenticated},
	{cause: image.ErrCorrupt, code: codes.DataLoss},
	{cause: image.ErrLimit, code: codes.ResourceExhausted},
	{cause: image.ErrUnsupported, code: codes.Unimplemented},

	{cause: network.ErrNotReady, code: codes.Unavailable},
	{cause: network.ErrExhausted, code: codes.ResourceExhausted},
	{cause: network.ErrPortInUse, code: codes.FailedPrecondition},
	{cause: network.ErrInvalid, code: codes.InvalidArgument},

	{cause: spawn.ErrInvalid, code: codes.InvalidArgument},
	{cause: spawn.ErrNotFound, code: codes.NotFound},
	{cause: spawn.ErrState, code: codes.FailedPrecondition},
	{cause: spawn.ErrGone, code: codes.FailedPrecondition},
	{cause: spawn.ErrUnsupported, code: codes.Unimplemented},

	{cause: cgroup.ErrInvalid, code: codes.InvalidArgument},
	{cause: cgroup.ErrUnsupported, code: codes.Unimplemented},
	{cause: cgroup.ErrBusy, code: codes.FailedPrecondition},
	{cause: cgroup.ErrNotFound, code: codes.NotFound},

	{cause: cdi.ErrUnresolvable, code: codes.InvalidArgument},
	{cause: cdi.ErrUnsupported, code: codes.Unimplemented},

	{cause: caps.ErrUnknown, code: codes.InvalidArgument},
	{cause: seccomp.ErrInvalid, code: codes.InvalidArgument},
	{cause: seccomp.ErrUnsupported, code: codes.Unimplemented},
	{cause: user.ErrInvalid, code: codes.InvalidArgument},
	{cause: user.ErrNotFound, code: codes.InvalidArgument}, // of a name in the image; NotFound would say the pod
	{cause: user.ErrFile, code: codes.InvalidArgument},
}

// meaningOf finds the first row that err wraps; Internal if there is none.
func meaningOf(err error) meaning {
	for _, m := range meanings {
		if errors.Is(err, m.cause) {
			return m
		}
	}
	return meaning{code: codes.Internal}
}

// toStatus turns an error into what goes over the wire. The message is all that
// a Kubernetes user gets to see, in the pod's events.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if s, ok := status.FromError(err); ok { // gRPC's own, of its transport
		return s.Err()
	}
	m := meaningOf(err)
	text := err.Error()
	switch {
	case m.prefix != "":
		text = m.prefix + ": " + text
	case errors.Is(err, podsandbox.ErrImageVolume): // with whatever code (kubelet, kuberuntime_container.go)
		text = crierrors.ErrImageVolumeMountFailed.Error() + ": " + text
	}
	return status.Error(m.code, text)
}

// blame says whom a code blames, for the log: a caller's mistake is worth a
// line for those who look for it, ours one for the operator.
func blame(err error) (code string, ours bool) {
	c := status.Code(err)
	switch c {
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.ResourceExhausted:
		return c.String(), true
	}
	return c.String(), false
}
