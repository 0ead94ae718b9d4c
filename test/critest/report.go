package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// report is what is read of ginkgo's JSON report (ginkgo/v2/types Report,
// SpecReport, Failure). There is one per suite; critest is one.
type report struct {
	SpecReports []spec
	// SpecialSuiteFailureReasons say why the suite failed but for its specs.
	SpecialSuiteFailureReasons []string
}

type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string // "It"; others are set-ups, such as "BeforeSuite"
	LeafNodeText            string
	State                   string // "passed", "skipped", "pending", or a kind of failure
	Failure                 struct {
		Message  string
		Location struct {
			FileName   string
			LineNumber int
		}
	}
}

// name is the spec's as ginkgo prints it and as a focus matches it.
func (s *spec) name() string {
	return strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
}

// where is FILE:LINE in critest's source.
func (s *spec) where() string {
	return fmt.Sprintf("%s:%d", filepath.Base(s.Failure.Location.FileName), s.Failure.Location.LineNumber)
}

func readReport(file string) (*report, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var all []report
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(all) != 1 {
		return nil, fmt.Errorf("%s: want the report of one suite, got %d", file, len(all))
	}
	return &all[0], nil
}

// expectation is a line of the file of expected skips.
type expectation struct{ spec, reason string }

func readExpected(file string) ([]expectation, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseExpected(string(data), file)
}

// parseExpected reads lines SPEC :: REASON. A SPEC that ends in "*" stands for all
// specs whose names begin so. Empty lines and those that begin with # are comments.
func parseExpected(text, file string) (all []expectation, err error) {
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, ok := strings.Cut(line, " :: ")
		name, reason = strings.TrimSpace(name), strings.TrimSpace(reason)
		if !ok || name == "" || name == "*" || reason == "" {
			return nil, fmt.Errorf("%s:%d: want SPEC :: REASON, got %q", file, i+1, line)
		}
		all = append(all, expectation{name, reason})
	}
	return all, nil
}

func (e expectation) covers(name string) bool {
	prefix, wild := strings.CutSuffix(e.spec, "*")
	return name == e.spec || wild && strings.HasPrefix(name, prefix)
}

// verdict is what came of a run.
type verdict struct {
	passed, failed, skipped int
	lines                   []string // one for each failure, unexpected skip, stale expectation and leak
}

func (v *verdict) bad() bool { return len(v.lines) > 0 || v.passed == 0 }

// judge compares a report with what is expected. In a whole run an expectation
// that is of no spec at all is wrong, too: the spec was renamed or is gone. One of a
// spec that passed is not: another kernel has what this one lacks.
func judge(r *report, expected []expectation, whole bool) *verdict {
	v := &verdict{}
	used := make([]bool, len(expected))
	for i := range r.SpecReports {
		s := &r.SpecReports[i]
		name := s.name()
		known := false
		for i, e := range expected {
			if e.covers(name) {
				known, used[i] = true, true
			}
		}
		switch {
		case s.State == "passed" && s.LeafNodeType == "It":
			v.passed++
		case s.State == "passed":
		case s.State == "skipped" && !whole && s.Failure.Message == "":
			// out of focus
		case s.State == "skipped" || s.State == "pending":
			v.skipped++
			if !known {
				v.lines = append(v.lines, fmt.Sprintf("SKIP  %s: %s", name, oneLine(s.Failure.Message, "it gave no reason")))
			}
		default:
			v.failed++
			if s.LeafNodeType != "It" {
				name = s.LeafNodeType
			}
			v.lines = append(v.lines, fmt.Sprintf("FAIL  %s: %s: %s", name, s.where(), oneLine(s.Failure.Message, s.State)))
		}
	}
	for _, reason := range r.SpecialSuiteFailureReasons {
		v.lines = append(v.lines, "FAIL  the suite: "+oneLine(reason, ""))
	}
	for i, e := range expected {
		if whole && !used[i] {
			v.lines = append(v.lines, fmt.Sprintf("STALE %s: expected to be skipped, but there is no such spec", e.spec))
		}
	}
	return v
}

// oneLine is message, or otherwise if it is empty, in one line of at most 600 bytes.
func oneLine(message, otherwise string) string {
	message = flat(message)
	// gomega adds the error it was given, with its Go value: "Unexpected error: <*T | 0x1>: TEXT { … } occurred".
	// The text is kept, unless it has been told.
	if told, more, ok := strings.Cut(message, " Unexpected error: <"); ok {
		_, text, _ := strings.Cut(more, ">: ")
		text, _, _ = strings.Cut(text, " {")
		message = told
		if !strings.Contains(told, text) {
			message = told + ": " + text
		}
	}
	if message == "" {
		return otherwise
	}
	if len(message) > 600 {
		message = strings.ToValidUTF8(message[:600], "") + "…"
	}
	return message
}

func flat(text string) string { return strings.Join(strings.Fields(text), " ") }

func (v *verdict) print(w io.Writer) {
	slices.Sort(v.lines)
	for _, l := range v.lines {
		fmt.Fprintln(w, l)
	}
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", v.passed, v.failed, v.skipped)
}
