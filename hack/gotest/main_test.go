package main

import (
	"strings"
	"testing"
)

const events = `{"Action":"start","Package":"github.com/crisp-cri/crisp/a"}
{"Action":"run","Package":"github.com/crisp-cri/crisp/a","Test":"TestOne"}
{"Action":"output","Package":"github.com/crisp-cri/crisp/a","Test":"TestOne","Output":"=== RUN   TestOne\n"}
{"Action":"pass","Package":"github.com/crisp-cri/crisp/a","Test":"TestOne"}
{"Action":"output","Package":"github.com/crisp-cri/crisp/a","Test":"TestTwo/sub","Output":"    a_test.go:3: needs a moon\n"}
{"Action":"skip","Package":"github.com/crisp-cri/crisp/a","Test":"TestTwo/sub"}
{"Action":"output","Package":"github.com/crisp-cri/crisp/a","Test":"TestThree","Output":"    a_test.go:9: got 1 want 2\n"}
{"Action":"fail","Package":"github.com/crisp-cri/crisp/a","Test":"TestThree"}
{"Action":"output","Package":"github.com/crisp-cri/crisp/a","Output":"FAIL\tgithub.com/crisp-cri/crisp/a\t0.1s\n"}
{"Action":"fail","Package":"github.com/crisp-cri/crisp/a"}
`

func TestSummarise(t *testing.T) {
	for _, c := range []struct {
		name, expect   string
		when           string // beside always
		wantUnexpected string
	}{
		{"nothing expected", "", "", "a TestTwo/sub: a_test.go:3: needs a moon"},
		{"the parent test", "always a TestTwo there is no moon", "", ""},
		{"the whole package", "always a * there is no moon", "", ""},
		{"for users only, as user", "user a TestTwo/sub needs root", "user", ""},
		{"for users only, as root", "user a TestTwo/sub needs root", "", "a TestTwo/sub: a_test.go:3: needs a moon"},
		{"for v2 only, on v2", "v2 a TestTwo/sub needs v1", "v2", ""},
		{"for v2 only, on v1", "v2 a TestTwo/sub needs v1", "", "a TestTwo/sub: a_test.go:3: needs a moon"},
		{"another package", "always b TestTwo there is no moon", "", "a TestTwo/sub: a_test.go:3: needs a moon"},
	} {
		t.Run(c.name, func(t *testing.T) {
			expected, err := parseExpected(c.expect, "skips", holding(c.when))
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			sum := summarise(strings.NewReader(events), &out, expected)
			if sum.passed != 1 || sum.failed != 1 || sum.skipped != 1 {
				t.Errorf("got %+v, want one each", sum)
			}
			if got := strings.Join(sum.unexpected, "; "); got != c.wantUnexpected {
				t.Errorf("got unexpected skips %q, want %q", got, c.wantUnexpected)
			}
			want := "    a_test.go:9: got 1 want 2\nFAIL\tgithub.com/crisp-cri/crisp/a\t0.1s\n"
			if out.String() != want {
				t.Errorf("got output %q, want %q", out.String(), want)
			}
		})
	}
}

func holding(when string) map[string]bool {
	return map[string]bool{"always": true, "user": when == "user", "v2": when == "v2"}
}

func TestParseExpectedRefuses(t *testing.T) {
	for _, bad := range []string{"always a TestX", "sometimes a TestX why", "x"} {
		if _, err := parseExpected(bad, "skips", holding("")); err == nil || !strings.Contains(err.Error(), "skips:1") {
			t.Errorf("%q: got %v, want an error that names skips:1", bad, err)
		}
	}
}
