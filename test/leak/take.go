package leak

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Take looks at the machine now. *Needs* root for a daemon that is root's.
func (s Scope) Take() (Snapshot, error) {
	snap := Snapshot{}
	procs, err := s.processes()
	if err != nil {
		return nil, fmt.Errorf("cannot look for leaks: %w", err)
	}
	for _, step := range []struct {
		name string
		take func(Snapshot, []process) error
	}{
		{"mounts", s.mounts}, {"namespaces", s.namespaces}, {"netns pins", s.pins}, {"links", s.links}, {"nft", s.rules},
		{"cgroups", s.cgroups}, {"processes", s.listProcesses}, {"daemon", s.daemon}, {"files", s.files}, {"sysv", sysv}, {"sockets", abstract},
	} {
		if err := step.take(snap, procs); err != nil {
			return nil, fmt.Errorf("cannot look for leaks: %s: %w", step.name, err)
		}
	}
	return snap, nil
}

// process is one process of the scope.
type process struct {
	pid, ppid int
	state     byte
	command   string
}

func (p process) path(name string) string { return filepath.Join("/proc", strconv.Itoa(p.pid), name) }

// parseStat reads proc(5) stat: pid (comm) state ppid …; comm may hold anything, the last ) ends it.
func parseStat(text string) (comm string, state byte, ppid int, ok bool) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return "", 0, 0, false
	}
	fields := strings.Fields(text[end+1:])
	if len(fields) < 2 || len(fields[0]) != 1 {
		return "", 0, 0, false
	}
	ppid, err := strconv.Atoi(fields[1])
	return text[open+1 : end], fields[0][0], ppid, err == nil
}

// processes are the daemon, its descendants, those in a cgroup of the scope and their descendants.
func (s Scope) processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	all := map[int]process{}
	ours := map[int]bool{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // it ended
		}
		comm, state, ppid, ok := parseStat(string(stat))
		if !ok {
			return nil, fmt.Errorf("/proc/%d/stat: cannot read %q", pid, stat)
		}
		p := process{pid: pid, ppid: ppid, state: state, command: comm}
		if line, err := os.ReadFile(p.path("cmdline")); err == nil && len(line) > 0 {
			p.command = strings.TrimSpace(string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
		}
		all[pid] = p
		ours[pid] = pid == s.Daemon && pid != 0 || s.inCgroup(p)
	}
	var found []process
	for pid, p := range all {
		for up := pid; up > 1; up = all[up].ppid {
			if ours[up] {
				found = append(found, p)
				break
			}
		}
	}
	slices.SortFunc(found, func(a, b process) int { return a.pid - b.pid })
	return found, nil
}

func (s Scope) inCgroup(p process) bool {
	text, err := os.ReadFile(p.path("cgroup"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), ":/")
		path = "/" + strings.TrimSuffix(path, " (deleted)")
		if slices.ContainsFunc(s.Cgroups, func(c string) bool { return below(path, c) }) {
			return true
		}
	}
	return false
}

// below says whether path is dir or inside it; both are clean.
func below(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func (s Scope) belowDirs(path string) bool {
	return slices.ContainsFunc(s.Dirs, func(d string) bool { return below(path, d) }) || s.NetNSDir != "" && below(path, s.NetNSDir)
}

func (s Scope) listProcesses(snap Snapshot, procs []process) error {
	for _, p := range procs {
		if p.pid == s.Daemon {
			continue
		}
		command := p.command
		if p.state == 'Z' {
			command += " (zombie)"
		}
		snap.add(Processes, fmt.Sprintf("%d %s", p.pid, command))
	}
	return nil
}

// mountPoint and source of a mountinfo line (proc(5)): fields 4 root, 5 mount
// point, and after the separator type and source.
func parseMount(line string) (root, point, fstype, source string, ok bool) {
	before, after, found := strings.Cut(line, " - ")
	f, g := strings.Fields(before), strings.Fields(after)
	if !found || len(f) < 6 || len(g) < 2 {
		return "", "", "", "", false
	}
	return unescape(f[3]), unescape(f[4]), g[0], unescape(g[1]), true
}

var octal = regexp.MustCompile(`\\[0-7]{3}`)

func unescape(s string) string {
	return octal.ReplaceAllStringFunc(s, func(o string) string {
		n, err := strconv.ParseUint(o[1:], 8, 8)
		if err != nil {
			return o
		}
		return string([]byte{byte(n)})
	})
}

func (s Scope) mounts(snap Snapshot, procs []process) error {
	host, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(host)) {
		root, point, fstype, source, ok := parseMount(line)
		if !ok {
			return fmt.Errorf("mountinfo: cannot read %q", line)
		}
		if s.belowDirs(point) || s.belowDirs(root) || s.belowDirs(source) || strings.Contains(line, "lowerdir=") && slices.ContainsFunc(s.Dirs, func(d string) bool { return strings.Contains(line, d+"/") }) {
			if fstype == "nsfs" {
				root = "a namespace" // its inode is another each time
			}
			snap.add(Mounts, fmt.Sprintf("%s on %s (%s of %s)", fstype, point, root, source))
		}
	}
	// The namespaces of the daemon's threads, except this process's.
	own, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		return err
	}
	seen := map[string]bool{own: true}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", s.Daemon))
	if err != nil {
		return err
	}
	for _, task := range tasks {
		ns, err := os.Readlink(task + "/ns/mnt")
		if err != nil || seen[ns] {
			continue // the thread ended
		}
		seen[ns] = true
		table, err := os.ReadFile(task + "/mountinfo")
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(table)) {
			_, point, fstype, _, ok := parseMount(line)
			if !ok {
				return fmt.Errorf("mountinfo: cannot read %q", line)
			}
			snap.add(DaemonMounts, fmt.Sprintf("%s on %s", fstype, point))
		}
	}
	return nil
}

var nsTypes = []string{"mnt", "net", "pid", "ipc", "uts", "user", "cgroup"}

// namespaces counts those that processes of the scope are in or hold open. Ones
// that only a mount holds are pins.
func (s Scope) namespaces(snap Snapshot, procs []process) error {
	different := map[string]bool{}
	for _, p := range procs {
		for _, ns := range nsTypes {
			if link, err := os.Readlink(p.path("ns/" + ns)); err == nil {
				different[link] = true
			}
		}
		fds, err := os.ReadDir(p.path("fd"))
		if err != nil {
			continue // it ended
		}
		for _, fd := range fds {
			link, err := os.Readlink(p.path("fd/" + fd.Name()))
			if typ, _, is := strings.Cut(link, ":["); err == nil && is && slices.Contains(nsTypes, typ) {
				different[link] = true
			}
		}
	}
	for link := range different {
		typ, _, _ := strings.Cut(link, ":")
		snap.add(Namespaces, "of type "+typ)
	}
	return nil
}

func (s Scope) pins(snap Snapshot, _ []process) error {
	if s.NetNSDir == "" {
		return nil
	}
	entries, err := os.ReadDir(s.NetNSDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		var st unix.Statfs_t
		what := "a plain file"
		if err := unix.Statfs(filepath.Join(s.NetNSDir, e.Name()), &st); err == nil && st.Type == unix.NSFS_MAGIC {
			what = "a namespace"
		}
		snap.add(Pins, fmt.Sprintf("%s (%s)", e.Name(), what))
	}
	return err
}

func (s Scope) links(snap Snapshot, _ []process) error {
	if s.Bridge == "" && len(s.LinkPrefixes) == 0 {
		return nil
	}
	links, err := netlink.LinkList()
	for tries := 0; errors.Is(err, netlink.ErrDumpInterrupted) && tries < 100; tries++ {
		links, err = netlink.LinkList() // somebody else changed a link meanwhile
	}
	if err != nil {
		return err
	}
	bridge := -1
	for _, l := range links {
		if l.Attrs().Name == s.Bridge {
			bridge = l.Attrs().Index
		}
	}
	for _, l := range links {
		a := l.Attrs()
		switch {
		case a.Index == bridge:
			snap.add(Links, "bridge "+a.Name)
		case a.MasterIndex == bridge:
			snap.add(Links, "port "+a.Name)
		case slices.ContainsFunc(s.LinkPrefixes, func(p string) bool { return strings.HasPrefix(a.Name, p) }):
			snap.add(Links, l.Type()+" "+a.Name)
		}
	}
	return nil
}

func (s Scope) rules(snap Snapshot, _ []process) error {
	if len(s.Tables) == 0 {
		return nil
	}
	out, err := exec.Command("nft", "--json", "list", "tables").Output()
	if err != nil {
		return fmt.Errorf("nft list tables: %w", withStderr(err))
	}
	tables, err := parseRuleset(out)
	if err != nil {
		return err
	}
	for _, t := range tables {
		body, is := t["table"].(map[string]any)
		if !is {
			continue
		}
		family, _ := body["family"].(string)
		name, _ := body["name"].(string)
		if !slices.Contains(s.Tables, name) {
			continue
		}
		out, err := exec.Command("nft", "--json", "list", "table", family, name).Output()
		if err != nil {
			return fmt.Errorf("nft list table %s %s: %w", family, name, withStderr(err))
		}
		objects, err := parseRuleset(out)
		if err != nil {
			return err
		}
		for _, o := range objects {
			if _, is := o["metainfo"]; is {
				continue
			}
			text, err := json.Marshal(lasting(o))
			if err != nil {
				return err
			}
			snap.add(Rules, string(text))
		}
	}
	return nil
}

func parseRuleset(out []byte) ([]map[string]any, error) {
	var set struct {
		Nftables []map[string]any `json:"nftables"`
	}
	if err := json.Unmarshal(out, &set); err != nil {
		return nil, fmt.Errorf("nft --json: %w", err)
	}
	return set.Nftables, nil
}

// lasting is v without what changes by itself: handles, counters, time left, and
// elements of sets from which they vanish in time.
func lasting(v any) any {
	switch v := v.(type) {
	case map[string]any:
		if flags, is := v["flags"].([]any); is && slices.Contains(flags, any("timeout")) {
			delete(v, "elem")
		}
		for _, key := range []string{"handle", "packets", "bytes", "expires", "index"} {
			delete(v, key)
		}
		for key := range v {
			v[key] = lasting(v[key])
		}
	case []any:
		for i := range v {
			v[i] = lasting(v[i])
		}
	}
	return v
}

func withStderr(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return err
}

// Hierarchies are where cgroup hierarchies are mounted on this machine.
func Hierarchies() ([]string, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var dirs []string
	scan := bufio.NewScanner(f)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		if _, point, fstype, _, ok := parseMount(scan.Text()); ok && (fstype == "cgroup" || fstype == "cgroup2") {
			dirs = append(dirs, point)
		}
	}
	return dirs, scan.Err()
}

func (s Scope) cgroups(snap Snapshot, _ []process) error {
	trees, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, tree := range trees {
		for _, c := range s.Cgroups {
			err := filepath.WalkDir(tree+c, func(path string, d fs.DirEntry, err error) error {
				if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
					return nil // it is being removed
				}
				if err == nil && d.IsDir() {
					snap.add(Cgroups, path)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// ids are what differs in the names of two files of the same meaning.
var ids = regexp.MustCompile(`[0-9a-f]{12,}|[0-9]+`)

func (s Scope) daemon(snap Snapshot, _ []process) error {
	if s.Daemon == 0 {
		return nil
	}
	dir := fmt.Sprintf("/proc/%d/", s.Daemon)
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		return err
	}
	for _, fd := range fds {
		target, err := os.Readlink(dir + "fd/" + fd.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return err
		}
		snap.add(FDs, ids.ReplaceAllString(target, "N"))
	}
	tasks, err := os.ReadDir(dir + "task")
	for _, task := range tasks {
		call, err := os.ReadFile(dir + "task/" + task.Name() + "/syscall") // proc_pid_syscall(5)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // ended meanwhile
		}
		if err != nil {
			return err
		}
		snap.add(Threads, threadDoes(string(call)))
	}
	return err
}

// threadDoes says what a thread does whose /proc/PID/task/TID/syscall is line. What runs Go's scheduler
// waits in one of a few calls, or is about to.
func threadDoes(line string) string {
	number, _, _ := strings.Cut(strings.TrimSpace(line), " ")
	switch number {
	case "running", "-1", strconv.Itoa(unix.SYS_FUTEX), strconv.Itoa(unix.SYS_EPOLL_PWAIT), strconv.Itoa(unix.SYS_NANOSLEEP):
		return waiting
	}
	return "in system call " + number
}

func (s Scope) files(snap Snapshot, _ []process) error {
	for _, dir := range s.Dirs {
		var device uint64
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			if err != nil {
				return err
			}
			if slices.ContainsFunc(s.Skip, func(skip string) bool { return below(path, skip) }) {
				return skipEntry(d)
			}
			info, err := d.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			st, is := info.Sys().(*syscall.Stat_t)
			if !is {
				return fmt.Errorf("%s: no stat", path)
			}
			switch {
			case path == dir:
				device = st.Dev
			case st.Dev != device:
				return skipEntry(d) // a mount: another kind
			default:
				snap.add(Files, fmt.Sprintf("%s %s", d.Type().String()[:1], path))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func skipEntry(d fs.DirEntry) error {
	if d.IsDir() {
		return fs.SkipDir
	}
	return nil
}

func sysv(snap Snapshot, _ []process) error {
	for _, kind := range []string{"shm", "sem", "msg"} {
		text, err := os.ReadFile("/proc/sysvipc/" + kind)
		if err != nil {
			return err
		}
		for i, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
			if f := strings.Fields(line); i > 0 && len(f) >= 2 {
				snap.add(SysV, fmt.Sprintf("%s key=%s id=%s", kind, f[0], f[1]))
			}
		}
	}
	return nil
}

// abstract finds by inode: /proc/net/unix shows every name of the network
// namespace, and the holder's descriptors say whose it is.
func abstract(snap Snapshot, procs []process) error {
	text, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return err
	}
	names := parseAbstract(string(text))
	for _, p := range procs {
		fds, err := os.ReadDir(p.path("fd"))
		if err != nil {
			continue // it ended
		}
		for _, fd := range fds {
			target, err := os.Readlink(p.path("fd/" + fd.Name()))
			if name, is := names[target]; err == nil && is {
				snap.add(Abstract, fmt.Sprintf("%s of %s", name, p.command))
			}
		}
	}
	return nil
}

// parseAbstract maps "socket:[INODE]" to the name of each abstract socket. The
// columns are Num RefCount Protocol Flags Type St Inode Path.
func parseAbstract(text string) map[string]string {
	names := map[string]string{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) >= 8 && strings.HasPrefix(f[7], "@") {
			names["socket:["+f[6]+"]"] = f[7]
		}
	}
	return names
}
