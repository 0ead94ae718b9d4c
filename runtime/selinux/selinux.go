// Package selinux makes SELinux labels of containers and of their files, by the node's
// container policy (container-selinux) and the library that the other runtimes use
// for it (github.com/opencontainers/selinux).
//
// A process label is applied by crisp-init just before execve, a mount label by the
// mounts themselves (context=); see runtime/initproto and runtime/spawn. What is
// not here: who gets which label is package cri's.
//
// Two pods must not read each other's files though both have the type container_t: each has a
// pair of categories of its own (multi-category security). The library would give out random
// ones and remember them in memory; here a pair follows from the pod's identity and from those that are in use, which the pods'
// records know ([Level]).
package selinux

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"

	"golang.org/x/sys/unix"

	libselinux "github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
)

// ErrNoPolicy is returned on a node without labels for containers.
var ErrNoPolicy = errors.New("this node has no SELinux policy for containers (package container-selinux)")

// Enabled says whether the running kernel has SELinux on, enforcing or permissive.
func Enabled() bool { return libselinux.GetEnabled() }

// Options change parts of a label; an empty one stays.
type Options struct{ User, Role, Type, Level string }

// Labels are the label of a container's processes and that of its files. Level must be set.
//
// The types are the policy's (container_t, container_file_t) unless o has one; what the policy does not know is found out when it
// is applied.
func Labels(o Options) (process, mount string, err error) {
	options := []string{"level:" + o.Level}
	for _, part := range [][2]string{{"user", o.User}, {"role", o.Role}, {"type", o.Type}} {
		if part[1] != "" {
			options = append(options, part[0]+":"+part[1])
		}
	}
	process, mount, err = label.InitLabels(options)
	if err == nil && process == "" {
		err = ErrNoPolicy
	}
	return process, mount, err
}

// categories are how many there are: c0 to c1023.
const categories = 1024

// Level is a level with a pair of categories that is not taken, for the pod of that name; always the same as long as
// the same ones are taken.
func Level(name string, taken func(level string) bool) string {
	h := fnv.New64a()
	h.Write([]byte(name)) // never fails
	n := h.Sum64()
	const pairs = categories * (categories - 1) / 2
	level := ""
	for i := range uint64(pairs) {
		level = pair((n + i) % pairs)
		if !taken(level) {
			break
		}
	}
	return level // the last one if all are taken: more pods than a node can have
}

// pair is the n-th pair of categories a < b.
func pair(n uint64) string {
	a := uint64(0)
	for left := uint64(categories - 1); n >= left; left-- {
		n -= left
		a++
	}
	return fmt.Sprintf("s0:c%d,c%d", a, a+1+n)
}

// LevelOf is the level of a label, "" if it has none.
func LevelOf(l string) string {
	c, err := libselinux.NewContext(l)
	if err != nil {
		return ""
	}
	return c["level"]
}

// SetFile labels one file; "" leaves it.
//
// Needs: the right to relabel it.
func SetFile(path, label string) error {
	if label == "" {
		return nil
	}
	if err := unix.Lsetxattr(path, "security.selinux", []byte(label+"\x00"), 0); err != nil {
		return &os.PathError{Op: "set SELinux label", Path: path, Err: err}
	}
	return nil
}

// Relabel labels a volume and all in it, for one pod. A file system that knows no labels is left as it is. The library refuses
// directories that the node lives of (/, /usr, /etc …).
//
// Needs: the right to relabel. Undo: restorecon(8). Trust: the tree may be changed by a container meanwhile; links are not followed.
func Relabel(path, l string) error {
	err := label.Relabel(path, l, false)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}
