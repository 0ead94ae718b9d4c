// Command go stands in for Go in the guest, where there is none: the scripts of
// hack and the tests call "go build", "go test" and "go list -m" there as they do
// anywhere, and get what hack/guest/prebuild built outside. It is no more than a
// table of files; what is not in it is an error that says so.
//
//	go [-C DIR] build [FLAGS] -o OUT PACKAGE      copies the program to OUT
//	go [-C DIR] test -c [FLAGS] -o OUT PACKAGE    copies the test binary to OUT
//	go [-C DIR] test -json [FLAGS] PACKAGE...     runs test binaries, each in its package's folder
//	go [-C DIR] list -m [-f '{{.Version}}'] MODULE
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

const (
	tree  = "/crisp"              // the copy of the source tree
	built = "/crisp/.guest/built" // what prebuild made
)

func main() {
	good, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "go (the guest's stand-in):", err)
	}
	if err != nil || !good {
		os.Exit(1)
	}
}

// call is a command line of go, as far as it matters here.
type call struct {
	verb     string
	dir      string   // absolute
	out      string   // -o
	compile  bool     // -c
	module   bool     // -m
	test     []string // flags for a test binary
	packages []string
}

// valued are the flags that take a value in the next word and that nobody needs here.
var valued = map[string]bool{"-ldflags": true, "-tags": true, "-p": true, "-f": true}

// forTests are the flags that go passes on to test binaries.
var forTests = map[string]bool{"-run": true, "-skip": true, "-count": true, "-timeout": true, "-short": true, "-v": true, "-failfast": true, "-parallel": true}

func parse(args []string, dir string) (call, error) {
	c := call{dir: dir}
	for i := 0; i < len(args); i++ {
		name, value, joined := strings.Cut(args[i], "=")
		if strings.HasPrefix(name, "--") {
			name = name[1:]
		}
		next := func() string {
			if !joined && i+1 < len(args) {
				i++
				value = args[i]
			}
			return value
		}
		switch {
		case !strings.HasPrefix(name, "-") && c.verb == "":
			c.verb = args[i]
		case !strings.HasPrefix(name, "-"):
			c.packages = append(c.packages, args[i])
		case name == "-C":
			c.dir = filepath.Join(c.dir, next())
		case name == "-o":
			c.out = next()
		case name == "-c":
			c.compile = true
		case name == "-m":
			c.module = true
		case name == "-args":
			c.test = append(c.test, args[i+1:]...)
			i = len(args)
		case forTests[name]:
			f := "-test." + name[1:]
			if name != "-short" && name != "-v" && name != "-failfast" {
				f += "=" + next()
			}
			c.test = append(c.test, f)
		case valued[name]:
			next()
		}
	}
	if c.verb == "" {
		return call{}, errors.New("no command")
	}
	return c, nil
}

func run(args []string) (good bool, err error) {
	dir, err := os.Getwd()
	if err != nil {
		return false, err
	}
	c, err := parse(args, dir)
	if err != nil {
		return false, err
	}
	switch {
	case c.verb == "build":
		return true, c.handOut("main")
	case c.verb == "test" && c.compile:
		return true, c.handOut("test")
	case c.verb == "test":
		return c.runTests()
	case c.verb == "list" && c.module:
		return true, c.version()
	}
	return false, fmt.Errorf("there is no Go in the guest, and go %s has no stand-in", c.verb)
}

// importPath is the import path of a package as the command line names it.
func (c call) importPath(pkg string) (string, error) {
	if !strings.HasPrefix(pkg, ".") {
		return pkg, nil
	}
	module, err := os.ReadFile(filepath.Join(built, "module"))
	if err != nil {
		return "", err
	}
	below, err := filepath.Rel(tree, filepath.Join(c.dir, pkg))
	if err != nil || strings.HasPrefix(below, "..") {
		return "", fmt.Errorf("%s is not in %s", filepath.Join(c.dir, pkg), tree)
	}
	return path.Join(strings.TrimSpace(string(module)), below), nil
}

// file is what prebuild made of a package; kind is "main" or "test".
func file(kind, importPath string) string {
	return filepath.Join(built, kind, strings.ReplaceAll(importPath, "/", "@"))
}

// handOut copies a binary to where -o says.
func (c call) handOut(kind string) error {
	pkg := "."
	switch len(c.packages) {
	case 0:
	case 1:
		pkg = c.packages[0]
	default:
		return fmt.Errorf("%d packages: want one", len(c.packages))
	}
	if c.out == "" {
		return fmt.Errorf("go %s of %s without -o", c.verb, pkg)
	}
	name, err := c.importPath(pkg)
	if err != nil {
		return err
	}
	out := c.out
	if !filepath.IsAbs(out) {
		out = filepath.Join(c.dir, out)
	}
	if info, err := os.Stat(out); err == nil && info.IsDir() {
		out = filepath.Join(out, path.Base(name))
	}
	in := file(kind, name)
	if _, err := os.Stat(in); err != nil {
		return fmt.Errorf("%s was not built outside: %w", name, err)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o777); err != nil {
		return err
	}
	_ = os.Remove(out) // a running program's file cannot be written over; none is as good
	if os.Link(in, out) == nil {
		return nil
	}
	return copyFile(in, out)
}

func copyFile(in, out string) error {
	from, err := os.Open(in)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(out, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// runTests runs the packages' tests one after another, as go test -json -p 1 does.
func (c call) runTests() (good bool, err error) {
	good = true
	for _, pkg := range c.packages {
		pkg = strings.TrimSuffix(pkg, "/...") // the one that is meant, test/cri, has no packages below
		name, err := c.importPath(pkg)
		if err != nil {
			return false, err
		}
		binary := file("test", name)
		if _, err := os.Stat(binary); err != nil {
			return false, fmt.Errorf("the tests of %s were not built outside: %w", name, err)
		}
		args := append([]string{"-t", "-p", name, binary, "-test.v=test2json", "-test.paniconexit0"}, c.test...)
		cmd := exec.Command(filepath.Join(built, "test2json"), args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = filepath.Join(c.dir, pkg), os.Stdout, os.Stderr
		began := time.Now()
		verdict := "ok  "
		if err := cmd.Run(); err != nil {
			verdict, good = "FAIL", false
		}
		fmt.Printf("%s\t%s\t%.3fs\n", verdict, name, time.Since(began).Seconds())
	}
	return good, nil
}

// version prints the version of a module.
func (c call) version() error {
	text, err := os.ReadFile(filepath.Join(built, "modules"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 2 && len(c.packages) == 1 && f[0] == c.packages[0] {
			fmt.Println(f[1])
			return nil
		}
	}
	return fmt.Errorf("module %v is not known in the guest", c.packages)
}
