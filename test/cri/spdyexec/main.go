// Command spdyexec measures exec over streaming for test/bench: it asks a runtime for /true
// in a container, again and again, with kubectl's SPDY client, and prints how long each took, in nanoseconds, one a line.
//
//	spdyexec ENDPOINT CONTAINER TIMES
package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "spdyexec:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("usage: spdyexec ENDPOINT CONTAINER TIMES")
	}
	times, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(args[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	runtime := runtimeapi.NewRuntimeServiceClient(conn)
	for i := range times + 1 {
		began := time.Now()
		if err := once(ctx, runtime, args[1]); err != nil {
			return err
		}
		if i > 0 { // the first warms up
			fmt.Println(time.Since(began).Nanoseconds())
		}
	}
	return nil
}

func once(ctx context.Context, runtime runtimeapi.RuntimeServiceClient, container string) error {
	r, err := runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: container, Cmd: []string{"/true"}, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	u, err := url.Parse(r.Url)
	if err != nil {
		return err
	}
	e, err := remotecommand.NewSPDYExecutor(&rest.Config{}, http.MethodPost, u)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &out}); err != nil {
		return fmt.Errorf("%w: %s", err, out.String())
	}
	return nil
}
