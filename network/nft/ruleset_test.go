package nft

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write testdata instead of comparing with it")

var testConfigs = map[string]Config{
	"dual stack": {
		Table: "crisp", Bridge: "crisp0", PortPrefix: "cr1a2b",
		Subnets:  []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24"), netip.MustParsePrefix("fd00:1::/64"), netip.MustParsePrefix("10.9.0.0/18")},
		Gateway4: netip.MustParseAddr("10.1.2.1"), Gateway6: netip.MustParseAddr("fd00:1::1"),
		Masquerade: true, MasqueradeExcept: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		AntiSpoof: true,
	},
	"v4 only": {
		Table: "crisp", Bridge: "crisp0", PortPrefix: "cr1a2b",
		Subnets:  []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")},
		Gateway4: netip.MustParseAddr("10.1.2.1"),
	},
}

// TestRules pins the rules: what nft(8) prints, and the expressions below it.
func TestRules(t *testing.T) {
	for name, cfg := range testConfigs {
		t.Run(name, func(t *testing.T) {
			got := render(cfg)
			path := filepath.Join("testdata", strings.ReplaceAll(name, " ", "-")+".txt")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("rules (-want +got; -update writes them):\n%s", d)
			}
		})
	}
}

func render(c Config) string {
	var b strings.Builder
	for _, family := range c.families() {
		fmt.Fprintf(&b, "table %s %s\n", familyName(family), c.Table)
		for _, s := range sets {
			if s.bridge != (familyName(family) == "bridge") {
				continue
			}
			switch {
			case s.data != nil:
				fmt.Fprintf(&b, "  map %s { type %s : %s }\n", s.name, s.key.Name, s.data.Name)
			case s.dynamic:
				fmt.Fprintf(&b, "  set %s { type %s; flags dynamic,timeout }\n", s.name, s.key.Name)
			default:
				fmt.Fprintf(&b, "  set %s { type %s }\n", s.name, s.key.Name)
			}
		}
		for _, ch := range c.chains(family) {
			if ch.typ == "" {
				fmt.Fprintf(&b, "  chain %s\n", ch.name)
			} else {
				fmt.Fprintf(&b, "  chain %s { type %s hook %d priority %d }\n", ch.name, ch.typ, *ch.hook, ch.prio)
			}
			for _, r := range ch.rule {
				fmt.Fprintf(&b, "    %s\n", r.cli)
				for _, e := range r.exprs {
					fmt.Fprintf(&b, "      %s\n", renderExpr(e))
				}
			}
		}
	}
	return b.String()
}

// renderExpr prints the fields that are not zero.
func renderExpr(e any) string {
	v := reflect.ValueOf(e).Elem()
	s := v.Type().Name()
	for i := range v.NumField() {
		if f := v.Field(i); !f.IsZero() {
			s += fmt.Sprintf(" %s=%v", v.Type().Field(i).Name, f)
		}
	}
	return s
}

func TestTransaction(t *testing.T) {
	// Every rule can be encoded, and the messages stand between begin and end.
	for name, cfg := range testConfigs {
		msgs, err := cfg.create()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, want := len(batch(msgs)), len(msgs)+2; got != want {
			t.Errorf("%s: messages: got %d, want %d", name, got, want)
		}
		for _, m := range msgs {
			if m.Step == "" || len(m.Body)%4 != 0 {
				t.Errorf("%s: message %+v: no step, or not padded", name, m)
			}
		}
	}
}
