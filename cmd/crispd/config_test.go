package main

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"

	"github.com/crisp-cri/crisp/cmd/crispd/check"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) {
	check.RunHelper()
	flag.Parse()
	os.Exit(m.Run())
}

// loadWith runs source.load on a file with the given text ("": no file) and flags.
func loadWith(t *testing.T, text string, args ...string) (*Config, error) {
	t.Helper()
	var s source
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	s.addFlags(flags)
	if text != "" {
		file := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", file)
	}
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	if text == "" && !flags.Changed("config") {
		s.file = filepath.Join(t.TempDir(), "absent.toml") // not this machine's
	}
	return s.load()
}

func TestLoad(t *testing.T) {
	for _, c := range []struct {
		name, text string
		args       []string
		want       func(*Config) bool
	}{
		{"defaults", "", nil, func(c *Config) bool { return c.StateRoot == "/var/lib/crisp" && c.Socket == "/run/crisp/crisp.sock" }},
		{"file over defaults", `state_root = "/srv/crisp"`, nil, func(c *Config) bool { return c.StateRoot == "/srv/crisp" && c.RunRoot == "/run/crisp" }},
		{"flag over file", `state_root = "/srv/crisp"`, []string{"--state-root", "/srv/other"}, func(c *Config) bool { return c.StateRoot == "/srv/other" }},
		{"socket follows run root", `run_root = "/run/other"`, nil, func(c *Config) bool { return c.Socket == "/run/other/crisp.sock" }},
		{"duration", "[image]\nstall_timeout = \"90s\"", nil, func(c *Config) bool { return c.Image.StallTimeout == Duration(90*time.Second) }},
		{"size", "[image]\nmax_image_size = \"3GiB\"", nil, func(c *Config) bool { return c.Image.MaxImageSize == 3<<30 }},
		{"lists replace", "[runtime]\ndefault_capabilities = [\"CAP_KILL\"]", nil, func(c *Config) bool {
			return len(c.Runtime.DefaultCapabilities) == 1 && c.Runtime.DefaultCapabilities[0] == "CAP_KILL"
		}},
		{"empty list replaces", "[network]\nmasquerade_except = []\n[image]\npinned = []", nil, func(c *Config) bool { return len(c.Image.Pinned) == 0 }},
		{"network mode", "[network]\nmode = \"cni\"", nil, func(c *Config) bool { return c.Network.Mode == "cni" && len(c.Network.CNIBinDirs) == 2 }},
		{"handlers", "[runtime]\nhandlers = [\"crisp\"]", nil, func(c *Config) bool { return len(c.Runtime.Handlers) == 1 }},
		{"sysctls are added", "[runtime.default_sysctls]\n\"kernel.shm_rmid_forced\" = \"1\"", nil, func(c *Config) bool { return len(c.Runtime.DefaultSysctls) == 3 }},
		{"set a list", "", []string{"--set", `network.subnets=["10.9.0.0/24"]`}, func(c *Config) bool {
			return len(c.Network.Subnets) == 1 && c.Network.Subnets[0].String() == "10.9.0.0/24"
		}},
		{"set a bare string", "", []string{"--set", "network.bridge=crisp9"}, func(c *Config) bool { return c.Network.Bridge == "crisp9" }},
		{"set a number", "", []string{"--set", "network.mtu=1400"}, func(c *Config) bool { return c.Network.MTU == 1400 }},
		{"set over file", "[network]\nbridge = \"a\"", []string{"--set", "network.bridge=b"}, func(c *Config) bool { return c.Network.Bridge == "b" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, err := loadWith(t, c.text, c.args...)
			if err != nil {
				t.Fatal(err)
			}
			if !c.want(cfg) {
				t.Errorf("got %+v", cfg)
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	for _, c := range []struct {
		name, text string
		args       []string
		want       []string // all in the error's text
	}{
		{"unknown key", "log_level = 3\n\n[network]\nbrigde = \"x\"", nil, []string{`unknown key "network.brigde"`, "line 4"}},
		{"two unknown keys", "a = 1\nb = 2", nil, []string{`line 1: unknown key "a"`, `line 2: unknown key "b"`}},
		{"unknown table", "[nework]\nmtu = 1", nil, []string{`"nework`, "line 1"}},
		{"wrong type", "[network]\nmtu = \"big\"", nil, []string{"line 2", "mtu"}},
		{"not TOML", "state_root = /srv", nil, []string{"line 1"}},
		{"duration", "drain_timeout = \"soon\"", nil, []string{"line 1", "soon"}},
		{"size", "[image]\nmax_image_size = \"3GB\"", nil, []string{"line 2", "512MiB"}},
		{"relative path", `state_root = "var"`, nil, []string{`state_root = "var"`, "absolute"}},
		{"unclean path", `run_root = "/run/../run"`, nil, []string{"run_root"}},
		{"roots overlap", `run_root = "/var/lib/crisp/run"`, nil, []string{"run_root", "neither state_root"}},
		{"socket too long", `socket = "/` + strings.Repeat("a", 107) + `"`, nil, []string{"socket", "107"}},
		{"cgroup driver", "[cgroup]\ndriver = \"magic\"", nil, []string{`cgroup.driver = "magic"`}},
		{"network mode", "[network]\nmode = \"magic\"", nil, []string{`network.mode = "magic"`}},
		{"CNI directory", "[network]\ncni_conf_dir = \"net.d\"", nil, []string{`network.cni_conf_dir = "net.d"`, "absolute"}},
		{"CNI plugins", "[network]\ncni_bin_dirs = [\"/opt/cni:/bin\"]", nil, []string{`network.cni_bin_dirs = "/opt/cni:/bin"`}},
		{"no CNI plugins", "[network]\ncni_bin_dirs = []", nil, []string{"network.cni_bin_dirs", "at least one"}},
		{"link name", "[network]\nbridge = \"a-name-of-16-byt\"", nil, []string{"network.bridge", "15"}},
		{"host bits", "[network]\nsubnets = [\"10.1.2.3/24\"]", nil, []string{"network.subnets", "10.1.2.0/24"}},
		{"no subnet", "[network]\nsubnets = []", nil, []string{"network.subnets"}},
		{"two of a family", "[network]\nsubnets = [\"10.1.0.0/24\", \"10.2.0.0/24\"]", nil, []string{"network.subnets", "one of IPv6"}},
		{"subnet too small", "[network]\nsubnets = [\"10.1.0.0/31\"]", nil, []string{"network.subnets", "/30"}},
		{"mtu", "[network]\nmtu = 100", nil, []string{"network.mtu = 100"}},
		{"parallel layers", "[image]\nparallel_layers = 0", nil, []string{"image.parallel_layers = 0"}},
		{"limit", "[image]\nmax_layers = 0", nil, []string{"image.max_layers = 0"}},
		{"too many layers", "[image]\nmax_layers = 501", nil, []string{"image.max_layers = 501", "500"}},
		{"capability", "[runtime]\ndefault_capabilities = [\"chown\"]", nil, []string{`runtime.default_capabilities = "chown"`}},
		{"no capability", "[runtime]\ndefault_capabilities = []", nil, []string{"runtime.default_capabilities", "ALL"}},
		{"handler", "[runtime]\nhandlers = [\"A B\"]", nil, []string{"runtime.handlers"}},
		{"seccomp", "[runtime]\nunset_seccomp_profile = \"None\"", nil, []string{"runtime.unset_seccomp_profile"}},
		{"sysctl with slashes", "[runtime.default_sysctls]\n\"net/ipv4/ip_forward\" = \"1\"", nil, []string{"runtime.default_sysctls"}},
		{"sysctl", "[runtime.default_sysctls]\n\"../x\" = \"1\"", nil, []string{"runtime.default_sysctls"}},
		{"several at once", "log_level = 99\n[network]\nmtu = 1", nil, []string{"log_level = 99", "network.mtu = 1"}},
		{"explicit file absent", "", []string{"--config", "/nonexistent/crisp.toml"}, []string{"/nonexistent/crisp.toml"}},
		{"set without value", "", []string{"--set", "network.mtu"}, []string{"--set network.mtu", "key=value"}},
		{"set unknown key", "", []string{"--set", "network.mtus=1"}, []string{"network.mtus"}},
		{"set two lines", "", []string{"--set", "network.bridge=x\nlog_level=9"}, []string{"network.bridge"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := loadWith(t, c.text, c.args...)
			if err == nil {
				t.Fatal("got no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("got %q, want %q in it", err, w)
				}
			}
		})
	}
}

// What `crispd config` prints must be a configuration that means the same.
func TestPrintReadsBack(t *testing.T) {
	cfg, err := loadWith(t, "", "--set", "network.mtu=1400", "--set", "drain_timeout=1m30s", "--set", "image.max_image_size=1536MiB")
	if err != nil {
		t.Fatal(err)
	}
	var printed bytes.Buffer
	if err := cfg.Print(&printed); err != nil {
		t.Fatal(err)
	}
	again, err := loadWith(t, printed.String())
	if err != nil {
		t.Fatalf("%v\n%s", err, printed.String())
	}
	if diff := cmp.Diff(cfg, again, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("read back differs (-printed +read):\n%s", diff)
	}
}

func TestPrintGolden(t *testing.T) {
	cfg := Defaults()
	cfg.derive()
	cfg.Runtime.InitPath = "/usr/local/bin/crisp-init"
	var got bytes.Buffer
	if err := cfg.Print(&got); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "config.toml")
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("differs from %s (-want +got); -update rewrites it:\n%s", golden, diff)
	}
}

func FuzzDecode(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "config.toml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(golden))
	f.Add("a = 1")
	f.Add("[network]\nsubnets = [\"10.1.0.0/16\"]")
	f.Add("[image]\nmax_image_size = \"9223372036854775807B\"")
	f.Fuzz(func(t *testing.T, text string) {
		cfg := Defaults()
		if cfg.decode([]byte(text)) != nil {
			return
		}
		cfg.derive()
		if cfg.Validate() != nil {
			return
		}
		if err := cfg.Print(&bytes.Buffer{}); err != nil {
			t.Errorf("a valid configuration cannot be printed: %v", err)
		}
	})
}
