package check

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMain(m *testing.M) {
	RunHelper()
	os.Exit(m.Run())
}

func TestWriteTable(t *testing.T) {
	findings := []Finding{
		{"kernel", "openat2", Required, Yes, "", ""},
		{"kernel", "overlay", Required, No, "function not implemented", "no containers"},
		{"host", "SELinux", Info, No, "", "no labels"},
		{"host", "state_root", Required, Unknown, "permission denied", ""},
	}
	var got strings.Builder
	if err := WriteTable(&got, findings); err != nil {
		t.Fatal(err)
	}
	want := `kernel
  openat2  yes      
  overlay  MISSING  function not implemented; no containers

host
  SELinux     no       no labels
  state_root  unknown  permission denied
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got, want := Missing(findings), []string{"overlay"}; !cmp.Equal(got, want) {
		t.Errorf("missing: got %v, want %v", got, want)
	}
}

func TestHasCapability(t *testing.T) {
	for _, c := range []struct {
		name, status string
		want         Verdict
	}{
		{"set", "Name:\tx\nCapEff:\t0000000001000000\n", Yes},
		{"not set", "CapEff:\t00000000feffffff\n", No},
		{"no line", "Name:\tx\n", Unknown},
		{"not hexadecimal", "CapEff:\tzz\n", Unknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := hasCapability([]byte(c.status), 24).Verdict; got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// Every probe must say what its absence costs, and answer without root too.
func TestRun(t *testing.T) {
	for _, p := range probes() {
		if p.Cost == "" && p.Need != Info {
			t.Errorf("%s does not say what its absence costs", p.Name)
		}
	}
	dir := t.TempDir()
	findings, err := Run(Paths{StateRoot: dir + "/state", RunRoot: dir + "/run", InitPath: dir + "/absent"})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		if f.Verdict != Yes && f.Verdict != No && f.Verdict != Unknown {
			t.Errorf("%s: got verdict %q", f.Name, f.Verdict)
		}
		if f.Verdict != Yes && f.Detail == "" {
			t.Errorf("%s: %s without a reason", f.Name, f.Verdict)
		}
		if f.Name == "crisp-init" && f.Verdict != No {
			t.Errorf("an absent crisp-init: got %s", f.Verdict)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	var out strings.Builder
	if err := WriteJSON(&out, findings); err != nil {
		t.Fatal(err)
	}
	var back []Finding
	if err := json.Unmarshal([]byte(out.String()), &back); err != nil || !cmp.Equal(findings, back) {
		t.Errorf("JSON does not read back: %v", err)
	}
}
