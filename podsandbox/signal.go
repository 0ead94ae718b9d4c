package podsandbox

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// glibc's and musl's SIGRTMIN and SIGRTMAX: the kernel's begin at 32, the first two are the C library's own, signal(7).
const (
	sigRTMin = 34
	sigRTMax = 64
)

// aliases are names that unix.SignalNum does not know.
var aliases = map[string]unix.Signal{"SIGIOT": unix.SIGABRT, "SIGCLD": unix.SIGCHLD, "SIGPOLL": unix.SIGIO}

// ParseSignal reads a stop signal: a name with or without SIG ("SIGTERM", "term"), a number (1–64), "SIGRTMIN+3", "SIGRTMAX-1", or
// CRI's spelling of these, SIGRTMINPLUS3 and SIGRTMAXMINUS1 (api.proto, enum Signal). "" is SIGTERM. Errors are ErrInvalid.
func ParseSignal(s string) (unix.Signal, error) {
	if s == "" {
		return unix.SIGTERM, nil
	}
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, fmt.Errorf("%w: signal number %d is not between 1 and %d", ErrInvalid, n, sigRTMax)
		}
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig, ok := realtime(name); ok {
		return sig, nil
	}
	if sig, ok := aliases[name]; ok {
		return sig, nil
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	return 0, fmt.Errorf("%w: unknown signal %q", ErrInvalid, s)
}

func realtime(name string) (unix.Signal, bool) {
	for _, form := range []struct {
		prefix     string
		base, sign int
	}{
		{"SIGRTMINPLUS", sigRTMin, 1}, {"SIGRTMIN+", sigRTMin, 1}, {"SIGRTMAXMINUS", sigRTMax, -1}, {"SIGRTMAX-", sigRTMax, -1},
	} {
		digits, ok := strings.CutPrefix(name, form.prefix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 8)
		sig := form.base + form.sign*int(n)
		return unix.Signal(sig), err == nil && sig >= sigRTMin && sig <= sigRTMax
	}
	switch name {
	case "SIGRTMIN":
		return sigRTMin, true
	case "SIGRTMAX":
		return sigRTMax, true
	}
	return 0, false
}
