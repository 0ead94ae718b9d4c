package check

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// helperName is argv[0] of the child processes that some probes clone to see
// whether a child can be born in a cgroup or a user namespace.
const helperName = "crispd-check-helper"

// RunHelper must be called first thing in main. In a child that a probe
// started it waits for its stdin to be closed, and exits; in any other process
// it returns at once.
func RunHelper() {
	if os.Args[0] != helperName {
		return
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // an error ends the wait just as well
	os.Exit(0)
}

// helper is a child that lives until it is ended.
type helper struct {
	process *os.Process
	stdin   *os.File
}

func startHelper(attr *syscall.SysProcAttr) (*helper, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{helperName}, &os.ProcAttr{Files: []*os.File{r}, Sys: attr})
	if err != nil {
		w.Close()
		return nil, err
	}
	return &helper{process: p, stdin: w}, nil
}

// end lets the child exit and reaps it.
func (h *helper) end() error {
	h.stdin.Close()
	state, err := h.process.Wait()
	if err == nil && !state.Success() {
		err = fmt.Errorf("child: %s", state)
	}
	return err
}
