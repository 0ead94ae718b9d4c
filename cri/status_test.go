package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/podsandbox"
	"github.com/crisp-cri/crisp/runtime/spawn"
)

// Every row is reached, also through wrapping, and keeps its text.
func TestMeanings(t *testing.T) {
	for i, m := range meanings {
		err := fmt.Errorf("cannot run pod %q: step: %w", "x", m.cause)
		if got := meaningOf(err); !errors.Is(m.cause, got.cause) || got.code != m.code {
			t.Errorf("row %d (%v): got row of %v, %v", i, m.cause, got.cause, got.code)
		}
		text := err.Error()
		if m.prefix != "" {
			text = m.prefix + ": " + text
		}
		wantStatus(t, toStatus(err), m.code, text)
		if status.Convert(toStatus(err)).Message() != text {
			t.Errorf("row %d: message is %q, want %q", i, status.Convert(toStatus(err)).Message(), text)
		}
	}
}

// What the callers of CRI are promised, whatever the table's order.
func TestStatus(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"none", nil, codes.OK},
		{"nobody's", errors.New("disk on fire"), codes.Internal},
		{"a wrong field", invalid("f", "x"), codes.InvalidArgument},
		{"a container's program is missing", &spawn.StartError{Step: "exec /bin/x", Err: errors.New("ENOENT")}, codes.Internal},
		{"time ran out while something was unavailable", fmt.Errorf("%w: %w", podsandbox.ErrUnavailable, context.DeadlineExceeded), codes.DeadlineExceeded},
		{"both wrong and the registry's fault", errors.Join(podsandbox.ErrInvalid, image.ErrRegistryUnavailable), codes.InvalidArgument},
		{"gRPC's own", status.Error(codes.ResourceExhausted, "too large"), codes.ResourceExhausted},
	} {
		t.Run(tt.name, func(t *testing.T) { wantStatus(t, toStatus(tt.err), tt.want, "") })
	}
	// Of an image volume it looks for the prefix, whatever the code.
	got := status.Convert(toStatus(fmt.Errorf("cannot create x: %w at /v: %w", podsandbox.ErrImageVolume, image.ErrNotFound)))
	if want := "ImageVolumeMountFailed: cannot create x: cannot mount image volume at /v: "; got.Code() != codes.NotFound || !strings.HasPrefix(got.Message(), want) {
		t.Errorf("got %v, want NotFound and %q", got, want)
	}
	// The kubelet looks for the prefix of an error whose code is Unknown.
	got = status.Convert(toStatus(fmt.Errorf("cannot pull x: %w", image.ErrRegistryUnavailable)))
	if got.Code() != codes.Unknown || got.Message() != "RegistryUnavailable: cannot pull x: "+image.ErrRegistryUnavailable.Error() {
		t.Errorf("got %v %q", got.Code(), got.Message())
	}
}
