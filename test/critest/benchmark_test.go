package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrintResults(t *testing.T) {
	for _, c := range []struct{ name, json, want string }{
		{"two operations", `{"operationsNames":["Create","Stop"],"datapoints":[{"operationsDurationsNs":[3000000,500000]},{"operationsDurationsNs":[1000000,700000]},{"operationsDurationsNs":[2000000,600000]}]}`,
			"| b | Create | 3 | 2.00 | 2.00 |\n| b | Stop | 3 | 0.60 | 0.60 |\n"},
		{"no sample", `{"operationsNames":["Create"],"datapoints":[]}`, ""},
		{"cut off", `{"operationsNames":["Create"`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "b.json"), []byte(c.json), 0o644); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			err := printResults(&out, dir)
			if (err == nil) != (c.want != "") {
				t.Fatalf("got %v, want an error: %v", err, c.want == "")
			}
			_, rows, _ := strings.Cut(out.String(), "--:|\n")
			if err == nil && rows != c.want {
				t.Errorf("got\n%swant\n%s", rows, c.want)
			}
		})
	}
}
