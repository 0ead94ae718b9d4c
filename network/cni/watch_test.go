package cni

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/network"
)

func TestStatusFollowsDirectory(t *testing.T) {
	w := newWorld(t)
	n := w.open(testLimits)
	see := func(what string, ready bool, texts ...string) {
		t.Helper()
		var c network.Condition
		until(t, what, func() bool {
			c = n.Status()
			if c.Ready != ready || ready != (c.Reason == "") {
				return false
			}
			for _, s := range texts {
				if !strings.Contains(c.Message, s) {
					return false
				}
			}
			return true
		})
		if ready && len(texts) == 0 && c.Message != "" {
			t.Errorf("%s: got %+v", what, c)
		}
	}
	see("there is none", false, "no CNI configuration in "+w.conf)
	w.write("10.conflist", `{"name":"half`)
	see("half of one is written", false, "ignored 10.conflist: ")
	w.write("10.conflist", w.list("1.0.0", "net", nil, "one"))
	see("it is whole", true)
	w.write("05.conflist", "{")
	see("a bad one comes", true, "ignored 05.conflist: ")
	// The directory is replaced, as configuration managers do.
	if err := os.Rename(w.conf, w.conf+".old"); err != nil {
		t.Fatal(err)
	}
	see("the directory is gone", false, "no CNI configuration in "+w.conf)
	if err := os.Mkdir(w.conf, 0o700); err != nil {
		t.Fatal(err)
	}
	w.write("10.conflist", w.list("1.0.0", "new", nil, "one"))
	see("there is another directory", true)
	w.write("10.conflist", w.list("1.0.0", "new", nil, "absent"))
	see("a plugin is missing", false, `network "new" of `+w.conf+"/10.conflist", `CNI plugin "absent": no such program in `+w.bin)
}

func TestStatusVerb(t *testing.T) {
	w := newWorld(t)
	fast := testLimits
	fast.statusPeriod = 20 * time.Millisecond
	w.write("net.conflist", w.list("1.1.0", "net", map[string]string{"STATUS": "err"}, "one"))
	n := w.open(fast)
	until(t, "it errs", func() bool {
		c := n.Status()
		return !c.Ready && strings.Contains(c.Message, `CNI STATUS plugin "one": no address today`)
	})
	w.write("net.conflist", w.list("1.1.0", "net", nil, "one"))
	until(t, "it is well", func() bool { return n.Status().Ready })
	// No STATUS before CNI 1.1.
	if err := os.Remove(w.log); err != nil {
		t.Fatal(err)
	}
	w.write("net.conflist", w.list("1.0.0", "older", map[string]string{"STATUS": "err"}, "one"))
	until(t, "it is an older one", func() bool {
		l, a := n.now.Load().list, n.status.Load() // none while half of the file is written
		return l != nil && l.Name == "older" && a.list == l
	})
	if c := n.Status(); !c.Ready {
		t.Errorf("got %+v", c)
	}
}

// What STATUS said of a network still counts when only some other file is different.
func TestStatusOutlivesOtherFiles(t *testing.T) {
	w := newWorld(t)
	w.write("net.conflist", w.list("1.1.0", "net", nil, "one"))
	n := w.open(testLimits)
	until(t, "it is well", func() bool { return n.Status().Ready })
	before := n.now.Load().list
	w.write("05.conflist", "{")
	n.Refresh()
	if f := n.now.Load(); f.list != before || len(f.problems) != 1 {
		t.Errorf("got %+v, want the same list and a problem", f)
	}
}

// A plugin that hangs makes the network not ready; Status itself does not wait, nor do pods that plan.
func TestStatusHangs(t *testing.T) {
	w := newWorld(t)
	short := testLimits
	short.status = 200 * time.Millisecond
	w.write("net.conflist", w.list("1.1.0", "net", map[string]string{"STATUS": "hang"}, "one"))
	n := w.open(short)
	began := time.Now()
	c := n.Status()
	if took := time.Since(began); took > 100*time.Millisecond {
		t.Errorf("Status took %v", took)
	}
	if c.Ready || !strings.Contains(c.Message, "STATUS") {
		t.Errorf("got %+v", c)
	}
	_ = plan(t, n)
	until(t, "it is given up", func() bool { return strings.Contains(n.Status().Message, "no answer within 200ms") })
	for _, l := range w.told("STATUS") {
		gone(t, l.PID)
	}
}
