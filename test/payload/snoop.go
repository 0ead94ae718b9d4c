package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func init() {
	verbs["snoop"] = verb{"FILE PID (for ever: look at each new process; prints what one has that we have not, and FILE if it is seen in the root of the host's process PID)", snoop}
}

// snoop looks at every process that comes into its PID namespace, as early and as often as it can, and prints each thing that one
// has and this process has not: what CAP_SYS_PTRACE could take from it. "saw N" says how many runtime's processes it has seen.
func snoop(args []string) error {
	if err := want(args, 2, 2); err != nil {
		return err
	}
	s := snooper{file: args[0], hostPID: args[1], said: map[string]bool{}}
	own, err := look("self")
	if err != nil {
		return err
	}
	s.own = own
	fmt.Println("watching")
	next, misses := os.Getpid()+1, 0
	for {
		// Pids are given one after another: the next process will be one of the next few.
		found := false
		for pid := next; pid < next+8; pid++ {
			name := strconv.Itoa(pid)
			for first := true; ; first = false { // as long as it is the runtime's
				if !s.examine(name, first) {
					break
				}
			}
			if _, err := os.Lstat("/proc/" + name); err == nil {
				found = true
				next = pid + 1
				break
			}
		}
		if misses++; found {
			misses = 0
		}
		if misses > 200 { // gone by before we looked
			misses = 0
			dirs, _ := filepath.Glob("/proc/[0-9]*")
			for _, d := range dirs {
				pid, _ := strconv.Atoi(filepath.Base(d))
				next = max(next, pid+1)
			}
		}
	}
}

type snooper struct {
	file, hostPID string
	own           *looks
	said          map[string]bool
	seen          int
}

func (s *snooper) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	if !s.said[line] {
		s.said[line] = true
		fmt.Println(line)
	}
}

// looks are what /proc tells of a process.
type looks struct {
	exe            string
	dev, ino       uint64 // of the root directory
	caps           uint64 // permitted and effective
	seccomp, noNew string
	bounding       uint64
	files          []string
	rootOK, capsOK bool
	namespace      map[string]string
}

func look(pid string) (*looks, error) {
	dir := "/proc/" + pid
	l := &looks{namespace: map[string]string{}}
	var err error
	if l.exe, err = os.Readlink(dir + "/exe"); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if unix.Stat(dir+"/root/", &st) == nil {
		l.dev, l.ino, l.rootOK = st.Dev, st.Ino, true
	}
	for _, ns := range []string{"mnt", "net", "ipc", "uts", "cgroup", "user", "pid", "pid_for_children"} {
		if to, err := os.Readlink(dir + "/ns/" + ns); err == nil {
			l.namespace[ns] = to
		}
	}
	if b, err := os.ReadFile(dir + "/status"); err == nil {
		for line := range bytes.Lines(b) {
			name, value, _ := strings.Cut(strings.TrimSpace(string(line)), ":\t")
			switch name {
			case "CapPrm", "CapEff":
				n, _ := strconv.ParseUint(value, 16, 64)
				l.caps |= n
				l.capsOK = true
			case "CapBnd":
				l.bounding, _ = strconv.ParseUint(value, 16, 64)
			case "Seccomp":
				l.seccomp = value
			case "NoNewPrivs":
				l.noNew = value
			}
		}
	}
	if fds, err := os.ReadDir(dir + "/fd"); err == nil {
		for _, fd := range fds {
			if to, err := os.Readlink(dir + "/fd/" + fd.Name()); err == nil {
				l.files = append(l.files, fd.Name()+" "+to)
			}
		}
	}
	return l, nil
}

// examine says whether pid was the runtime's before and after we looked: then what we saw was so while it was.
func (s *snooper) examine(pid string, first bool) bool {
	l, err := look(pid)
	if err != nil {
		return false
	}
	if b, err := os.ReadFile("/proc/" + pid + "/root/proc/" + s.hostPID + "/root" + s.file); err == nil {
		s.say("reached the host: %s", b)
	}
	if l.rootOK && (l.dev != s.own.dev || l.ino != s.own.ino) {
		s.say("%s has another root directory", filepath.Base(l.exe))
	}
	if l.capsOK && l.caps&^s.own.bounding != 0 {
		s.say("%s has more capabilities: %x", filepath.Base(l.exe), l.caps)
	}
	if l.capsOK && (l.seccomp != s.own.seccomp || l.noNew != s.own.noNew) {
		s.say("%s has seccomp %s and no_new_privs %s", filepath.Base(l.exe), l.seccomp, l.noNew)
	}
	for ns, to := range l.namespace {
		if to != s.own.namespace[ns] {
			s.say("%s has another %s namespace", filepath.Base(l.exe), ns)
		}
	}
	if exe, err := os.Readlink("/proc/" + pid + "/exe"); err != nil || exe != l.exe || !strings.HasPrefix(exe, "/memfd:") {
		return false
	}
	if maps, err := os.ReadFile("/proc/" + pid + "/maps"); err == nil && bytes.Contains(maps, []byte("/memfd:pid")) {
		s.say("it shares memory with its pod's init")
	}
	for _, f := range l.files {
		fd, to, _ := strings.Cut(f, " ")
		if n, _ := strconv.Atoi(fd); n > 4 || strings.HasPrefix(to, "socket:") {
			s.say("it has descriptor %s, %s", fd, to)
		}
	}
	if first {
		s.seen++
		fmt.Println("saw", s.seen)
	}
	return true
}
