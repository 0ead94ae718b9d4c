package arrows

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// docs/SECURITY.md says which test shows what: each of them is there.
func TestSecurityListNamesTests(t *testing.T) {
	text, err := os.ReadFile("../../docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	head := regexp.MustCompile(`(?m)^func (Test\w+)`)
	have := "\n"
	err = filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range head.FindAllSubmatch(source, -1) {
			have += string(m[1]) + "\n"
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`\bTest[A-Z]\w*`).FindAllString(string(text), -1)
	for _, name := range names {
		end := "\n"
		if strings.HasSuffix(name, "_") {
			end = "" // cut short in the text
		}
		if name != "TestBreakouts" && !strings.Contains(have, "\n"+name+end) { // that one is containerd's
			t.Errorf("docs/SECURITY.md names %s, which does not exist", name)
		}
	}
	if len(names) < 80 {
		t.Errorf("it names %d tests only: the search is broken", len(names))
	}
}
