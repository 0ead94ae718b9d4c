package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crisp-cri/crisp/runtime/initproto"
)

// What is written where, on kernels old and new.
func TestLabelsAreWrittenToTheirModule(t *testing.T) {
	for _, tt := range []struct {
		name    string
		files   []string
		process initproto.Process
		want    map[string]string
		err     string
	}{
		{"none", nil, initproto.Process{}, map[string]string{}, ""},
		{"apparmor", []string{"apparmor/exec", "exec"}, initproto.Process{AppArmor: "p q"}, map[string]string{"apparmor/exec": "exec p q", "exec": ""}, ""},
		{"apparmor before 5.8", []string{"exec"}, initproto.Process{AppArmor: "p"}, map[string]string{"exec": "exec p"}, ""},
		{"selinux", []string{"exec", "keycreate"}, initproto.Process{SELinux: "u:r:t:s0"}, map[string]string{"exec": "u:r:t:s0", "keycreate": "u:r:t:s0"}, ""},
		{"both", []string{"apparmor/exec", "selinux/exec", "selinux/keycreate"}, initproto.Process{AppArmor: "p", SELinux: "l"},
			map[string]string{"apparmor/exec": "exec p", "selinux/exec": "l", "selinux/keycreate": "l"}, ""},
		{"no module", nil, initproto.Process{AppArmor: "p"}, map[string]string{}, "apply AppArmor profile p"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range tt.files {
				path := filepath.Join(dir, f)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			l, s := openLabels(dir, &tt.process)
			if s == nil {
				for f := range tt.want { // nothing before its time
					if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || len(b) > 0 {
						t.Errorf("%s has %q, %v before apply", f, b, err)
					}
				}
				s = l.apply()
			}
			if got := ""; s != nil {
				got = s.name
				if tt.err == "" || !strings.Contains(got, tt.err) {
					t.Errorf("got %q: %v", got, s.err)
				}
			} else if tt.err != "" {
				t.Errorf("got no error, want %q", tt.err)
			}
			for f, want := range tt.want {
				if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || string(b) != want {
					t.Errorf("%s has %q, %v; want %q", f, b, err, want)
				}
			}
		})
	}
}
