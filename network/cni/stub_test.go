package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The stub plugin is this test binary, by symbolic links called as plugins. What it does is in its configuration:
// "do": {"ADD": "hang"}. What it was told, it writes to "log".

func TestMain(m *testing.M) {
	switch {
	case os.Getenv("STUB_CHILD") != "":
		time.Sleep(time.Hour) // until it is killed
	case os.Getenv("CNI_COMMAND") != "":
		os.Exit(stub())
	}
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // or each plugin takes a second to exit
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

// told is one line of a stub's log.
type told struct {
	Plugin, Verb, Netns, IfName, Args, ID string
	PID                                   int
	Child                                 int
	Notify                                bool
	Conf                                  map[string]any
}

// stub is the plugin's main.
func stub() int {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 3
	}
	var conf struct {
		CNIVersion string            `json:"cniVersion"`
		Do         map[string]string `json:"do"`
		Log        string            `json:"log"`
		Prev       json.RawMessage   `json:"prevResult"`
	}
	t := told{Plugin: filepath.Base(os.Args[0]), Verb: os.Getenv("CNI_COMMAND"), Netns: os.Getenv("CNI_NETNS"), IfName: os.Getenv("CNI_IFNAME"),
		Args: os.Getenv("CNI_ARGS"), ID: os.Getenv("CNI_CONTAINERID"), PID: os.Getpid(), Notify: os.Getenv("NOTIFY_SOCKET") != ""}
	if json.Unmarshal(in, &conf) != nil || json.Unmarshal(in, &t.Conf) != nil {
		return 3
	}
	do := conf.Do[t.Verb]
	if do == "fork" {
		child := exec.Command("/proc/self/exe")
		child.Env = append(os.Environ(), "STUB_CHILD=1")
		child.Stdout = os.Stdout // so that its reader has no end of file
		if child.Start() != nil {
			return 3
		}
		t.Child = child.Process.Pid
	}
	line, _ := json.Marshal(t)
	log, err := os.OpenFile(conf.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return 3
	}
	_, _ = log.Write(append(line, '\n'))
	_ = log.Close()

	switch do {
	case "err":
		fmt.Print(`{"cniVersion":"1.0.0","code":11,"msg":"no address today","details":"try tomorrow"}`)
		return 1
	case "mutter":
		fmt.Fprint(os.Stderr, "segmentation fault, or so")
		return 2
	case "hang":
		time.Sleep(time.Hour)
	case "garbage":
		fmt.Print("done!")
		return 0
	case "version":
		fmt.Print(`{"cniVersion":"9.9.9","ips":[{"address":"10.1.2.3/24"}]}`)
		return 0
	case "no address":
		fmt.Printf(`{"cniVersion":%q,"interfaces":[{"name":"eth0"}],"ips":[{"interface":0,"address":"10.1.2.3/24"}]}`, conf.CNIVersion)
		return 0
	case "index":
		fmt.Printf(`{"cniVersion":%q,"ips":[{"interface":7,"address":"10.1.2.3/24"}]}`, conf.CNIVersion)
		return 0
	case "holes":
		fmt.Print(`{"cniVersion":"0.4.0","interfaces":[null],"ips":[null]}`) // libcni panicked
		return 0
	case "null":
		fmt.Print("null")
		return 0
	case "print", "print errors":
		out := map[string]*os.File{"print": os.Stdout, "print errors": os.Stderr}[do]
		for {
			_, _ = out.Write(bytes.Repeat([]byte("lorem ipsum "), 1000)) // an error does not stop it
		}
	case "die":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
	if t.Verb != "ADD" {
		return 0
	}
	if conf.Prev != nil {
		fmt.Printf("%s", conf.Prev)
		return 0
	}
	fmt.Printf(`{"cniVersion":%q,"interfaces":[{"name":"br0"},{"name":"eth0","sandbox":%q}],"ips":[`+
		`{"interface":1,"address":"fd00::3/64"},{"interface":0,"address":"10.9.9.9/24"},{"interface":1,"address":"10.1.2.3/24"}]}`, conf.CNIVersion, t.Netns)
	return 0
}

// world has a configuration directory, the stub as plugins "one" and "two", and its log.
type world struct {
	t              testing.TB
	conf, bin, log string
	scratch        string
}

func newWorld(t testing.TB) *world {
	dir := t.TempDir()
	w := &world{t: t, conf: dir + "/net.d", bin: dir + "/bin", log: dir + "/log", scratch: dir + "/scratch"}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{w.conf, w.bin} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"one", "two"} {
		if err := os.Symlink(self, filepath.Join(w.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// list is a configuration list of the given plugins; do is what the first does.
func (w *world) list(version, name string, do map[string]string, plugins ...string) string {
	var l []any
	for i, p := range plugins {
		c := map[string]any{"type": p, "log": w.log}
		if i == 0 {
			c["do"] = do
			c["capabilities"] = map[string]bool{"portMappings": true, "bandwidth": true, "dns": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true}
		}
		l = append(l, c)
	}
	b, err := json.Marshal(map[string]any{"cniVersion": version, "name": name, "plugins": l})
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

func (w *world) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.conf, name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// testLimits are short where a test waits for them.
var testLimits = limits{add: time.Minute, del: time.Minute, check: time.Minute, status: time.Minute, gc: time.Minute, confPeriod: 10 * time.Millisecond, statusPeriod: time.Hour}

func (w *world) open(l limits, change ...func(*Config)) *CNI {
	w.t.Helper()
	cfg := Config{ConfDir: w.conf, BinDirs: []string{w.bin}, ScratchDir: w.scratch}
	for _, c := range change {
		c(&cfg)
	}
	n, err := newCNI(cfg, l)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = n.Close()
		if left, err := os.ReadDir(w.scratch); err != nil || len(left) > 0 {
			w.t.Errorf("left in the scratch directory: %v %v", left, err)
		}
	})
	return n
}

// told is the log without what is of no verb of verbs.
func (w *world) told(verbs string) (l []told) {
	w.t.Helper()
	b, err := os.ReadFile(w.log)
	if err != nil && !os.IsNotExist(err) {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var t told
		if err := json.Unmarshal([]byte(line), &t); err != nil {
			w.t.Fatal(err)
		}
		if strings.Contains(verbs, t.Verb) {
			l = append(l, t)
		}
	}
	return l
}

// sequence is told, short.
func (w *world) sequence(verbs string) string {
	var l []string
	for _, t := range w.told(verbs) {
		l = append(l, t.Verb+" "+t.Plugin)
	}
	return strings.Join(l, ", ")
}

// until waits for what other goroutines do.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited for 20 s until %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
