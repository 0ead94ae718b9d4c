package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hookDir is where a test's hooks are and write: on the host, which createContainer's see.
type hookDir struct {
	t   *testing.T
	dir string
}

// script writes an executable shell script. It runs with the state in $STATE.
func (h hookDir) script(name, text string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\nset -e\nexec 2>&1\nSTATE=$(/bin/cat)\n"+text+"\n"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func (h hookDir) read(name string) string {
	h.t.Helper()
	return readFile(h.t, filepath.Join(h.dir, name))
}

// lines are those of the file that the hooks append to.
func (h hookDir) lines(name string) []string {
	b, err := os.ReadFile(filepath.Join(h.dir, name))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// hook is the JSON of one in a CDI file.
func hook(kind, path string, more string) string {
	return fmt.Sprintf(`{"hookName":%q,"path":%q%s}`, kind, path, more)
}

func hooks(list ...string) string { return `{"hooks":[` + strings.Join(list, ",") + `]}` }

var hostKinds = []string{"prestart", "createRuntime", "createContainer", "poststart", "poststop"}

func TestHooksRunInOrderAndPlace(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	var list []string
	for _, kind := range hostKinds {
		// The state, the namespaces, and what there is at root.path of the bundle's config.json.
		list = append(list, hook(kind, h.script(kind, `
echo "$1 `+kind+`" >> `+h.dir+`/order
printf '%s' "$STATE" > `+h.dir+`/`+kind+`.state
for n in mnt pid net ipc uts cgroup; do echo $n $(/usr/bin/readlink /proc/self/ns/$n); done > `+h.dir+`/`+kind+`.ns
/usr/bin/env > `+h.dir+`/`+kind+`.env
BUNDLE=$(printf '%s' "$STATE" | /bin/sed 's/.*"bundle":"\([^"]*\)".*/\1/')
test -s $BUNDLE/config.json && /bin/grep -q '"path":"rootfs"' $BUNDLE/config.json
/bin/ls $BUNDLE/rootfs > `+h.dir+`/`+kind+`.rootfs`), `,"args":["x","first"],"env":["KIND=`+kind+`"]`))
	}
	list = append(list, hook("startContainer", "/payload", `,"args":["payload","mkfile","/hook/order","started",",","stdin"]`))
	list = append(list, hook("createContainer", h.script("second", `echo "second createContainer" >> `+h.dir+`/order`), ""))
	describe(t, dir, "d", hooks(list...))
	p := w.pod(t).used()
	shared := t.TempDir()
	c := p.create([]string{"cat", "/hook/order", ",", "sleep"}, withCDI("d"), withMounts(&runtimeapi.Mount{HostPath: shared, ContainerPath: "/hook"}))
	if got := h.lines("order"); got != nil {
		t.Errorf("before the start there ran %q", got)
	}
	c.start()
	c.says("started") // startContainer's ran before the program
	want := []string{"first prestart", "first createRuntime", "first createContainer", "second createContainer", "first poststart"}
	if got := h.lines("order"); strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("order is %q, want %q", got, want)
	}
	pid := c.pid()
	inside, host := namespaces(t, pid), namespaces(t, w.PID)
	c.stop(0)
	eventually(t, "the poststop hook runs", func() bool { return len(h.lines("order")) == 6 })
	c.remove()
	if got := h.lines("order"); len(got) != 6 || got[5] != "first poststop" {
		t.Errorf("order is %q at the end, want poststop's once", got)
	}
	for _, kind := range hostKinds {
		var s struct {
			OCIVersion, ID, Status, Bundle string
			Pid                            int
			Annotations                    map[string]string
		}
		if err := json.Unmarshal([]byte(h.read(kind+".state")), &s); err != nil {
			t.Fatalf("%s: the state is %q: %v", kind, h.read(kind+".state"), err)
		}
		status := map[string]string{"poststart": "running", "poststop": "stopped"}[kind]
		if status == "" {
			status = "creating"
		}
		seen := map[string]int{"createContainer": 1, "poststop": 0}
		wantPID, ok := seen[kind]
		if !ok {
			wantPID = pid
		}
		if s.ID != c.id || s.OCIVersion == "" || s.Status != status || s.Pid != wantPID || !strings.HasSuffix(s.Bundle, "/containers/"+c.id) || s.Annotations["io.kubernetes.cri.sandbox-id"] != p.id {
			t.Errorf("%s: the state is %+v, want status %s, pid %d", kind, s, status, wantPID)
		}
		if got := h.read(kind + ".env"); !strings.Contains(got, "KIND="+kind) || strings.Contains(got, "NOTIFY_SOCKET") {
			t.Errorf("%s: environment is %q", kind, got)
		}
		where := host
		if kind == "createContainer" {
			where = inside
		}
		for _, line := range h.lines(kind + ".ns") {
			name, ns, _ := strings.Cut(line, " ")
			if where[name] != ns {
				t.Errorf("%s: namespace %s is %s, want %s", kind, name, ns, where[name])
			}
		}
		if got := h.read(kind + ".rootfs"); strings.Contains(got, "payload") != (kind == "createContainer") {
			t.Errorf("%s: root.path holds %q", kind, got)
		}
	}
}

// What NVIDIA's createContainer hooks do: they change the root file system, and mount into it.
func TestCreateContainerHookChangesTheRoot(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	describe(t, dir, "d", hooks(hook("createContainer", h.script("ldcache", `
ROOT=$(printf '%s' "$STATE" | /bin/sed 's/.*"bundle":"\([^"]*\)".*/\1/')/rootfs
/bin/mkdir -p $ROOT/etc $ROOT/mnt/params
echo cache > $ROOT/etc/ld.so.cache
/bin/ln -sf ld.so.cache $ROOT/etc/link
/bin/mount -t tmpfs params $ROOT/mnt/params
echo mounted > $ROOT/mnt/params/file
echo elsewhere > $ROOT/vol/file
/usr/bin/test -d $ROOT/proc/self
! /bin/ls `+w.StateDir+`/state/images 2>/dev/null`), "")))
	p := w.pod(t)
	volume := t.TempDir()
	for _, readonly := range []bool{false, true} {
		t.Run("readonly "+strconv.FormatBool(readonly), func(t *testing.T) {
			p := p.on(t)
			got := p.output([]string{"cat", "/etc/link", "/mnt/params/file"}, withCDI("d"), withMounts(&runtimeapi.Mount{HostPath: volume, ContainerPath: "/vol"}),
				withSecurity(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.ReadonlyRootfs = readonly }))
			if got != "cache\nmounted\n" {
				t.Errorf("got %q, want what the hook made", got)
			}
			if got := readFile(t, filepath.Join(volume, "file")); got != "elsewhere\n" {
				t.Errorf("the volume has %q", got)
			}
			// And nothing of it, nor of the host, is left in the container.
			if table := p.output([]string{"mountinfo"}, withCDI("d"), withMounts(&runtimeapi.Mount{HostPath: volume, ContainerPath: "/vol"})); strings.Contains(table, w.StateDir+"/state ") || strings.Contains(table, " /host") {
				t.Errorf("the container sees mounts of the host:\n%s", table)
			}
		})
	}
}

func TestStartContainerHookHasTheContainersRights(t *testing.T) {
	w, dir := cdiWorld(t)
	describe(t, dir, "d", hooks(hook("startContainer", "/payload", `,"args":["payload","status"],"env":["A=1"]`), hook("startContainer", "/payload", `,"args":["payload","exit","7"]`)))
	p := w.pod(t)
	c := p.create([]string{"true"}, withCDI("d"), asUser(1000), withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, ""),
		withSecurity(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NoNewPrivs = true }))
	err := w.rt.StartContainer(t.Context(), c.id)
	wantCode(t, err, codes.Internal, "startContainer hook /payload", "exit status 7")
	// The same, failing with what it sees as its message.
	describe(t, dir, "d", hooks(hook("startContainer", "/payload", `,"args":["payload","cat","/proc/self/status",",","exit","7"]`)))
	c = p.create([]string{"true"}, withCDI("d"), asUser(1000), withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, ""),
		withSecurity(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NoNewPrivs = true }))
	err = w.rt.StartContainer(t.Context(), c.id)
	wantCode(t, err, codes.Internal, `CapEff:\t0000000000000000`, `NoNewPrivs:\t1`, `Seccomp:\t2`)
}

func TestFailingHooksLeaveNothing(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	fails := h.script("fails", "echo no such gpu; exit 3")
	slow := h.script("slow", "echo tired; /bin/sleep 100 & /bin/sleep 100")
	after := h.script("after", "echo $1 >> "+h.dir+"/ran")
	p := w.pod(t).used()
	for _, kind := range hostKinds[:4] {
		for _, tt := range []struct{ name, hook, text string }{
			{"fails", hook(kind, fails, ""), "exit status 3"},
			{"missing", hook(kind, "/nothere", ""), "no such file"},
			{"slow", hook(kind, slow, `,"timeout":1`), "timeout of 1"},
		} {
			t.Run(kind+" "+tt.name, func(t *testing.T) {
				p := p.on(t)
				describe(t, dir, "d", hooks(tt.hook, hook(kind, after, `,"args":["x","`+kind+`"]`), hook("poststop", after, `,"args":["x","poststop"]`)))
				_ = os.Remove(filepath.Join(h.dir, "ran"))
				w.leavesNothing(t, func() {
					c := p.create([]string{"sleep"}, withCDI("d"))
					err := w.rt.StartContainer(t.Context(), c.id)
					wantCode(t, err, codes.Internal, kind+" hook", tt.text, map[string]string{"fails": "no such gpu", "slow": "tired"}[tt.name])
					st := c.wait()
					if kind != "poststart" && (st.Reason != "StartError" || !strings.Contains(st.Message, kind+" hook")) {
						t.Errorf("the container is %s, %q", st.Reason, st.Message)
					}
					c.remove()
				})
				if got := h.lines("ran"); len(got) != 1 || got[0] != "poststop" {
					t.Errorf("after it there ran %q, want poststop's alone", got)
				}
			})
		}
	}
	t.Run("poststop", func(t *testing.T) {
		describe(t, dir, "d", hooks(hook("poststop", fails, ""), hook("poststop", after, `,"args":["x","second"]`)))
		_ = os.Remove(filepath.Join(h.dir, "ran"))
		w.leavesNothing(t, func() {
			c := p.on(t).run([]string{"true"}, withCDI("d"))
			if st := c.wait(); st.ExitCode != 0 {
				t.Errorf("the container ended with %d", st.ExitCode)
			}
			c.remove()
		})
		if got := h.lines("ran"); len(got) != 1 || got[0] != "second" {
			t.Errorf("after a failing one there ran %q, want the second", got)
		}
		if !strings.Contains(w.LastLog(), "no such gpu") {
			t.Error("the log does not tell")
		}
	})
}

func TestHooksAndADaemonThatDies(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	hang := h.script("hang", "echo $$ > "+h.dir+"/pid; while ! test -e "+h.dir+"/go; do /bin/sleep 0.05; done")
	after := h.script("after", "echo $1 >> "+h.dir+"/ran")
	post := hook("poststop", after, `,"args":["x","poststop"]`)

	// In a hook of the create: the start has failed, and what was begun is undone.
	describe(t, dir, "d", hooks(hook("createRuntime", hang, ""), post))
	p := w.pod(t)
	c := p.create([]string{"sleep"}, withCDI("d"))
	started := make(chan error, 1)
	rt := w.rt
	go func() { started <- rt.StartContainer(t.Context(), c.id) }()
	eventually(t, "the hook runs", func() bool { return h.lines("pid") != nil })
	w.crash(t)
	if err := <-started; err == nil {
		t.Error("the start succeeded")
	}
	mustWrite(t, filepath.Join(h.dir, "go"), "")
	w.again(t)
	if st := c.status(); st.State != exited || st.Reason != "StartError" {
		t.Errorf("the container is %v, %s; want exited, StartError", st.State, st.Reason)
	}
	eventually(t, "the next daemon runs the poststop hook", func() bool { return len(h.lines("ran")) == 1 })
	c.remove()

	// While it runs: the next daemon knows what is owed.
	_ = os.Remove(filepath.Join(h.dir, "ran"))
	describe(t, dir, "d", hooks(post))
	c = p.run([]string{"sleep"}, withCDI("d"))
	pid := c.pid()
	if err := os.Remove(filepath.Join(dir, "d.json")); err != nil { // config.json is what counts
		t.Fatal(err)
	}
	w.crash(t)
	kill(t, pid, 9)
	eventually(t, "the container ends", func() bool { return procField(pid, "State") == nil })
	w.again(t)
	eventually(t, "the next daemon runs the poststop hook", func() bool { return len(h.lines("ran")) == 1 })
	c.remove()
	if got := h.lines("ran"); len(got) != 1 {
		t.Errorf("there ran %q, want the hook once", got)
	}
}

// A start that hangs in a hook can be stopped.
func TestStopEndsAHook(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	p := w.pod(t).used()
	for _, kind := range hostKinds[:4] {
		t.Run(kind, func(t *testing.T) {
			p := p.on(t)
			_ = os.Remove(filepath.Join(h.dir, "begun"))
			describe(t, dir, "d", hooks(hook(kind, h.script("hang", "echo > "+h.dir+"/begun; exec /bin/sleep 1000"), "")))
			w.leavesNothing(t, func() {
				c := p.create([]string{"sleep"}, withCDI("d"))
				started := make(chan error, 1)
				go func() { started <- w.rt.StartContainer(t.Context(), c.id) }()
				eventually(t, "the hook runs", func() bool { return h.lines("begun") != nil })
				c.stop(1)
				if err := <-started; err == nil {
					t.Error("the start succeeded")
				}
				if st := c.status(); st.State != exited {
					t.Errorf("the container is %v", st.State)
				}
				c.remove()
			})
		})
	}
}

// A hook has the host's rights, so no container may see it: not even one that shares its processes.
func TestHooksOfSharedProcesses(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	describe(t, dir, "create", hooks(hook("createContainer", h.script("a", "/usr/bin/readlink /proc/self/ns/pid > "+h.dir+"/pid\n/usr/bin/readlink /proc/self/ns/mnt > "+h.dir+"/mnt"), "")))
	describe(t, dir, "start", hooks(hook("startContainer", "/payload", `,"args":["payload","true"]`)))
	podShare, containerShare := withNamespaces(func(ns *runtimeapi.NamespaceOption) { ns.Pid = runtimeapi.NamespaceMode_POD })
	p := w.pod(t, podShare)
	c := p.run([]string{"sleep"}, withCDI("create"), containerShare)
	inside := namespaces(t, c.anyPID())
	if got := h.lines("pid"); len(got) != 1 || got[0] != namespaces(t, w.PID)["pid"] {
		t.Errorf("the hook ran in PID namespace %q, want the host's", got)
	}
	if got := h.lines("mnt"); len(got) != 1 || got[0] != inside["mnt"] {
		t.Errorf("the hook ran in mount namespace %q, want %s", got, inside["mnt"])
	}
	_, err := p.tryCreate([]string{"true"}, withCDI("start"), containerShare)
	wantCode(t, err, codes.Unimplemented, "startContainer hook", "shares a PID namespace")
	// Of its own it may have them, but not with the power to trace its own init.
	alone := w.pod(t)
	trace := func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
	}
	if _, err := alone.tryCreate([]string{"true"}, withCDI("start")); err != nil {
		t.Error(err)
	}
	_, err = alone.tryCreate([]string{"true"}, withCDI("start"), trace)
	wantCode(t, err, codes.Unimplemented, "startContainer hook", "CAP_SYS_PTRACE")
}

func TestHooksOfAUserNamespace(t *testing.T) {
	needUserns(t)
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	// What is in the way to a bundle below /var/lib or to the test's directories everybody may pass; of a test's node not.
	for d := h.dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(w.StateDir, 0o755), os.Chmod(h.dir, 0o777)); err != nil {
		t.Fatal(err)
	}
	describe(t, dir, "d", hooks(
		hook("createRuntime", h.script("host", "/usr/bin/id -u > "+h.dir+"/host.uid; /bin/cat /proc/self/uid_map > "+h.dir+"/host.map"), ""),
		hook("createContainer", h.script("inside", `
/bin/cat /proc/self/uid_map > `+h.dir+`/inside.map
BUNDLE=$(printf '%s' "$STATE" | /bin/sed 's/.*"bundle":"\([^"]*\)".*/\1/')
/bin/grep -q rootfs $BUNDLE/config.json
echo made > $BUNDLE/rootfs/made`), "")))
	p := w.usernsPod(t)
	got := p.output([]string{"cat", "/made", ",", "stat", "/made"}, withCDI("d"))
	if !strings.HasPrefix(got, "made\n") || !strings.Contains(got, "uid=0 ") {
		t.Errorf("got %q, want the file, of the pod's root", got)
	}
	if h.read("host.map") == h.read("inside.map") {
		t.Errorf("the createContainer hook ran with the mapping %q, want the pod's", h.read("inside.map"))
	}
}

func TestHooksWithATerminalAndSharedProcesses(t *testing.T) {
	w, dir := cdiWorld(t)
	h := hookDir{t, t.TempDir()}
	describe(t, dir, "d", hooks(hook("createContainer", h.script("a", "echo a >> "+h.dir+"/order"), ""), hook("prestart", h.script("b", "echo b >> "+h.dir+"/order"), "")))
	podShare, containerShare := withNamespaces(func(ns *runtimeapi.NamespaceOption) { ns.Pid = runtimeapi.NamespaceMode_POD })
	p := w.pod(t, podShare)
	c := p.run([]string{"echo", "hello"}, withCDI("d"), containerShare, func(c *runtimeapi.ContainerConfig) { c.Tty = true })
	if st := c.wait(); st.ExitCode != 0 {
		t.Errorf("ended with %d", st.ExitCode)
	}
	c.says("hello")
	if got := h.lines("order"); strings.Join(got, "") != "ba" {
		t.Errorf("order is %q", got)
	}
}
