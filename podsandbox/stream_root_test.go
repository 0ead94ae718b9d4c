package podsandbox

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"
)

// The end of the first client's input is the end of a stdin_once container's. Once it was not, because the daemon's
// own end of the pipe stayed open until the container ended, which waited for it (critest: "should support attach").
func TestRootAttachStdinOnce(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	p := n.pod(nil)
	id := n.container(p, func(c *ContainerConfig) { c.Stdin, c.StdinOnce = true, true }, "stdin")
	if err := n.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if err := n.Attach(ctx, id, Streams{Stdin: strings.NewReader("hello\n"), Stdout: &out, Stderr: &errs}); err != nil {
		t.Fatal(err)
	}
	if ctx.Err() != nil {
		t.Fatal("attach did not return when the container had ended")
	}
	if out.String() != "hello\n" || errs.String() != "" {
		t.Errorf("got stdout %q, stderr %q, want what was sent", out.String(), errs.String())
	}
	if c := n.state(id, ContainerExited); c.ExitCode != 0 {
		t.Errorf("got exit code %d (%s), want 0", c.ExitCode, c.Reason)
	}
	if err := n.RemovePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
	n.empty()
}
