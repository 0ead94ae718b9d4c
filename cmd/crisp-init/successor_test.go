package main

import (
	"runtime"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/seccomp"
)

func TestFilterFirst(t *testing.T) {
	refuse := func(names ...string) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: names, Action: specs.ActErrno}}}
	}
	defaults, err := seccomp.Default(nil, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name     string
		profile  *specs.LinuxSeccomp
		terminal bool
		want     bool
	}{
		{"the default profile", defaults, true, true},
		{"all is allowed", refuse("mount"), true, true},
		{"all is logged", &specs.LinuxSeccomp{DefaultAction: specs.ActLog}, true, true},
		{"no clone", refuse("clone"), false, false},
		{"no setsid", refuse("setsid"), false, false},
		{"no ioctl, no terminal", refuse("ioctl"), false, true},
		{"no ioctl, terminal", refuse("ioctl"), true, false},
		{"only execve", &specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess, Syscalls: []specs.LinuxSyscall{{Names: []string{"execve"}, Action: specs.ActAllow}}}, false, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			program, err := seccomp.Compile(tt.profile)
			if err != nil {
				t.Fatal(err)
			}
			if got := filterFirst(&initproto.Process{Seccomp: program.BPF, Terminal: tt.terminal}); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
