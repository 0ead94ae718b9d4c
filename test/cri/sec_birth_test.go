package cri

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var long = flag.Bool("long", false, "run the races of TestSEC… for minutes instead of seconds")

// rounds is how often a race is run.
func rounds(n int) int {
	if *long {
		return n * 20
	}
	return n
}

// A container that may trace sees every process that comes into its PID namespace, from its birth: an exec'd one, the first one of
// another container of its pod, one of a container that was sent to debug it. It must never see anything that has more than it has
// itself: a root directory, a descriptor, a capability, a namespace, or less of a filter.
func TestSEC02_NothingIsBornInAContainerWithMoreThanItHas(t *testing.T) {
	w := need(t)
	secret := filepath.Join(t.TempDir(), "canary")
	mustWrite(t, secret, "the host's")
	tracer := withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE", "DAC_READ_SEARCH"}}
	})
	filtered := withSeccomp(runtimeapi.SecurityProfile_RuntimeDefault, "")
	noNewPrivs := withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = true })
	podOptions, shared := withNamespaces(func(o *runtimeapi.NamespaceOption) { o.Pid = nsPod })
	exec := func(t *testing.T, _ *pod, c *container, args ...editContainer) {
		r, err := c.try("true")
		if err != nil || r.ExitCode != 0 {
			t.Fatalf("exec: %v, %v", r, err)
		}
	}
	another := func(t *testing.T, p *pod, _ *container, edits ...editContainer) {
		c := p.on(t).run([]string{"true"}, edits...)
		c.wait()
		c.remove()
	}
	debug := func(t *testing.T, p *pod, c *container, edits ...editContainer) {
		d := p.on(t).run([]string{"true"}, append(edits, withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = runtimeapi.NamespaceMode_TARGET, c.id
		}))...)
		d.wait()
		d.remove()
	}
	tests := []struct {
		name  string
		pod   []editPod
		edits []editContainer
		n     int
		birth func(*testing.T, *pod, *container, ...editContainer)

		foreign bool // it has a root directory of its own, and what belongs to that
	}{
		{"exec", nil, nil, 200, exec, false},
		{"exec, filtered", nil, []editContainer{filtered}, 100, exec, false},
		{"exec, filtered, no_new_privs", nil, []editContainer{filtered, noNewPrivs}, 100, exec, false},
		{"exec in a shared namespace", []editPod{podOptions}, []editContainer{shared, filtered, noNewPrivs}, 100, exec, false},
		{"another container of the pod", []editPod{podOptions}, []editContainer{shared, filtered}, 40, another, true},
		{"a container that joins", nil, []editContainer{filtered}, 40, debug, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := w.pod(t, tt.pod...)
			edits := append([]editContainer{tracer}, tt.edits...)
			c := p.run([]string{"snoop", secret, strconv.Itoa(w.PID)}, edits...)
			c.says("watching")
			for range rounds(tt.n) {
				tt.birth(t, p, c, edits...)
			}
			c.stop(0)
			seen := 0
			for _, line := range strings.Split(strings.TrimSpace(c.output("stdout")), "\n") {
				switch {
				case line == "watching":
				case strings.HasPrefix(line, "saw "):
					seen++
				case tt.foreign && slices.ContainsFunc([]string{"root directory", "mnt namespace", "cgroup namespace"}, func(own string) bool {
					return strings.HasSuffix(line, " has another "+own)
				}):
				default:
					t.Error(line)
				}
			}
			t.Logf("saw %d of %d in the making", seen, rounds(tt.n))
			if errs := c.output("stderr"); errs != "" {
				t.Error(errs)
			}
		})
	}
	if _, err := os.Stat(secret); err != nil {
		t.Error(err)
	}
}

// A profile that lets no process be made is no obstacle to being exec'd with it, if it can be loaded last.
func TestProfilesThatAllowNoFork(t *testing.T) {
	w := need(t)
	profile := filepath.Join(t.TempDir(), "profile.json")
	mustWrite(t, profile, `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["setsid"],"action":"SCMP_ACT_ERRNO","errnoRet":77}]}`)
	noFork := filepath.Join(t.TempDir(), "profile.json")
	mustWrite(t, noFork, `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["fork","vfork","clone3"],"action":"SCMP_ACT_ERRNO"},
		{"names":["clone"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"args":[{"index":0,"value":65536,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}`)
	for _, tt := range []struct {
		name, profile string
		noNewPrivs    bool
		want          string // of the error, "": it runs
	}{
		{"no setsid, no_new_privs", profile, true, ""},
		{"no setsid", profile, false, "start session: setsid: "},
		{"no fork, no_new_privs", noFork, true, ""},
		{"no fork", noFork, false, "clone process: the seccomp profile must allow clone(2), unless no_new_privs is set"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := w.pod(t).run([]string{"sleep"}, withSeccomp(runtimeapi.SecurityProfile_Localhost, tt.profile),
				withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NoNewPrivs = tt.noNewPrivs }))
			r, err := c.try("status")
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want an error with %q", err, tt.want)
				}
				return
			}
			if err != nil || statusField(string(r.Stdout), "Seccomp")[0] != "2" {
				t.Errorf("got %v, %v, want a filtered process", r, err)
			}
		})
	}
}
