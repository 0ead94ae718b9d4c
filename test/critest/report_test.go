package main

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestJudge(t *testing.T) {
	r, err := readReport("testdata/report.json")
	if err != nil {
		t.Fatal(err)
	}
	expected := []expectation{{"[k8s.io] A skips, expected", "why"}, {"[k8s.io] B*", "why"}, {"[k8s.io] gone", "why"}}
	for _, c := range []struct {
		name                    string
		whole                   bool
		passed, failed, skipped int
		want                    []string
	}{
		{"whole run", true, 1, 2, 5, []string{
			"FAIL  BeforeSuite: util.go:7: it broke",
			"FAIL  the suite: something else",
			"FAIL  [k8s.io] A fails: container.go:42: want 1 got 2",
			"SKIP  [k8s.io] A is left out: it gave no reason",
			"SKIP  [k8s.io] A is pending: it gave no reason",
			"SKIP  [k8s.io] A skips, unexpected: no such feature",
			"STALE [k8s.io] gone: expected to be skipped, but there is no such spec",
		}},
		{"focused run", false, 1, 2, 3, []string{
			"FAIL  BeforeSuite: util.go:7: it broke",
			"FAIL  the suite: something else",
			"FAIL  [k8s.io] A fails: container.go:42: want 1 got 2",
			"SKIP  [k8s.io] A is pending: it gave no reason",
			"SKIP  [k8s.io] A skips, unexpected: no such feature",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := judge(r, expected, c.whole)
			slices.Sort(c.want)
			slices.Sort(v.lines)
			if !slices.Equal(v.lines, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(v.lines, "\n"), strings.Join(c.want, "\n"))
			}
			if v.passed != c.passed || v.failed != c.failed || v.skipped != c.skipped {
				t.Errorf("got %d passed, %d failed, %d skipped; want %d, %d, %d", v.passed, v.failed, v.skipped, c.passed, c.failed, c.skipped)
			}
			if !v.bad() {
				t.Error("a run with failures is not bad")
			}
		})
	}
}

func TestJudgeNothingRan(t *testing.T) {
	if v := judge(&report{}, nil, false); !v.bad() {
		t.Error("a run of no spec at all is good")
	}
	if v := judge(&report{SpecReports: []spec{{LeafNodeType: "It", State: "passed"}}}, nil, true); v.bad() {
		t.Errorf("one spec passed: got %q", v.lines)
	}
}

func TestOneLine(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", " \n", "otherwise"},
		{"two lines", "a\n  b\n", "a b"},
		{"an error that was told", "cannot x: EPERM\nUnexpected error:\n    <*status.Error | 0x1>: \n    EPERM\n    {s: 1}\noccurred", "cannot x: EPERM"},
		{"an error that was not", "cannot x\nUnexpected error:\n    <*errors.errorString | 0x1>: \n    no: 403\n    {\n s: 1}\noccurred", "cannot x: no: 403"},
		{"too long", strings.Repeat("é", 400), strings.Repeat("é", 300) + "…"},
	} {
		if got := oneLine(c.in, "otherwise"); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

func TestParseExpected(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     []expectation
		ok       bool
	}{
		{"two and a comment", "# why\n\na b :: no c\n[x] d* ::  e :: f \n", []expectation{{"a b", "no c"}, {"[x] d*", "e :: f"}}, true},
		{"nothing", "", nil, true},
		{"no reason", "a b\n", nil, false},
		{"an empty reason", "a b :: \n", nil, false},
		{"no spec", " :: why\n", nil, false},
		{"everything", "* :: why\n", nil, false},
	} {
		got, err := parseExpected(c.in, "f")
		if (err == nil) != c.ok || !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, %v; want %q, ok %v", c.name, got, err, c.want, c.ok)
		}
	}
}

func TestExpectedSkipsAreWellFormed(t *testing.T) {
	all, err := readExpected("expected-skips.txt")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, e := range all {
		if seen[e.spec] {
			t.Errorf("%s is listed twice", e.spec)
		}
		seen[e.spec] = true
	}
}

func TestReadReportOfNothing(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "no suite": "[]", "two": "[{},{}]", "cut off": `[{"SpecReports":[`} {
		file := t.TempDir() + "/r.json"
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := readReport(file); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
