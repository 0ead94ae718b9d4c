package main

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// watchdogInterval is how often systemd wants to hear of us (WatchdogSec=); 0 when it does not.
func watchdogInterval() time.Duration {
	d, err := daemon.SdWatchdogEnabled(true) // and no CNI plugin is told
	if err != nil {
		klog.ErrorS(err, "Could not find out what systemd's watchdog wants, going on without")
		return 0
	}
	return d
}

// watch pings systemd's watchdog whenever healthy says so, three times in each interval, until ctx ends. One that
// hangs is given a third of the interval; who does not answer for all of it is started again by systemd, and no pod notices.
func watch(ctx context.Context, interval time.Duration, healthy func(context.Context) error, ping func()) {
	every := interval / 3
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		limited, cancel := context.WithTimeout(ctx, every)
		err := healthy(limited)
		cancel()
		if err == nil {
			ping()
		} else if ctx.Err() == nil {
			klog.ErrorS(err, "Is not well: systemd's watchdog is not told that it is", "watchdog", interval)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// probe asks crispd itself what the kubelet asks it all the time. Both lists answer from memory, so that neither a sick pod
// nor a full disk makes them fail; a lock that is never given back, a server that accepts no more, or a machine of goroutines without
// end does.
type probe struct {
	conn *grpc.ClientConn
	rt   runtimeapi.RuntimeServiceClient
}

// newProbe connects when it is first used, and keeps the connection.
func newProbe(socket string) (*probe, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20))) // a thousand pods are a few MB
	if err != nil {
		return nil, err
	}
	return &probe{conn, runtimeapi.NewRuntimeServiceClient(conn)}, nil
}

func (p *probe) ask(ctx context.Context) error {
	if _, err := p.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err != nil {
		return fmt.Errorf("cannot list pods: %w", err)
	}
	if _, err := p.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); err != nil {
		return fmt.Errorf("cannot list containers: %w", err)
	}
	return nil
}

func (p *probe) close() error { return p.conn.Close() }
