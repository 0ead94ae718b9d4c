// Command gotest runs go test, prints its closing lines and every failure, and
// fails when a test was skipped that is not expected to be.
//
//	gotest [-expect FILE] [-C DIR] -- ARGUMENTS OF go test
//
// A skip is silent by nature: a test that has skipped for months looks like one
// that passes. So each line of FILE allows one, and says why:
//
//	WHEN PACKAGE TEST REASON…
//
// WHEN is "user" (a run without root), "v2" (a host with cgroup v2 alone),
// "guest" (hack/guest, with its older kernel) or "always"; PACKAGE is the import path
// below the module; TEST is a name as go test prints it, or "*".
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

const module = "github.com/crisp-cri/crisp"

func main() {
	expectFile := flag.String("expect", "", "file that lists the skips to expect; none: skips are only counted")
	dir := flag.String("C", "", "directory to run in: another module's")
	flag.Parse()

	expected, err := readExpected(*expectFile, here())
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(2)
	}
	cmd := exec.Command("go", append([]string{"test", "-json"}, flag.Args()...)...)
	cmd.Dir = *dir
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest: cannot run go test:", err)
		os.Exit(2)
	}
	sum := summarise(out, os.Stdout, expected)
	err = cmd.Wait()

	fmt.Printf("%d passed, %d failed, %d skipped\n", sum.passed, sum.failed, sum.skipped)
	for _, s := range sum.unexpected {
		fmt.Printf("unexpected skip: %s\n", s)
	}
	switch {
	case err != nil || sum.failed > 0:
		os.Exit(1)
	case len(sum.unexpected) > 0:
		fmt.Printf("gotest: %d unexpected skips: make them run, or list them in %s with the reason\n", len(sum.unexpected), *expectFile)
		os.Exit(1)
	case sum.passed == 0:
		fmt.Println("gotest: no test ran")
		os.Exit(1)
	}
}

// expectation allows skips; nil allows all.
type expectation map[string]bool // "package test"

func (e expectation) allows(pkg, test string) bool {
	if e == nil || e[pkg+" "+test] || e[pkg+" *"] {
		return true
	}
	parent, _, isSub := strings.Cut(test, "/")
	return isSub && e[pkg+" "+parent]
}

// here is what holds of this run.
func here() map[string]bool {
	var fs syscall.Statfs_t
	const cgroup2 = 0x63677270 // CGROUP2_SUPER_MAGIC, statfs(2)
	v2 := syscall.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == cgroup2
	return map[string]bool{"always": true, "user": os.Geteuid() != 0, "v2": v2, "guest": os.Getenv("CRISP_GUEST") != ""}
}

func readExpected(path string, holds map[string]bool) (expectation, error) {
	if path == "" {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseExpected(string(data), path, holds)
}

// parseExpected reads the lines whose WHEN holds; holds has every WHEN there is.
func parseExpected(text, path string, holds map[string]bool) (expectation, error) {
	e := expectation{}
	for i, line := range strings.Split(text, "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		now, known := holds[f[0]]
		if len(f) < 4 || !known {
			return nil, fmt.Errorf("%s:%d: want WHEN PACKAGE TEST REASON, got %q", path, i+1, line)
		}
		if now {
			e[f[1]+" "+f[2]] = true
		}
	}
	return e, nil
}

// event is one line of go test -json (see `go doc test2json`).
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	ImportPath  string
	FailedBuild string
}

type summary struct {
	passed, failed, skipped int
	unexpected              []string // "package test: what it said"
}

// summarise copies what a reader wants to see of the events in r to w.
func summarise(r io.Reader, w io.Writer, expected expectation) summary {
	var sum summary
	output := map[string][]string{} // package+test → its lines, until it is known whether they matter
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		if len(line) > 0 && json.Unmarshal(line, &e) != nil {
			fmt.Fprintf(w, "%s", line) // not JSON: go's own complaint
		}
		if err != nil {
			return sum
		}
		key := e.Package + " " + e.Test
		pkg := strings.TrimPrefix(strings.TrimPrefix(e.Package, module), "/")
		switch e.Action {
		case "build-output":
			fmt.Fprint(w, e.Output)
		case "output":
			output[key] = append(output[key], e.Output)
		case "pass", "fail", "skip":
			said := output[key]
			delete(output, key)
			switch {
			case e.Test == "":
				printPackage(w, e, said)
				if e.Action == "fail" && e.FailedBuild != "" {
					sum.failed++
				}
			case e.Action == "pass":
				sum.passed++
			case e.Action == "fail":
				sum.failed++
				fmt.Fprint(w, strings.Join(said, ""))
			case e.Action == "skip":
				sum.skipped++
				if !expected.allows(pkg, e.Test) {
					sum.unexpected = append(sum.unexpected, fmt.Sprintf("%s %s: %s", pkg, e.Test, reason(said)))
				}
			}
		}
	}
}

// printPackage prints go test's closing line of a package, and all that the
// package said (a panic, a failed TestMain) when it failed.
func printPackage(w io.Writer, e event, said []string) {
	for _, l := range said {
		closing := strings.HasPrefix(l, "ok ") || strings.HasPrefix(l, "ok\t") || strings.HasPrefix(l, "FAIL")
		if closing || e.Action == "fail" {
			fmt.Fprint(w, l)
		}
	}
}

// reason finds the message of t.Skip in a test's output.
func reason(said []string) string {
	for _, l := range said {
		l = strings.TrimSpace(l)
		if l != "" && !strings.HasPrefix(l, "=== ") && !strings.HasPrefix(l, "--- ") {
			return l
		}
	}
	return "no reason given"
}
