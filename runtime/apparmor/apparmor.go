// Package apparmor knows which AppArmor profiles the kernel has, and loads crisp's own.
//
// A profile is applied by crisp-init, which names it to the kernel just before it
// executes a container's program; see runtime/initproto, Process.AppArmor. Here is what
// comes before: a profile that is not loaded is found out while a container is
// created, and the default one ([Default], profile.txt) is loaded by
// apparmor_parser(8), the only compiler of profiles there is.
package apparmor

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// Default is the profile of containers that name none, or RuntimeDefault.
const Default = "crisp-default"

// ErrNotLoaded is returned for a profile that the kernel does not have.
var ErrNotLoaded = errors.New("AppArmor profile is not loaded")

//go:embed profile.txt
var profile string

// Limits of ours.
const (
	maxList   = 16 << 20         // bytes of the kernel's list: a profile has some dozen, and a node some hundred profiles
	loadLimit = 30 * time.Second // apparmor_parser takes some 0.1 s
)

// Policy is this kernel's AppArmor. Safe for concurrent use.
type Policy struct {
	list   string // the kernel's list of profiles
	label  string // our own label
	parser func(ctx context.Context, text string) error

	mu      sync.Mutex // held while the default profile is loaded: those who need it wait
	problem error      // of the last attempt to load it
}

// Enabled says whether the running kernel enforces AppArmor policies.
func Enabled() bool {
	data, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && bytes.HasPrefix(data, []byte("Y"))
}

// New is the policy of a kernel for which Enabled holds.
func New() *Policy {
	return &Policy{
		list: "/sys/kernel/security/apparmor/profiles", label: ownLabel(), parser: parse,
	}
}

// ownLabel is "" for an unconfined process.
func ownLabel() string {
	for _, file := range []string{"/proc/self/attr/apparmor/current", "/proc/self/attr/current"} {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		name, _, _ := strings.Cut(strings.TrimRight(string(data), "\x00\n"), " (")
		if name == "unconfined" {
			return ""
		}
		return name
	}
	return ""
}

// Has says whether the kernel has a profile of that name.
func (p *Policy) Has(name string) (bool, error) {
	f, err := os.Open(p.list)
	if errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("cannot read the list of AppArmor profiles (is securityfs mounted at /sys/kernel/security?): %w", err)
	}
	if err != nil {
		return false, fmt.Errorf("cannot read the list of AppArmor profiles: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxList))
	if err != nil {
		return false, fmt.Errorf("cannot read the list of AppArmor profiles: %w", err)
	}
	return listed(string(data), name), nil
}

// listed looks for a profile in the kernel's list: a line "name (mode)" for each.
func listed(list, name string) bool {
	for line := range strings.Lines(list) {
		line = strings.TrimSuffix(line, "\n")
		if i := strings.LastIndex(line, " ("); i > 0 && line[:i] == name {
			return true
		}
	}
	return false
}

// Load loads the default profile, also if there is one of that name: it may be of an older crispd.
//
// Needs: CAP_MAC_ADMIN, apparmor_parser. Undo: apparmor_parser --remove; crispd leaves it, for containers outlive crispd.
func (p *Policy) Load(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.loadLocked(ctx)
}

func (p *Policy) loadLocked(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loadLimit)
	defer cancel()
	p.problem = p.parser(ctx, p.text())
	if p.problem != nil {
		p.problem = fmt.Errorf("cannot load AppArmor profile %s: %w", Default, p.problem)
	}
	return p.problem
}

// text is the profile for a daemon with our label: confined, it must be allowed to signal its containers.
func (p *Policy) text() string {
	daemon := ""
	if p.label != "" {
		daemon = fmt.Sprintf("  signal (receive) peer=%q,\n", p.label)
	}
	return strings.Replace(profile, "@DAEMON@", daemon, 1)
}

// Ensure makes sure that the default profile is loaded: an administrator may have removed it since Load.
func (p *Policy) Ensure(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	has, err := p.Has(Default)
	if has || err != nil {
		return err
	}
	return p.loadLocked(ctx)
}

// Problem is why the default profile could not be loaded; nil if it could.
func (p *Policy) Problem() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.problem
}

// Parser is the path of apparmor_parser.
func Parser() (string, error) {
	for _, name := range []string{"apparmor_parser", "/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"} { // not in everybody's PATH
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("there is no apparmor_parser (Debian package apparmor)")
}

// parse runs apparmor_parser. Its cache is of no use: the text is in this binary.
func parse(ctx context.Context, text string) error {
	program, err := Parser()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "--replace", "--skip-cache")
	cmd.Stdin = strings.NewReader(text)
	cmd.Dir = "/"
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		const most = 1 << 10
		said := out.Bytes()
		return fmt.Errorf("%s: %w: %s", program, err, bytes.TrimSpace(said[max(0, len(said)-most):]))
	}
	return nil
}
