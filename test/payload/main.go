// Command payload is what the demo and the tests run in containers: one static
// binary with a verb for each thing a container can be asked to do or to show,
// instead of images with a shell. The image made of it has it at /payload
// (package images).
//
//	payload VERB [ARGUMENT…] [, VERB [ARGUMENT…]]…
//
// Verbs separated by a comma run one after another in the same process; the
// first that fails ends it with exit status 1 and a line on stderr. SIGTERM and
// SIGINT end it with 128 and the signal's number, as a shell would show it.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sort"
	"syscall"
)

// A verb does one thing; args are those up to the next comma.
type verb struct {
	usage string
	run   func(args []string) error
}

// verbs is filled by the files show.go, do.go, talk.go.
var verbs = map[string]verb{}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	args := os.Args[1:]
	if args[0] != "trap" {
		exitOn(syscall.SIGTERM, syscall.SIGINT)
	}
	for len(args) > 0 {
		next := slices.Index(args, ",")
		one := args
		args = nil
		if next >= 0 {
			one, args = one[:next], one[next+1:]
		}
		if len(one) == 0 {
			usage()
		}
		v, ok := verbs[one[0]]
		if !ok {
			usage()
		}
		if err := v.run(one[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "payload: %s: %v\n", one[0], err)
			os.Exit(1)
		}
	}
}

// exitOn makes PID 1 end on a signal, which the kernel would not deliver to it by
// default. When it returns the signals are caught, so that a verb may ignore them.
func exitOn(signals ...os.Signal) {
	got := make(chan os.Signal, 1)
	signal.Notify(got, signals...)
	go func() { os.Exit(128 + int((<-got).(syscall.Signal))) }()
}

func usage() {
	names := make([]string, 0, len(verbs))
	for name := range verbs {
		names = append(names, name)
	}
	sort.Strings(names)
	fmt.Fprintln(os.Stderr, "usage: payload VERB [ARGUMENT…] [, VERB [ARGUMENT…]]…")
	for _, name := range names {
		fmt.Fprintf(os.Stderr, "  %s %s\n", name, verbs[name].usage)
	}
	os.Exit(2)
}

// want checks the number of arguments; most -1: any.
func want(args []string, least, most int) error {
	if len(args) < least || most >= 0 && len(args) > most {
		return fmt.Errorf("wrong number of arguments: %d", len(args))
	}
	return nil
}
