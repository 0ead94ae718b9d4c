package cri

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime/debug"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/podsandbox"
)

// errPanic is wrapped by what becomes of a panic in a call.
var errPanic = errors.New("internal error")

// phase of the server's life; it only ever goes up.
type phase int32

const (
	starting phase = iota // records are being read: only Version is answered
	serving
	draining // no new calls; those that run may end
)

// gate lets calls in, depending on the phase. The zero value is starting.
type gate struct{ now atomic.Int32 }

// to moves the gate forward; backward it does not go.
func (g *gate) to(p phase) {
	for {
		was := g.now.Load()
		if was >= int32(p) || g.now.CompareAndSwap(was, int32(p)) {
			return
		}
	}
}

// admit errors: podsandbox.ErrUnavailable.
func (g *gate) admit(method string) error {
	if method == "Version" { // the kubelet's proof that the socket speaks CRI v1
		return nil
	}
	switch phase(g.now.Load()) {
	case starting:
		return fmt.Errorf("%w: crispd is starting and has not read all its records yet", podsandbox.ErrUnavailable)
	case draining:
		return fmt.Errorf("%w: crispd is shutting down; pods keep running, and the next crispd takes over", podsandbox.ErrUnavailable)
	default:
		return nil
	}
}

// deadlineDefault is for callers that set none (the kubelet and crictl do): twice
// the kubelet's runtimeRequestTimeout, which is what it gives RunPodSandbox.
const deadlineDefault = 4 * time.Minute

// withDeadline bounds a call whose caller did not. A pull has no limit: package image
// watches for stalls. ExecSync and StopContainer add the time they were asked to wait.
func withDeadline(ctx context.Context, req any) (context.Context, context.CancelFunc) {
	if _, has := ctx.Deadline(); has {
		return ctx, func() {}
	}
	limit := deadlineDefault
	switch r := req.(type) {
	case *runtimeapi.PullImageRequest:
		return ctx, func() {}
	case *runtimeapi.ExecSyncRequest:
		if r.GetTimeout() == 0 { // run forever
			return ctx, func() {}
		}
		limit = addSeconds(limit, r.GetTimeout())
	case *runtimeapi.StopContainerRequest:
		limit = addSeconds(limit, r.GetTimeout())
	}
	return context.WithTimeout(ctx, limit)
}

func addSeconds(d time.Duration, s int64) time.Duration { return d + min(seconds(s), 1000*time.Hour) }

// withLog adds to the context's logger what every line of this call shall say.
func withLog(ctx context.Context, method string, req any) (context.Context, klog.Logger) {
	values := make([]any, 0, 6)
	values = append(values, "rpc", method)
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok && r.GetPodSandboxId() != "" {
		values = append(values, "sandboxID", clip(r.GetPodSandboxId()))
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok && r.GetContainerId() != "" {
		values = append(values, "containerID", clip(r.GetContainerId()))
	}
	logger := klog.LoggerWithValues(klog.FromContext(ctx), values...)
	return klog.NewContext(ctx, logger), logger
}

// unary is what every call passes through. It never logs a request: secrets live there.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	began := time.Now()
	method := path.Base(info.FullMethod)
	ctx, logger := withLog(ctx, method, req)
	ctx, cancel := withDeadline(ctx, req)
	defer cancel()
	resp, err := s.call(method, func() (any, error) { return handler(ctx, req) })
	if err = logged(logger, began, err); err != nil {
		return nil, err
	}
	return resp, nil
}

// stream is unary for streams.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	began := time.Now()
	method := path.Base(info.FullMethod)
	_, logger := withLog(ss.Context(), method, nil)
	_, err := s.call(method, func() (any, error) { return nil, handler(srv, ss) })
	return logged(logger, began, err)
}

// call runs one call unless it is one we do not have, or the gate is closed.
func (s *Server) call(method string, run func() (any, error)) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			klog.ErrorS(nil, "Call panicked, answering with an error", "rpc", method, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, fmt.Errorf("%w: %s panicked; the stack is in crispd's log", errPanic, method)
		}
	}()
	if why, ok := notImplemented[method]; ok {
		return nil, fmt.Errorf("%w: %s", podsandbox.ErrUnsupported, why)
	}
	if err := s.gate.admit(method); err != nil {
		return nil, err
	}
	return run()
}

// logged writes the one line about an error and returns it as a status.
func logged(logger klog.Logger, began time.Time, err error) error {
	took := time.Since(began)
	if err == nil {
		logger.V(5).Info("Answered", "took", took)
		return nil
	}
	st := toStatus(err)
	if code, ours := blame(st); ours {
		logger.Error(err, "Call failed", "code", code, "took", took)
	} else {
		logger.V(2).Info("Refused call", "code", code, "err", err, "took", took)
	}
	return st
}
