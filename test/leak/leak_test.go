package leak

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name          string
		before, after Snapshot
		want          string
	}{
		{"nothing", Snapshot{}, Snapshot{}, ""},
		{"the same", Snapshot{Files: {"f a": 1}}, Snapshot{Files: {"f a": 1}}, ""},
		{"new", Snapshot{}, Snapshot{Files: {"f a": 1}}, "left behind: file f a\n"},
		{"a file that was being written", Snapshot{FDs: {"/s/state": 1}, Threads: {"in system call 74": 1}}, Snapshot{}, ""},
		{"gone", Snapshot{Files: {"f a": 1}}, Snapshot{}, "gone: file f a\n"},
		{"more", Snapshot{FDs: {"pipe:[N]": 3}}, Snapshot{FDs: {"pipe:[N]": 5}}, "daemon's file descriptor pipe:[N]: 3 before, 5 after\n"},
		{"a few sockets", Snapshot{FDs: {"socket:[N]": 3}}, Snapshot{FDs: {"socket:[N]": 11}}, ""},
		{"many sockets", Snapshot{FDs: {"socket:[N]": 3}}, Snapshot{FDs: {"socket:[N]": 12}}, "daemon's file descriptor socket:[N]: 3 before, 12 after\n"},
		{"fewer sockets", Snapshot{FDs: {"socket:[N]": 3}}, Snapshot{FDs: {"socket:[N]": 2}}, ""},
		{"in the order of kinds", Snapshot{}, Snapshot{Files: {"f a": 1}, Processes: {"7 x": 1}}, "left behind: process 7 x\nleft behind: file f a\n"},
		{"a few threads", Snapshot{Threads: {waiting: 59}}, Snapshot{Threads: {waiting: 67}}, ""},
		{"many threads", Snapshot{Threads: {waiting: 59}}, Snapshot{Threads: {waiting: 68}}, "daemon's thread waiting for work: 59 before, 68 after\n"},
		{"the threads of another daemon", Snapshot{Threads: {waiting: 9}}, Snapshot{Threads: {waiting: 48}}, ""},
		{"too many for any daemon", Snapshot{Threads: {waiting: 9}}, Snapshot{Threads: {waiting: 49}}, "daemon's thread waiting for work: 9 before, 49 after\n"},
		{"a thread that hangs", Snapshot{Threads: {waiting: 9}}, Snapshot{Threads: {waiting: 9, "in system call 0": 1}}, "left behind: daemon's thread in system call 0\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Format(Compare(c.before, c.after), 10); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// Every kind is reported: one that is missing in Kinds would never be compared.
func TestCompareKnowsEveryKind(t *testing.T) {
	snap, err := Scope{Dirs: []string{t.TempDir()}}.Take()
	if err != nil {
		t.Fatal(err)
	}
	for kind := range snap {
		if len(Compare(Snapshot{}, Snapshot{kind: {"x": 100}})) != 1 {
			t.Errorf("kind %q is taken but not compared", kind)
		}
	}
}

func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		in, comm string
		state    byte
		ppid     int
		ok       bool
	}{
		{"7 (a) S 1 7 7", "a", 'S', 1, true},
		{"7 (a) b) (c) Z 12 7", "a) b) (c", 'Z', 12, true},
		{"7 a S 1", "", 0, 0, false},
		{"", "", 0, 0, false},
		{"7 (a)", "", 0, 0, false},
	} {
		comm, state, ppid, ok := parseStat(c.in)
		if comm != c.comm || state != c.state || ppid != c.ppid || ok != c.ok {
			t.Errorf("%q: got %q %c %d %t, want %q %c %d %t", c.in, comm, state, ppid, ok, c.comm, c.state, c.ppid, c.ok)
		}
	}
}

func TestParseMount(t *testing.T) {
	root, point, fstype, source, ok := parseMount(`31 23 0:28 /a\040b /sys/x\134 rw,relatime shared:5 master:1 - tmpfs tmp\040fs rw,mode=755`)
	if !ok || root != "/a b" || point != `/sys/x\` || fstype != "tmpfs" || source != "tmp fs" {
		t.Errorf("got %q %q %q %q %t", root, point, fstype, source, ok)
	}
	if _, _, _, _, ok := parseMount("31 23 0:28 / /sys rw"); ok {
		t.Error("a line without a separator was taken")
	}
}

func TestLastingDropsWhatChangesByItself(t *testing.T) {
	var v any
	if err := json.Unmarshal([]byte(`{"rule":{"handle":4,"chain":"c","expr":[{"counter":{"packets":7,"bytes":8}},{"elem":{"expires":3,"val":"x"}}]},"set":{"flags":["timeout"],"elem":["x"]}}`), &v); err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(lasting(v))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"rule":{"chain":"c","expr":[{"counter":{}},{"elem":{"val":"x"}}]},"set":{"flags":["timeout"]}}`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseAbstract(t *testing.T) {
	names := parseAbstract(strings.Join([]string{
		"Num       RefCount Protocol Flags    Type St Inode Path",
		"0000: 00000002 00000000 00010000 0001 01 111 /run/x.sock",
		"0000: 00000002 00000000 00010000 0001 01 222 @hidden",
		"0000: 00000002 00000000 00000000 0002 01 333",
	}, "\n"))
	if len(names) != 1 || names["socket:[222]"] != "@hidden" {
		t.Errorf("got %v, want only @hidden", names)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("31 23 0:28 / /sys rw - tmpfs t rw")
	f.Add("7 (a) S 1 7")
	f.Add(`\0`)
	f.Fuzz(func(t *testing.T, line string) {
		parseMount(line)
		parseStat(line)
		parseAbstract(line)
	})
}
