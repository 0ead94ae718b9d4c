// Package check finds out what this kernel and host offer that crisp uses.
//
// [Run] tries every [Probe] and returns one [Finding] each. Features are tried,
// kernel versions never compared: distributions backport and disable. What a
// probe makes (a cgroup, a network namespace, a directory, a child) is gone when
// it returns; nothing of the host is changed.
//
// The probes are in kernel.go (system calls), cgroup.go, network.go and host.go.
package check

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
)

// Verdict is a probe's answer.
type Verdict string

const (
	Yes     Verdict = "yes"
	No      Verdict = "no"
	Unknown Verdict = "unknown" // the probe itself could not be made
)

// Need says what becomes of crisp without the feature.
type Need string

const (
	Required Need = "required" // crisp does not work
	Wanted   Need = "wanted"   // works with less, Finding.Cost says what
	Info     Need = "info"     // worth knowing
)

// Answer is what one probe found.
type Answer struct {
	Verdict Verdict
	Detail  string // what was found; with No and Unknown the reason
}

// Probe is one question to the host.
type Probe struct {
	Group string // heading in the table
	Name  string
	Need  Need
	Cost  string // what its absence costs, for the reader of the table
	ask   func(*host) Answer
}

// Finding is a probe with its answer.
type Finding struct {
	Group   string  `json:"group"`
	Name    string  `json:"name"`
	Need    Need    `json:"need"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail,omitempty"`
	Cost    string  `json:"cost,omitempty"` // only when the verdict is not Yes
}

// Paths are the places of the configuration that probes look at; none has to exist.
type Paths struct {
	StateRoot, RunRoot, InitPath string
}

// host is what probes share.
type host struct {
	Paths
	scratch string // an empty directory on StateRoot's file system
}

// Run asks every question, in order. The error is about the probing itself (no
// directory to work in), never about a missing feature.
func Run(paths Paths) (findings []Finding, err error) {
	scratch, err := os.MkdirTemp(existing(paths.StateRoot), ".crisp-check-")
	if err != nil {
		return nil, fmt.Errorf("cannot probe the host: %w", err)
	}
	defer func() {
		if rerr := os.RemoveAll(scratch); err == nil && rerr != nil {
			err = fmt.Errorf("cannot clean up after probing: %w", rerr)
		}
	}()
	h := &host{Paths: paths, scratch: scratch}

	for _, p := range probes() {
		a := p.ask(h)
		f := Finding{Group: p.Group, Name: p.Name, Need: p.Need, Verdict: a.Verdict, Detail: a.Detail}
		if a.Verdict != Yes {
			f.Cost = p.Cost
		}
		findings = append(findings, f)
	}
	return findings, nil
}

func probes() []Probe {
	var all []Probe
	for _, group := range [][]Probe{kernelProbes, cgroupProbes, networkProbes, hostProbes} {
		all = append(all, group...)
	}
	return all
}

// Missing are the required features whose verdict is No.
func Missing(findings []Finding) (names []string) {
	for _, f := range findings {
		if f.Need == Required && f.Verdict == No {
			names = append(names, f.Name)
		}
	}
	return names
}

// WriteTable prints findings for people.
func WriteTable(w io.Writer, findings []Finding) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	group := ""
	for _, f := range findings {
		if f.Group != group {
			if group != "" {
				fmt.Fprintln(t)
			}
			group = f.Group
			fmt.Fprintln(t, group)
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\n", f.Name, label(f), text(f))
	}
	return t.Flush()
}

// label is the middle column: what matters at a glance.
func label(f Finding) string {
	switch {
	case f.Verdict == No && f.Need == Required:
		return "MISSING"
	case f.Verdict == Unknown:
		return "unknown"
	case f.Verdict == No:
		return "no"
	default:
		return "yes"
	}
}

func text(f Finding) string {
	switch {
	case f.Cost == "":
		return f.Detail
	case f.Detail == "":
		return f.Cost
	default:
		return f.Detail + "; " + f.Cost
	}
}

// WriteJSON prints findings for programs.
func WriteJSON(w io.Writer, findings []Finding) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(findings)
}

func yes(format string, args ...any) Answer { return Answer{Yes, fmt.Sprintf(format, args...)} }
func no(format string, args ...any) Answer  { return Answer{No, fmt.Sprintf(format, args...)} }
func unknown(format string, args ...any) Answer {
	return Answer{Unknown, fmt.Sprintf(format, args...)}
}
