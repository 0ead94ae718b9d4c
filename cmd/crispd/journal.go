package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Priorities of syslog(3), as systemd reads them before a line (sd-daemon(3), SD_ERR and the like).
const (
	journalError   = "<3>"
	journalWarning = "<4>"
	journalInfo    = "<6>"
)

// isJournal reports whether f is what systemd connected to its journal: $JOURNAL_STREAM has its device and
// inode (systemd.exec(5)).
func isJournal(f *os.File, stream string) bool {
	var st unix.Stat_t
	if stream == "" || unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// setLogging is klog's -v, and where it writes: to stderr, and when that is the journal, without the time, process and severity that
// the journal has by itself, but with the priority that it understands.
func setLogging(level int) {
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	set := func(name, value string) { _ = flags.Set(name, value) } // fails for what is no value of it only
	set("v", strconv.Itoa(level))
	if !isJournal(os.Stderr, os.Getenv("JOURNAL_STREAM")) {
		return
	}
	set("skip_headers", "true")
	set("logtostderr", "false")
	set("one_output", "true")       // each line once, not in the logs of the lesser severities too
	set("stderrthreshold", "FATAL") // nor on stderr as well
	for severity, priority := range map[string]string{"INFO": journalInfo, "WARNING": journalWarning, "ERROR": journalError, "FATAL": journalError} {
		klog.SetOutputBySeverity(severity, &prefixed{os.Stderr, priority})
	}
}

// prefixed writes text with prefix before each of its lines, in one write. A message of klog may have several.
type prefixed struct {
	w      io.Writer
	prefix string
}

func (p *prefixed) Write(text []byte) (int, error) {
	var b bytes.Buffer
	for line := range bytes.Lines(text) {
		b.WriteString(p.prefix)
		b.Write(line)
	}
	if _, err := p.w.Write(b.Bytes()); err != nil {
		return 0, err
	}
	return len(text), nil
}
