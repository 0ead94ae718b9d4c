// Package leak says what a runtime has left behind on a machine.
//
// A [Scope] names what is one daemon's own: its process, directories, cgroups,
// bridge, nft tables. [Scope.Take] looks at the machine and returns a [Snapshot]:
// for each [Kind] the things there are, with counts. [Compare] is what a second
// snapshot has more or less than the first, and [Scope.Settle] waits for the
// difference to vanish: some things (a namespace's links, a v1 cgroup) are
// taken down by the kernel a moment after the call that caused it.
//
// Two daemons on one machine do not see each other: everything is either looked
// for below a name of the scope, or reached from one of its processes. The
// package only looks; it never removes anything.
//
// What is compared follows reliability-and-security.md, E2.
package leak

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Kind is a kind of thing that can be left behind.
type Kind string

// The kinds, each with where it is read.
const (
	// Mounts of this process's mount namespace below Dirs or from them (/proc/self/mountinfo).
	Mounts Kind = "mount"
	// DaemonMounts are those of the daemon's other mount namespaces, counted by
	// namespace size: a copy that pins a dead overlay shows here (containerd#4020).
	DaemonMounts Kind = "daemon's mount"
	// Namespaces held by processes of the scope, by type, with the number of different ones.
	Namespaces Kind = "namespace"
	// Pins are the files of NetNSDir, with what is mounted on each.
	Pins Kind = "netns pin"
	// Links are Bridge, its ports, and links with a name that starts with a prefix of LinkPrefixes.
	Links Kind = "link"
	// Rules are chains, rules, sets and elements of Tables (nft --json), without handles and counters.
	Rules Kind = "nft"
	// Cgroups are the directories below Cgroups in each hierarchy.
	Cgroups Kind = "cgroup"
	// Processes of the scope but the daemon itself, zombies too.
	Processes Kind = "process"
	// FDs are the daemon's open files, numbers and ids removed, with counts.
	FDs Kind = "daemon's file descriptor"
	// Threads are the daemon's: those that wait for work, of which Go keeps as many as its
	// busiest moment needed, and those in another system call. See Compare.
	Threads Kind = "daemon's thread"
	// Files below Dirs, not crossing mounts.
	Files Kind = "file"
	// SysV are the System V IPC objects of the host's IPC namespace. Not of the scope: of the machine.
	SysV Kind = "sysv ipc object"
	// Abstract are abstract unix sockets that a process of the scope holds (CVE-2020-15257).
	Abstract Kind = "abstract socket"
)

// Kinds in the order in which differences are reported.
var Kinds = []Kind{Processes, Cgroups, Mounts, DaemonMounts, Pins, Namespaces, Links, Rules, Files, FDs, Threads, SysV, Abstract}

// Scope is what belongs to one daemon. Empty fields leave their kinds out.
type Scope struct {
	Daemon       int      // pid of the daemon; 0: it does not run, and its kinds are left out
	Dirs         []string // state root, run root, log directory …
	Skip         []string // directories or files below Dirs that may change: caches, the daemon's own log
	NetNSDir     string   // where pods' network namespaces are pinned
	Cgroups      []string // cgroup paths in every hierarchy: "/crisp-test-ab12"
	Bridge       string
	LinkPrefixes []string // of links that are not ports of Bridge (any more)
	Tables       []string // nft tables, of any family
}

// Snapshot is what there was: how many of each thing, by kind.
type Snapshot map[Kind]map[string]int

func (s Snapshot) add(kind Kind, thing string) {
	if s[kind] == nil {
		s[kind] = map[string]int{}
	}
	s[kind][thing]++
}

// Difference is one thing of which the second snapshot has another number.
type Difference struct {
	Kind          Kind
	Thing         string
	Before, After int
}

func (d Difference) String() string {
	switch {
	case d.Before == 0 && d.After == 1:
		return fmt.Sprintf("left behind: %s %s", d.Kind, d.Thing)
	case d.After == 0 && d.Before == 1:
		return fmt.Sprintf("gone: %s %s", d.Kind, d.Thing)
	}
	return fmt.Sprintf("%s %s: %d before, %d after", d.Kind, d.Thing, d.Before, d.After)
}

// waiting is the thing of Threads that have nothing to do.
const waiting = "waiting for work"

// A Go program may have gained threadSlack of them, for it keeps those that once blocked in a system
// call. Up to threadPool they tell nothing: how many a daemon has that was just started, which the
// snapshot before may be of, depends on what it met at its start. One that is lost per pod shows all
// the same, after a few pods more; one that hangs in a system call at once, as it is another thing.
const (
	threadSlack = 8
	threadPool  = 48
)

// socketSlack is how many sockets a daemon may have gained: it keeps those of
// its busiest moment. One that it loses per pod shows after a few pods more.
const socketSlack = 8

// Compare is what differs, in the order of Kinds. The daemon's threads that
// wait and its sockets may have grown by a few; of other descriptors and of threads in a system call it may have fewer.
func Compare(before, after Snapshot) []Difference {
	var all []Difference
	for _, kind := range Kinds {
		things := maps.Clone(before[kind])
		if things == nil {
			things = map[string]int{}
		}
		maps.Copy(things, after[kind])
		for _, thing := range slices.Sorted(maps.Keys(things)) {
			d := Difference{kind, thing, before[kind][thing], after[kind][thing]}
			switch {
			case d.Before == d.After:
			case kind == Threads && thing == waiting && d.After <= max(d.Before+threadSlack, threadPool):
			// What the first snapshot caught it at: it writes and syncs in the background.
			case (kind == FDs && thing != "socket:[N]" || kind == Threads && thing != waiting) && d.After < d.Before:
			// Either way: after a restart a pool may not have been that busy yet.
			case kind == FDs && thing == "socket:[N]" && d.After >= d.Before-socketSlack && d.After <= d.Before+socketSlack:
			default:
				all = append(all, d)
			}
		}
	}
	return all
}

// Settle takes snapshots until one does not differ from before, or ctx ends; it
// returns what differed last. An error is of the looking itself.
func (s Scope) Settle(ctx context.Context, before Snapshot) ([]Difference, error) {
	// Polling, because nothing tells when the kernel has finished with a namespace.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		after, err := s.Take()
		if err != nil {
			return nil, err
		}
		diff := Compare(before, after)
		if len(diff) == 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return diff, nil
		case <-tick.C:
		}
	}
}

// Format is one line per difference, at most most of them.
func Format(diff []Difference, most int) string {
	var b strings.Builder
	for i, d := range diff {
		if i == most {
			fmt.Fprintf(&b, "… and %d more\n", len(diff)-most)
			break
		}
		fmt.Fprintln(&b, d)
	}
	return b.String()
}
