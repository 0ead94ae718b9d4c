// Package crictl drives a real crispd with crictl as a user would: each
// sub-command that issue 2 names is run, and what it prints is checked.
//
// crictl is built from its Go module (hack/cri-tools), so the test needs nothing
// that is installed.
package crictl

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/test/images"
	"github.com/crisp-cri/crisp/test/leak"
	"github.com/crisp-cri/crisp/test/node"
)

// ref leads to the registry on loopback, as any registry's name does (certs.d/_default).
const ref = "registry.example/crisp/payload:1"

// user is somebody at a shell of the node.
type user struct {
	t      *testing.T
	n      *node.Node
	crictl string
	dir    string // for config files
}

// run runs crictl and wants it to succeed; it returns stdout.
func (u *user) run(args ...string) string {
	u.t.Helper()
	out, msg, err := u.try(args...)
	if err != nil {
		u.t.Fatalf("crictl %s: %v\n%s%s", strings.Join(args, " "), err, out, msg)
	}
	return out
}

// refused runs crictl and wants it to fail, saying text.
func (u *user) refused(text string, args ...string) {
	u.t.Helper()
	out, msg, err := u.try(args...)
	if err == nil || !strings.Contains(msg, text) {
		u.t.Errorf("crictl %s: got %v, %q, %q; want a failure with %q", strings.Join(args, " "), err, out, msg, text)
	}
}

func (u *user) try(args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(u.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, u.crictl, append([]string{"--config", os.DevNull, "--timeout", "30s", "-r", u.n.Endpoint(), "-i", u.n.Endpoint()}, args...)...)
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	err = cmd.Run()
	return out.String(), msg.String(), err
}

// id is the one line that run, runp, create print: a full id.
func (u *user) id(args ...string) string {
	u.t.Helper()
	out := strings.TrimSpace(u.run(args...))
	if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(out) {
		u.t.Fatalf("crictl %s: got %q, want an id", strings.Join(args, " "), out)
	}
	return out
}

// exec runs payload in a container. crictl prints an empty line after each stream.
func (u *user) exec(container string, args ...string) string {
	u.t.Helper()
	return strings.TrimSpace(u.run(append([]string{"exec", "-s", container, "/payload"}, args...)...))
}

// says wants each pattern in what crictl prints.
func (u *user) says(patterns []string, args ...string) {
	u.t.Helper()
	out := u.run(args...)
	for _, p := range patterns {
		if !regexp.MustCompile(p).MatchString(out) {
			u.t.Errorf("crictl %s: got\n%s\nwant %s in it", strings.Join(args, " "), out, p)
		}
	}
}

// value is what a path of keys leads to in crictl's JSON.
func (u *user) value(path string, args ...string) string {
	u.t.Helper()
	out := u.run(args...)
	var v any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		u.t.Fatalf("crictl %s: %v in %q", strings.Join(args, " "), err, out)
	}
	for key := range strings.SplitSeq(path, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			u.t.Fatalf("crictl %s: no %s in %s", strings.Join(args, " "), path, out)
		}
		v = m[key]
	}
	return fmt.Sprint(v)
}

// file writes a config for crictl.
func (u *user) file(name string, content map[string]any) string {
	u.t.Helper()
	text, err := json.Marshal(content)
	if err != nil {
		u.t.Fatal(err)
	}
	path := filepath.Join(u.dir, name+".json")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		u.t.Fatal(err)
	}
	return path
}

func (u *user) pod(name string) string {
	return u.file(name, map[string]any{
		"metadata": map[string]any{"name": name, "namespace": "crictl-test", "uid": u.n.Tag + name, "attempt": 1},
		"hostname": name, "log_directory": filepath.Join(u.n.LogDir, name), "labels": map[string]any{"app": name}, "annotations": map[string]any{"a/b": "c d"},
		"linux": map[string]any{},
	})
}

func (u *user) container(name string, args ...string) string {
	return u.file(name, map[string]any{
		"metadata": map[string]any{"name": name}, "image": map[string]any{"image": ref}, "args": args, "log_path": name + ".log",
		"labels": map[string]any{"c": name}, "linux": map[string]any{"resources": map[string]any{"memory_limit_in_bytes": 64 << 20, "cpu_shares": 512}},
	})
}

func TestCrictl(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: drives a real crispd")
	}
	dir := t.TempDir()
	u := &user{t: t, crictl: filepath.Join(dir, "crictl"), dir: dir}
	build := exec.Command("go", "build", "-o", u.crictl, "sigs.k8s.io/cri-tools/cmd/crictl")
	build.Dir, build.Env = filepath.Join("..", "..", "hack", "cri-tools"), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build crictl: %v\n%s", err, out)
	}
	crispd := os.Getenv("CRISPD")
	if crispd == "" {
		var err error
		if crispd, err = node.Build(dir); err != nil {
			t.Fatal(err)
		}
	}
	payload, err := images.BuildPayload(dir)
	if err != nil {
		t.Fatal(err)
	}
	registry, err := images.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	certs := filepath.Join(dir, "certs.d")
	if err := images.WriteDefaultHosts(certs, registry.Host); err != nil {
		t.Fatal(err)
	}
	if err := images.Payload(payload).Push(registry.Host); err != nil {
		t.Fatal(err)
	}
	n, err := node.New(node.Options{Crispd: crispd, Args: []string{"--set", "image.certs_dir=" + certs}})
	if err != nil {
		t.Fatal(err)
	}
	u.n = n
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.LastLog())
		}
		if err := n.Remove(); err != nil {
			t.Error(err)
		}
		if left, err := n.Leftovers(); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}

	u.runtime()
	u.images()
	u.warmUp()
	before := u.snapshot()
	u.podAndContainer()
	u.restart()
	u.runAtOnce()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if diff, err := u.scope().Settle(ctx, before); err != nil || len(diff) > 0 {
		t.Errorf("after all: %v\n%s", err, leak.Format(diff, 20))
	}
	u.removeImage()
}

// scope leaves the daemon's own process out: restart makes it another one.
func (u *user) scope() leak.Scope {
	return leak.Scope{Dirs: []string{u.n.StateDir, u.n.RunDir}, Skip: []string{u.n.LogDir}, NetNSDir: filepath.Join(u.n.RunDir, "netns"),
		Cgroups: []string{u.n.Cgroups}, Bridge: u.n.Bridge, Tables: []string{u.n.Table}}
}

func (u *user) snapshot() leak.Snapshot {
	u.t.Helper()
	snap, err := u.scope().Take()
	if err != nil {
		u.t.Fatal(err)
	}
	return snap
}

// warmUp makes what crispd makes once: bridge, table, cgroup parent.
func (u *user) warmUp() {
	u.t.Helper()
	id := u.id("runp", u.pod("warm-up"))
	u.run("rmp", "-f", id)
}

func (u *user) runtime() {
	u.t.Helper()
	u.says([]string{`RuntimeName: +crisp`, `RuntimeApiVersion: +v1`, `Version: +0\.1\.0`}, "version")
	u.says([]string{`"RuntimeReady"`, `"NetworkReady"`}, "info")
	out := u.run("info")
	var info struct {
		Status struct {
			Conditions []struct {
				Type   string
				Status bool
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		u.t.Fatal(err)
	}
	for _, c := range info.Status.Conditions {
		if !c.Status && strings.HasSuffix(c.Type, "Ready") {
			u.t.Errorf("info: %s is false", c.Type)
		}
	}
	u.says([]string{`(?i)cgroupfs`}, "runtime-config")
}

func (u *user) images() {
	u.t.Helper()
	u.says([]string{`sha256:[0-9a-f]{64}`}, "pull", ref)
	u.refused("no/such", "pull", "registry.example/no/such:1")
	u.says([]string{`registry\.example/crisp/payload +1 +[0-9a-f]{13}`}, "images")
	id := strings.TrimSpace(u.run("images", "-q", "--no-trunc"))
	if got := u.value("status.id", "inspecti", ref); got != id {
		u.t.Errorf("inspecti: got id %s, images says %s", got, id)
	}
	if got := u.value("status.repoTags", "inspecti", id); got != "["+ref+"]" {
		u.t.Errorf("inspecti: got tags %s", got)
	}
	u.says([]string{`"usedBytes": \{\s+"value": "[1-9][0-9]*"`, `"mountpoint": "` + u.n.StateDir}, "imagefsinfo")
}

func (u *user) podAndContainer() {
	u.t.Helper()
	podFile := u.pod("pod-a")
	pod := u.id("runp", podFile)
	u.says([]string{pod[:13] + ` .* Ready +pod-a +crictl-test +1`}, "pods")
	if got := strings.TrimSpace(u.run("pods", "-q", "--no-trunc", "--label", "app=pod-a", "--state", "ready")); got != pod {
		u.t.Errorf("pods by label and state: got %q", got)
	}
	for path, want := range map[string]string{"status.id": pod, "status.state": "SANDBOX_READY", "status.metadata.name": "pod-a", "status.metadata.attempt": "1", "status.labels.app": "pod-a"} {
		if got := u.value(path, "inspectp", pod[:13]); got != want {
			u.t.Errorf("inspectp: %s is %q, want %q", path, got, want)
		}
	}
	if ip := u.value("status.network.ip", "inspectp", pod); !strings.HasPrefix(ip, "10.") {
		u.t.Errorf("inspectp: address %q", ip)
	}
	u.refused("not found", "inspectp", "0123456789abcdef")

	one := u.id("create", pod, u.container("one", "trap"), podFile)
	u.says([]string{one[:13] + ` .* Created +one`}, "ps", "-a")
	if got := strings.TrimSpace(u.run("start", one)); got != one {
		u.t.Errorf("start: got %q", got)
	}
	u.says([]string{one[:13] + ` .* Running +one +0 +` + pod[:13]}, "ps")
	for path, want := range map[string]string{"status.id": one, "status.state": "CONTAINER_RUNNING", "status.metadata.name": "one", "status.labels.c": "one",
		"status.resources.linux.memoryLimitInBytes": "67108864", "status.resources.linux.cpuShares": "512", "status.image.image": ref} {
		if got := u.value(path, "inspect", one); got != want {
			u.t.Errorf("inspect: %s is %q, want %q", path, got, want)
		}
	}
	if got := u.exec(one, "hostname"); got != "pod-a" {
		u.t.Errorf("exec -s: got %q", got)
	}
	if _, _, err := u.try("exec", "-s", one, "/payload", "exit", "7"); err == nil {
		u.t.Error("exec -s of a failing command succeeded")
	}
	u.refused("eadline", "exec", "-s", "--timeout", "1", one, "/payload", "sleep")
	u.until("ready\n", "logs", one)

	u.says([]string{`CONTAINER +NAME +CPU %`, one[:13] + ` +one`}, "stats")
	u.says([]string{one[:13]}, "stats", "--id", one[:13])
	if cpu := u.value("stats", "stats", "-o", "json", "--id", one); !strings.Contains(cpu, "usageCoreNanoSeconds") || !strings.Contains(cpu, "workingSetBytes") {
		u.t.Errorf("stats -o json: got %s", cpu)
	}
	u.run("update", "--memory", "33554432", "--cpu-share", "256", one)
	for path, want := range map[string]string{"status.resources.linux.memoryLimitInBytes": "33554432", "status.resources.linux.cpuShares": "256"} {
		if got := u.value(path, "inspect", one); got != want {
			u.t.Errorf("after update: %s is %q, want %q", path, got, want)
		}
	}

	u.run("stop", "--timeout", "10", one)
	u.says([]string{one[:13] + ` .* Exited +one`}, "ps", "-a")
	if got := u.value("status.exitCode", "inspect", one); got != "0" {
		u.t.Errorf("exit code: got %s", got)
	}
	u.says([]string{`ready\nsignal 15 SIGTERM`}, "logs", one)
	u.refused("state", "start", one)
	u.run("rm", one)
	u.refused("not found", "inspect", one)
	u.run("stopp", pod)
	u.says([]string{pod[:13] + ` .* NotReady +pod-a`}, "pods")
	u.run("rmp", pod)
	if got := u.run("pods", "-q"); got != "" {
		u.t.Errorf("pods after rmp: got %q", got)
	}
}

// until polls until crictl prints want: a program's output takes a moment to its log.
func (u *user) until(want string, args ...string) {
	u.t.Helper()
	var got string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if got = u.run(args...); got == want {
			return
		}
	}
	u.t.Errorf("crictl %s: got %q, want %q", strings.Join(args, " "), got, want)
}

// restart: crispd ends and comes again, and dies and comes again; crictl sees the same pod.
func (u *user) restart() {
	u.t.Helper()
	podFile := u.pod("pod-r")
	pod := u.id("runp", podFile)
	c := u.id("create", pod, u.container("stays", "sleep"), podFile)
	u.run("start", c)
	for _, end := range []func() error{u.n.Stop, u.n.Kill} {
		if err := end(); err != nil {
			u.t.Fatal(err)
		}
		if err := u.n.Start(u.t.Context()); err != nil {
			u.t.Fatal(err)
		}
		u.says([]string{c[:13] + ` .* Running +stays`}, "ps")
		if got := u.exec(c, "echo", "hi"); got != "hi" {
			u.t.Errorf("exec -s: got %q", got)
		}
	}
	u.run("rmp", "-f", pod)
}

func (u *user) runAtOnce() {
	u.t.Helper()
	c := u.id("run", u.container("two", "exit", "3"), u.pod("pod-b"))
	u.until(c+"\n", "ps", "-a", "-q", "--no-trunc", "--state", "exited")
	if got := u.value("status.exitCode", "inspect", c); got != "3" {
		u.t.Errorf("exit code: got %s, want 3", got)
	}
	if got := u.value("status.reason", "inspect", c); got != "Error" {
		u.t.Errorf("reason: got %s, want Error", got)
	}
	u.run("rmp", "-f", strings.TrimSpace(u.run("pods", "-q", "--no-trunc")))
	if got := u.run("ps", "-a", "-q"); got != "" {
		u.t.Errorf("ps after rmp -f: got %q", got)
	}
}

func (u *user) removeImage() {
	u.t.Helper()
	u.says([]string{`registry\.example/crisp/payload:1`}, "rmi", ref)
	if got := u.run("images", "-q"); got != "" {
		u.t.Errorf("images after rmi: got %q", got)
	}
}
