package main

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/runtime/initproto"
	"github.com/crisp-cri/crisp/runtime/sys"
)

// A line that a full run root has torn costs that exit its line, and no other.
func TestJournalOnFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a tmpfs")
	}
	page := os.Getpagesize()
	mount, err := sys.CreateMount("tmpfs", [][2]string{{"size", itoa(2 * page)}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mount)
	open := func(name string, size int) int {
		fd, err := unix.Openat(mount, name, unix.O_CREAT|unix.O_APPEND|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if _, err := unix.Write(fd, []byte(strings.Repeat("\n", size))); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	j := journal{fd: open("journal", page-20)} // of the first line 20 bytes fit
	filler := open("filler", page)
	j.record(&initproto.Exited{ContainerID: "torn by a full disk"})
	j.record(&initproto.Exited{ContainerID: "lost"})
	if !j.torn {
		t.Fatal("no line was torn: the test tests nothing")
	}
	if err := unix.Ftruncate(filler, 0); err != nil {
		t.Fatal(err)
	}
	j.record(&initproto.Exited{ContainerID: "whole"})
	j.record(&initproto.Exited{ContainerID: "next"})
	b := make([]byte, 2*page)
	n, err := unix.Pread(j.fd, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, x := range initproto.ParseJournal(b[:n]) {
		got = append(got, x.ContainerID)
	}
	if strings.Join(got, " ") != "whole next" {
		t.Errorf("got %q, want whole and next", got)
	}
}
