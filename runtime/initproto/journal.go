package initproto

import (
	"bytes"
	"strconv"
	"strings"
)

// The exit journal is a file that only grows: one line per exit,
//
//	exit <container id> <wait status> <ns since the epoch>\n
//
// written with one write(2) by the pod init before it tells anybody. The daemon
// opened it (O_APPEND), so an unprivileged pod init can write it, and any later daemon
// reads it. It lies on the run root: after a reboot it is gone, like the containers.

// JournalLine returns the line for x.
func JournalLine(x *Exited) []byte {
	b := make([]byte, 0, 128)
	b = append(b, "exit "...)
	b = append(b, x.ContainerID...)
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(x.Status), 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, x.At, 10)
	return append(b, '\n')
}

// ParseJournal returns the exits of a journal. A line that is not whole (the
// last one, if the machine stopped in the middle) or not understood is left out.
func ParseJournal(b []byte) []Exited {
	var l []Exited
	for {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			return l
		}
		b = rest
		f := strings.Split(string(line), " ")
		if len(f) != 4 || f[0] != "exit" || f[1] == "" {
			continue
		}
		status, err1 := strconv.ParseUint(f[2], 10, 32)
		at, err2 := strconv.ParseInt(f[3], 10, 64)
		if err1 == nil && err2 == nil {
			l = append(l, Exited{ContainerID: f[1], Status: uint32(status), At: at})
		}
	}
}
