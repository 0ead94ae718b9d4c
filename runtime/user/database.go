package user

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/sys"
)

const (
	// maxFile is how much of /etc/passwd and /etc/group is read at most (containerd's limit too).
	maxFile = 10 << 20
	// maxLine bounds one line, and with it memory: a group may list many members.
	maxLine = 1 << 20
)

// entry is a line of passwd(5).
type entry struct {
	name     string
	uid, gid uint32
	home     string
}

// findUser looks for the first line that means want. found is false without one, or without the file.
func findUser(root *os.File, want id) (e entry, found bool, err error) {
	err = lines(root, "etc/passwd", func(line string) (more bool, err error) {
		e, found, err = matchUser(line, want)
		return !found, err
	})
	return e, found, err
}

// matchUser reads a line name:password:UID:GID:GECOS:directory:shell. A line that
// cannot be read is no user, unless it is the one asked for by name: then it is an error.
func matchUser(line string, want id) (entry, bool, error) {
	var f [6]string
	if split(line, f[:]) < 4 {
		return entry{}, false, nil
	}
	if want.name != "" && f[0] != want.name {
		return entry{}, false, nil
	}
	uid, uidErr := fileNumber(f[2])
	if want.name == "" && (uidErr != nil || uid != want.number) {
		return entry{}, false, nil
	}
	gid, gidErr := fileNumber(f[3])
	if err := errors.Join(uidErr, gidErr); err != nil {
		return entry{}, false, fmt.Errorf("/etc/passwd: user %.64q: %w", f[0], err)
	}
	e := entry{name: f[0], uid: uid, gid: gid, home: f[5]}
	if strings.IndexByte(e.home, 0) >= 0 {
		e.home = "" // it becomes an environment variable
	}
	return e, true, nil
}

// findGroups looks for the gid of want (if it is a name) and for the groups that list member ("": of nobody).
func findGroups(root *os.File, want *id, member string) (gid *uint32, of []uint32, err error) {
	err = lines(root, "etc/group", func(line string) (more bool, err error) {
		var f [4]string // name:password:GID:members
		if split(line, f[:]) < 3 {
			return true, nil
		}
		named := want != nil && want.name != "" && gid == nil && f[0] == want.name
		in := member != "" && lists(f[3], member)
		if !named && !in {
			return true, nil
		}
		n, err := fileNumber(f[2])
		if err != nil {
			return false, fmt.Errorf("/etc/group: group %.64q: %w", f[0], err)
		}
		if named {
			gid = &n
		}
		if in {
			if of = append(of, n); len(of) > maxGroups {
				return false, fmt.Errorf("%w: /etc/group: %.64q is in more than %d groups", ErrFile, member, maxGroups)
			}
		}
		return true, nil
	})
	return gid, of, err
}

// lists says whether a comma-separated list has name.
func lists(members, name string) bool {
	for m := range strings.SplitSeq(members, ",") {
		if m == name {
			return true
		}
	}
	return false
}

// fileNumber is parseNumber for the files, where zeros in front are usual enough.
func fileNumber(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%w: %.40q is not a number from 0 to %d", ErrFile, s, MaxID)
	}
	return uint32(n), nil
}

// split cuts a line at its colons into fields, and says how many there were of those asked for.
func split(line string, fields []string) int {
	for i := range fields {
		var more bool
		if fields[i], line, more = strings.Cut(line, ":"); !more {
			return i + 1
		}
	}
	return len(fields)
}

// lines calls f for each line of a file below root that is neither empty nor a comment, until f says no more.
// A file that is not there has none.
func lines(root *os.File, path string, f func(string) (more bool, err error)) error {
	file, err := open(root, path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	bounded := &io.LimitedReader{R: file, N: maxFile + 1}
	s := bufio.NewScanner(bounded)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if bounded.N == 0 {
			break
		}
		if line == "" || line[0] == '#' {
			continue
		}
		if more, err := f(line); !more || err != nil {
			return err
		}
	}
	switch {
	case bounded.N == 0:
		return fmt.Errorf("%w: /%s: more than %d bytes", ErrFile, path, maxFile)
	case s.Err() != nil:
		return fmt.Errorf("%w: /%s: %w", ErrFile, path, s.Err())
	}
	return nil
}

// open opens a regular file for reading. The file is found with O_PATH first, because opening a device or
// a FIFO does something.
func open(root *os.File, path string) (*os.File, error) {
	conn, err := root.SyscallConn()
	if err != nil {
		return nil, err
	}
	found := -1
	if cerr := conn.Control(func(fd uintptr) { found, err = sys.OpenInRoot(int(fd), path, unix.O_PATH, sys.FollowInRoot) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(found) // O_PATH
	var st unix.Stat_t
	if err := unix.Fstat(found, &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: "/" + path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: /%s is not a regular file", ErrFile, path)
	}
	if st.Size > maxFile {
		return nil, fmt.Errorf("%w: /%s has %d bytes, more than %d", ErrFile, path, st.Size, maxFile)
	}
	return os.OpenFile("/proc/thread-self/fd/"+strconv.Itoa(found), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
}
