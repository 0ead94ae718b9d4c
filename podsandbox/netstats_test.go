package podsandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const netDevHead = "Inter-|   Receive                                                |  Transmit\n" +
	" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n"

func nic(name string, from uint64) Interface {
	return Interface{Name: name, Rx: Traffic{from, from + 1, from + 2, from + 3}, Tx: Traffic{from + 4, from + 5, from + 6, from + 7}}
}

func nicLine(name string, from uint64) string {
	return fmt.Sprintf("%6s: %d %d %d %d 90 91 92 93 %d %d %d %d 94 95 96 97\n", name, from, from+1, from+2, from+3, from+4, from+5, from+6, from+7)
}

func TestParseNetDev(t *testing.T) {
	many, manyNICs := "", []Interface{nic("eth0", 7)}
	for i := range uint64(200) {
		many += nicLine(fmt.Sprintf("d%d", i), i)
		if len(manyNICs) < maxInterfaces {
			manyNICs = append(manyNICs, nic(fmt.Sprintf("d%d", i), i))
		}
	}
	for _, tt := range []struct {
		name, in string
		want     []Interface
	}{
		{"nothing", "", nil},
		{"headings", netDevHead, nil},
		{"loopback", netDevHead + nicLine("lo", 5), nil},
		{"a pod's", netDevHead + nicLine("lo", 5) + nicLine("eth0", 100), []Interface{nic("eth0", 100)}},
		{"the default one is first", nicLine("a", 1) + nicLine("eth0", 2) + nicLine("b", 3), []Interface{nic("eth0", 2), nic("a", 1), nic("b", 3)}},
		{"none is eth0", nicLine("net1", 1) + nicLine("a", 2), []Interface{nic("net1", 1), nic("a", 2)}},
		{"full counters", "eth0:18446744073709551615 1 2 3 0 0 0 0 4 5 6 7 0 0 0 0\n", []Interface{{Name: "eth0", Rx: Traffic{1<<64 - 1, 1, 2, 3}, Tx: Traffic{4, 5, 6, 7}}}},
		{"cut off", nicLine("eth0", 1) + "eth1: 1 2 3", []Interface{nic("eth0", 1)}},
		{"no numbers", "eth0: a 1 2 3 0 0 0 0 4 5 6 7 0 0 0 0\neth1: 1 1 2 3 0 0 0 0 4 5 6 -7 0 0 0 0\n", nil},
		{"no UTF-8", nicLine("\xff\xfe", 1) + nicLine("é", 2), []Interface{nic("é", 2)}},
		{"eth0 twice", nicLine("eth0", 1) + nicLine("eth0", 2), []Interface{nic("eth0", 1)}},
		{"more than are shown, the default one last", many + nicLine("eth0", 7), manyNICs},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := parseNetDev(tt.in); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func FuzzParseNetDev(f *testing.F) {
	f.Add(netDevHead + nicLine("lo", 5) + nicLine("eth0", 100))
	f.Add("eth0:1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n:\n a : b\n\xff: 1 2")
	f.Fuzz(func(t *testing.T, in string) {
		got := parseNetDev(in)
		if len(got) > maxInterfaces {
			t.Fatalf("got %d interfaces", len(got))
		}
		for i, nic := range got {
			if nic.Name == "" || nic.Name == "lo" || !utf8.ValidString(nic.Name) || strings.ContainsAny(nic.Name, ":\n") || !strings.Contains(in, nic.Name) {
				t.Errorf("got the name %q", nic.Name)
			}
			if nic.Name == defaultInterface && i > 0 {
				t.Errorf("%s is the %d. interface", nic.Name, i+1)
			}
		}
	})
}

func TestInterfacesOf(t *testing.T) {
	own := "/proc/thread-self/ns/net"
	got, err := interfacesOf(os.Getpid(), own)
	if err != nil {
		t.Fatal(err)
	}
	host, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, i := range host {
		names[i.Name] = true
	}
	for _, i := range got {
		if !names[i.Name] {
			t.Errorf("got %s, which the net package does not know: %v", i.Name, names)
		}
	}
	if len(names) > 1 && len(got) == 0 {
		t.Errorf("got none of %v", names)
	}

	// Of a process in another namespace than the pod's, whose pid it got.
	if _, err := interfacesOf(os.Getpid(), "/proc/thread-self/ns/uts"); !errors.Is(err, unix.ESRCH) {
		t.Errorf("another namespace: got %v, want ESRCH", err)
	}
	if _, err := interfacesOf(os.Getpid(), "/nowhere"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no pin: got %v", err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := interfacesOf(dead.Process.Pid, own); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		t.Errorf("a process that is gone: got %v", err)
	}
}

func TestCountDescriptors(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// A process with a pipe's end and a socket among what it has, which depends on who started the test.
	cmd := exec.Command("cat")
	cmd.ExtraFiles = []*os.File{r, file}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }() // it was killed
	// What it echoes shows that its loader has closed the libraries.
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	var files, sockets int64
	path := fmt.Sprintf("/proc/%d/fd/", cmd.Process.Pid)
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		files++
		if to, _ := os.Readlink(path + e.Name()); strings.HasPrefix(to, "socket:[") {
			sockets++
		}
	}
	if files < 5 || sockets < 1 {
		t.Fatalf("the process has %d descriptors, %d of them sockets; want at least 5 and 1", files, sockets)
	}
	for _, tt := range []struct {
		name                 string
		pids                 []int
		descriptors, sockets int64
	}{
		{"none", nil, 0, 0},
		{"one", []int{cmd.Process.Pid}, files, sockets},
		{"one of another PID namespace", []int{0, cmd.Process.Pid}, files, sockets},
		{"twice", []int{cmd.Process.Pid, cmd.Process.Pid}, 2 * files, 2 * sockets},
		{"one that is gone", []int{cmd.Process.Pid, 1 << 30}, files, sockets},
		{"too many", make([]int, maxProcesses+1), -1, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s ProcessStats
			s.countFiles(tt.pids)
			if s.Descriptors != tt.descriptors || s.Sockets != tt.sockets {
				t.Errorf("got %d descriptors, %d sockets; want %d, %d", s.Descriptors, s.Sockets, tt.descriptors, tt.sockets)
			}
		})
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if n, s := countDescriptors(int(dir.Fd()), 4); n != files || s != -1 {
		t.Errorf("more than are looked at: got %d, %d; want %d, -1", n, s, files)
	}
}

func TestPodStats(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	defer d.close()
	nics := []Interface{nic("eth0", 1)}
	var failure error
	var asked string
	d.readInterfaces = func(_ int, netNS string) ([]Interface, error) { asked = netNS; return nics, failure }
	id := d.run("p")
	s, err := d.PodStats(id)
	if err != nil || s.Cgroup == nil || s.ID != id || !reflect.DeepEqual(s.Interfaces, nics) {
		t.Errorf("got %+v, %v", s, err)
	}
	if want := d.mustPod(id).NetNSPath; asked != want {
		t.Errorf("asked for the interfaces of %q, want %q", asked, want)
	}
	if l, err := d.PodInterfaces(id); err != nil || !reflect.DeepEqual(l, nics) {
		t.Errorf("got %v, %v", l, err)
	}
	node := podConfig("node")
	node.Network = NamespaceNode
	nodeID, err := d.RunPod(context.Background(), node)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := d.PodStats(nodeID); err != nil || s.Interfaces != nil {
		t.Errorf("the node's network: got %+v, %v", s, err)
	}
	failure = fs.ErrNotExist
	if _, err := d.PodStats(id); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want what went wrong", err)
	}
	if err := d.StopPod(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func(string) error{
		"PodStats":      func(id string) error { _, err := d.PodStats(id); return err },
		"PodInterfaces": func(id string) error { _, err := d.PodInterfaces(id); return err },
	} {
		if err := call(id); !errors.Is(err, ErrState) {
			t.Errorf("%s of a stopped pod: got %v, want ErrState", name, err)
		}
		if err := call(strings.Repeat("f", 64)); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s of no pod: got %v, want ErrNotFound", name, err)
		}
	}
}

func TestProcessStats(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	defer d.close()
	pod := d.run("p")
	id := d.create(pod, "c")
	if _, err := d.ProcessStats(id); !errors.Is(err, ErrState) {
		t.Errorf("not started: got %v, want ErrState", err)
	}
	if err := d.StartContainer(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	// The fake's cgroups have no processes; what is read of some is in TestCountDescriptors and test/cri.
	if s, err := d.ProcessStats(id); err != nil || *s != (ProcessStats{}) {
		t.Errorf("got %+v, %v", s, err)
	}
	if _, err := d.ProcessStats(strings.Repeat("f", 64)); !errors.Is(err, ErrNotFound) {
		t.Errorf("no container: got %v, want ErrNotFound", err)
	}
}

func TestNotePodResources(t *testing.T) {
	w := newWorld(t)
	d := w.daemon(nil)
	id := d.run("p")
	note := func(d *daemon, want, text string) error {
		return d.NotePodResources(context.Background(), id, func(before []byte) ([]byte, error) {
			if string(before) != want {
				t.Errorf("before: got %q, want %q", before, want)
			}
			return []byte(text), nil
		})
	}
	if err := errors.Join(note(d, "", "one"), note(d, "one", "two")); err != nil {
		t.Fatal(err)
	}
	failure := errors.New("no")
	if err := d.NotePodResources(context.Background(), id, func([]byte) ([]byte, error) { return []byte("three"), failure }); !errors.Is(err, failure) {
		t.Errorf("got %v, want %v", err, failure)
	}
	d.close()
	d = w.daemon(nil)
	defer d.close()
	if got := string(d.mustPod(id).Resources); got != "two" {
		t.Errorf("after a restart: got %q, want two", got)
	}
	if err := d.StopPod(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	if err := note(d, "two", "three"); !errors.Is(err, ErrState) {
		t.Errorf("a stopped pod: got %v, want ErrState", err)
	}
	if got := string(d.mustPod(id).Resources); got != "two" {
		t.Errorf("stopped: got %q, want two", got)
	}
}
