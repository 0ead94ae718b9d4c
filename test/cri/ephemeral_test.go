package cri

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// debugging makes an ephemeral container of kubectl debug --target.
func debugging(target string) editContainer {
	return func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: nsTarget, TargetId: target}
	}
}

func TestTargetThatCannotBe(t *testing.T) {
	w := need(t)
	p, other := w.pod(t).used(), w.pod(t)
	stranger, waiting, gone := other.run([]string{"sleep"}), p.create([]string{"sleep"}), p.run([]string{"exit", "3"})
	gone.wait()
	const field = "config.linux.security_context.namespace_options.target_id"
	w.leavesNothing(t, func() {
		for name, c := range map[string]struct {
			target string
			code   codes.Code
			say    []string
		}{
			"none":               {"", codes.InvalidArgument, []string{field}},
			"unknown":            {strings.Repeat("0", 64), codes.NotFound, []string{"target", strings.Repeat("0", 64)}},
			"in another pod":     {stranger.id, codes.InvalidArgument, []string{field, "another pod", stranger.id}},
			"not started":        {waiting.id, codes.FailedPrecondition, []string{"target", "not running", waiting.id}},
			"exited":             {gone.id, codes.FailedPrecondition, []string{"target", "not running", gone.id}},
			"the pod, not a one": {p.id, codes.NotFound, []string{"target"}},
		} {
			t.Run(name, func(t *testing.T) {
				_, err := p.on(t).tryCreate([]string{"sleep"}, debugging(c.target))
				wantCode(t, err, c.code, c.say...)
			})
		}
	})
}

// Between its creation and its start the target may end: the debugger must not run elsewhere then.
func TestTargetThatGoesBeforeTheStart(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	app := p.run([]string{"sleep"})
	one, two := p.create([]string{"sleep"}, debugging(app.id)), p.create([]string{"sleep"}, debugging(app.id))
	app.stop(0)
	err := w.rt.StartContainer(t.Context(), one.id)
	if err == nil || !strings.Contains(err.Error(), "target container "+app.id+" is not running any more") {
		t.Errorf("got %v, want an error that says what is gone", err)
	}
	if st := one.status(); st.State != exited || st.Reason != "StartError" || st.ExitCode != 128 {
		t.Errorf("got %v, want it exited with StartError", st)
	}
	app.remove()
	if err := w.rt.StartContainer(t.Context(), two.id); err == nil {
		t.Error("it could be started after its target was removed")
	}
	if st := two.status(); st.State != exited {
		t.Errorf("got %v, want it exited", st.State)
	}
	if one.remove(); p.status().State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("the pod is not ready any more")
	}
}

func TestTargetThatEndsAndComesAgain(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	app := p.run([]string{"sleep"})
	debug := p.run([]string{"ignore"}, debugging(app.id))
	debug.says("ready")
	// The target's first process is PID 1 of the namespace: all in it die with it (pid_namespaces(7)).
	app.stop(0)
	if st := debug.wait(); st.ExitCode != 137 {
		t.Errorf("the debugger of a target that ended: got %v, want it killed", st)
	}
	// The kubelet's next attempt.
	again := p.run([]string{"args", "again", ",", "sleep"}, func(c *runtimeapi.ContainerConfig) { c.Metadata.Name, c.Metadata.Attempt = app.cfg.Metadata.Name, 1 })
	again.says("again")
	second := p.run([]string{"sleep"}, debugging(again.id))
	if got := second.exec("ps"); !strings.HasPrefix(got, "1 0 /payload args again , sleep\n") {
		t.Errorf("got %q, want the new target's processes", got)
	}
}

func TestTargetsOfEveryKind(t *testing.T) {
	need(t)
	w := own(t)
	shared, sharedContainer := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = nsPod })
	host, hostContainer := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = nsNode })
	for name, c := range map[string]struct {
		pod       []editPod
		container []editContainer
	}{
		"own": {}, "of the pod": {[]editPod{shared}, []editContainer{sharedContainer}}, "of the host": {[]editPod{host}, []editContainer{hostContainer}},
	} {
		t.Run(name, func(t *testing.T) {
			p := w.pod(t, c.pod...)
			app := p.run([]string{"args", "app", ",", "sleep"}, c.container...)
			app.says("app")
			debug := p.run([]string{"sleep"}, debugging(app.id))
			chained := p.run([]string{"sleep"}, debugging(debug.id)) // what the target shares
			want := namespaces(t, app.anyPID())["pid"]
			for _, d := range []*container{debug, chained} {
				if got := namespaces(t, d.anyPID())["pid"]; got != want {
					t.Errorf("got PID namespace %s, want the target's %s", got, want)
				}
				if got := d.exec("ps"); !strings.Contains(got, "/payload args app , sleep\n") {
					t.Errorf("got %q, want the target's processes", got)
				}
			}
			if name != "own" {
				return
			}
			// Another crispd knows what the first one's containers share.
			w.crash(t)
			w.again(t)
			later := p.run([]string{"sleep"}, debugging(app.id))
			if got := namespaces(t, later.anyPID())["pid"]; got != want {
				t.Errorf("after a restart: got PID namespace %s, want the target's %s", got, want)
			}
		})
	}
}

// PID 1 of a pod's processes takes in orphans and buries them.
func TestSharedProcessesAreReaped(t *testing.T) {
	w := need(t)
	podOptions, containerOptions := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = nsPod })
	p := w.pod(t, podOptions)
	c := p.run([]string{"sleep"}, containerOptions)
	var orphans []string
	for range 3 {
		orphans = append(orphans, strings.TrimSpace(c.exec("fork", "1"))) // its parent ends
	}
	line := func(pid string) string {
		for l := range strings.Lines(c.exec("ps")) {
			if strings.HasPrefix(l, pid+" ") {
				return l
			}
		}
		return ""
	}
	for _, pid := range orphans {
		if got := line(pid); got != pid+" 1 /proc/self/exe sleep\n" {
			t.Errorf("orphan %s: got %q, want it to be PID 1's child", pid, got)
		}
		c.exec("kill", pid, "9")
		eventually(t, "the orphan is gone, not a zombie", func() bool { return line(pid) == "" })
	}
}
