package user

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const passwd = `root:x:0:0:root:/root:/bin/sh
# a comment
  www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
app:x:1000:1000:App:/home/app:/bin/sh
again:x:1000:7:same uid, second line:/nowhere:/bin/sh
short:x:1001:1001
bad:x:what:0::/:
badgid:x:1002:4294967296::/:
huge:x:4294967296:0::/:
nul:x:1003:1003::/a` + "\x00" + `b:
no colons at all

2147483648:x:0:0::/root:
4294967295:x:0:0::/root:
4294967296:x:0:0::/root:
-1:x:0:0::/root:
00:x:0:0::/root:
0x0:x:0:0::/root:
1e3:x:0:0::/root:
1 :x:0:0::/root:
+0:x:0:0::/root:
1000000000000000000000000000000:x:0:0::/root:
`

const group = `root:x:0:
app:x:1000:
# comment:x:1:app
staff:x:50:app,www-data
blocked:x:60:other,app
unreadable:x:sixty:app2
empty:x:61
4294967296:x:0:
1e3:x:0:
`

// container makes a root directory and opens it as crisp does.
func container(t testing.TB, files map[string]string) *os.File {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return openRoot(t, dir)
}

func openRoot(t testing.TB, dir string) *os.File {
	t.Helper()
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func full(t testing.TB) *os.File {
	return container(t, map[string]string{"passwd": passwd, "group": group})
}

func ptr(n int64) *int64 { return &n }

func TestResolve(t *testing.T) {
	app := func(groups ...uint32) Identity {
		return Identity{UID: 1000, GID: 1000, Groups: groups, Home: "/home/app", Username: "app"}
	}
	tests := []struct {
		name string
		in   Request
		want Identity
		err  error
	}{
		{"nothing said", Request{}, Identity{Home: "/root", Username: "root", Groups: []uint32{0}}, nil},
		{"image uid", Request{ImageUser: "1000"}, app(50, 60, 1000), nil},
		{"image name", Request{ImageUser: "app"}, app(50, 60, 1000), nil},
		{"image uid and gid", Request{ImageUser: "1000:7"}, Identity{UID: 1000, GID: 7, Groups: []uint32{7, 50, 60}, Home: "/home/app", Username: "app"}, nil},
		{"image name and group", Request{ImageUser: "app:staff"}, Identity{UID: 1000, GID: 50, Groups: []uint32{50, 60}, Home: "/home/app", Username: "app"}, nil},
		{"image uid and group", Request{ImageUser: "5:staff"}, Identity{UID: 5, GID: 50, Groups: []uint32{50}, Home: "/"}, nil},
		{"uid nobody has", Request{UID: ptr(12345)}, Identity{UID: 12345, Groups: []uint32{0}, Home: "/"}, nil},
		{"largest uid", Request{UID: ptr(MaxID), GID: ptr(MaxID)}, Identity{UID: MaxID, GID: MaxID, Groups: []uint32{MaxID}, Home: "/"}, nil},
		{"run_as_user wins", Request{UID: ptr(33), Username: "app", ImageUser: "root"},
			Identity{UID: 33, GID: 33, Groups: []uint32{33, 50}, Home: "/var/www", Username: "www-data"}, nil},
		{"run_as_user forgets the image's group", Request{UID: ptr(33), ImageUser: "app:blocked"},
			Identity{UID: 33, GID: 33, Groups: []uint32{33, 50}, Home: "/var/www", Username: "www-data"}, nil},
		{"run_as_username wins over the image", Request{Username: "www-data", ImageUser: "root"},
			Identity{UID: 33, GID: 33, Groups: []uint32{33, 50}, Home: "/var/www", Username: "www-data"}, nil},
		{"run_as_username may be a number", Request{Username: "1000"}, app(50, 60, 1000), nil},
		{"run_as_group", Request{UID: ptr(1000), GID: ptr(7)}, Identity{UID: 1000, GID: 7, Groups: []uint32{7, 50, 60}, Home: "/home/app", Username: "app"}, nil},
		{"run_as_group 0", Request{Username: "app", GID: ptr(0)}, Identity{UID: 1000, Groups: []uint32{0, 50, 60}, Home: "/home/app", Username: "app"}, nil},
		{"short line", Request{UID: ptr(1001)}, Identity{UID: 1001, GID: 1001, Groups: []uint32{1001}, Home: "/", Username: "short"}, nil},
		{"home with NUL", Request{UID: ptr(1003)}, Identity{UID: 1003, GID: 1003, Groups: []uint32{1003}, Home: "/", Username: "nul"}, nil},

		// SEC-44: supplementary groups.
		{"supplemental, merge", Request{UID: ptr(1000), SupplementalGroups: []int64{1234, 50, 1234}}, app(50, 60, 1000, 1234), nil},
		{"supplemental, strict", Request{UID: ptr(1000), SupplementalGroups: []int64{1234}, Strict: true}, app(1000, 1234), nil},
		{"strict alone", Request{UID: ptr(1000), Strict: true}, app(1000), nil},
		{"strict with an image group by name", Request{ImageUser: "app:staff", Strict: true},
			Identity{UID: 1000, GID: 50, Groups: []uint32{50}, Home: "/home/app", Username: "app"}, nil},
		{"strict with run_as_group", Request{UID: ptr(1000), GID: ptr(7), SupplementalGroups: []int64{9}, Strict: true},
			Identity{UID: 1000, GID: 7, Groups: []uint32{7, 9}, Home: "/home/app", Username: "app"}, nil},
		{"the primary group is one of the groups", Request{UID: ptr(12345), GID: ptr(60)}, Identity{UID: 12345, GID: 60, Groups: []uint32{60}, Home: "/"}, nil},
		{"no comment is a group", Request{UID: ptr(1000), SupplementalGroups: []int64{1}, Strict: true}, app(1, 1000), nil},

		{"group without user", Request{GID: ptr(7)}, Identity{}, ErrInvalid},
		{"group with the image's user", Request{GID: ptr(7), ImageUser: "app"}, Identity{}, ErrInvalid},
		{"negative uid", Request{UID: ptr(-1)}, Identity{}, ErrInvalid},
		{"uid out of range", Request{UID: ptr(1 << 31)}, Identity{}, ErrInvalid},
		{"uid that wraps to 0", Request{UID: ptr(1 << 32)}, Identity{}, ErrInvalid},
		{"gid out of range", Request{UID: ptr(1), GID: ptr(1 << 31)}, Identity{}, ErrInvalid},
		{"supplemental group out of range", Request{UID: ptr(1), SupplementalGroups: []int64{1 << 32}}, Identity{}, ErrInvalid},
		{"too many groups", Request{UID: ptr(1), SupplementalGroups: many(maxGroups)}, Identity{}, ErrInvalid},
		{"unknown user", Request{Username: "nobody-here"}, Identity{}, ErrNotFound},
		{"unknown group", Request{ImageUser: "app:nogroup"}, Identity{}, ErrNotFound},
		{"commented out group", Request{ImageUser: "app:# comment"}, Identity{}, ErrInvalid},
		{"group of an unreadable line", Request{ImageUser: "app:unreadable"}, Identity{}, ErrFile},
		{"user whose uid is no number", Request{Username: "bad"}, Identity{}, ErrFile},
		{"user whose uid is too large", Request{Username: "huge"}, Identity{}, ErrFile},
		{"user whose gid is too large", Request{Username: "badgid"}, Identity{}, ErrFile},
		{"run_as_username with a group", Request{Username: "app:staff"}, Identity{}, ErrInvalid},
		{"USER with an empty user", Request{ImageUser: ":50"}, Identity{}, ErrInvalid},
		{"USER with an empty group", Request{ImageUser: "1000:"}, Identity{}, ErrInvalid},
		{"USER in three parts", Request{ImageUser: "1:2:3"}, Identity{}, ErrInvalid},
		{"USER with a newline", Request{ImageUser: "app\n"}, Identity{}, ErrInvalid},
		{"USER without end", Request{ImageUser: strings.Repeat("x", 1<<20)}, Identity{}, ErrInvalid},
	}
	root := full(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Resolve(root, tt.in)
			if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if n := len(fmt.Sprint(err)); n > 500 {
				t.Errorf("got an error of %d bytes", n)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("want -, got +\n%s", d)
			}
		})
	}
}

func many(n int) []int64 {
	l := make([]int64, n)
	for i := range l {
		l[i] = int64(i + 10)
	}
	return l
}

// SEC-41: what looks like a number is one, or an error, although passwd maps each of these strings to root.
func TestNumbersAreNotNames(t *testing.T) {
	root := full(t)
	for _, user := range []string{
		"2147483648", "4294967295", "4294967296", "-1", "00", "0x0", "1e3", "1 ", "+0", "0 ", "01", "-0", "1_0",
		"1:4294967296", "1:1e3", "1:-1", "1000000000000000000000000000000",
	} {
		for name, r := range map[string]Request{"USER": {ImageUser: user}, "run_as_username": {Username: user}} {
			if got, err := Resolve(root, r); !errors.Is(err, ErrInvalid) {
				t.Errorf("%s %q: got %+v, %v, want ErrInvalid", name, user, got, err)
			}
		}
		if uid, name, err := ImageUser(user); !errors.Is(err, ErrInvalid) {
			t.Errorf("ImageUser(%q): got %v, %q, %v, want ErrInvalid", user, uid, name, err)
		}
	}
}

func TestImageUser(t *testing.T) {
	tests := []struct {
		in   string
		uid  *int64
		name string
	}{
		{"", nil, ""},
		{"0", ptr(0), ""},
		{"1000", ptr(1000), ""},
		{"1003:1004", ptr(1003), ""},
		{"1003:staff", ptr(1003), ""},
		{"www-data", nil, "www-data"},
		{"www-data:1004", nil, "www-data"},
		{"Jürgen", nil, "Jürgen"},
		{"2147483647", ptr(MaxID), ""},
	}
	for _, tt := range tests {
		uid, name, err := ImageUser(tt.in)
		if err != nil || name != tt.name || (uid == nil) != (tt.uid == nil) || uid != nil && *uid != *tt.uid {
			t.Errorf("ImageUser(%q): got %v, %q, %v", tt.in, uid, name, err)
		}
	}
}

func TestMissingFiles(t *testing.T) {
	roots := map[string]*os.File{"empty files": container(t, map[string]string{"passwd": "", "group": ""}), "no files": container(t, nil)}
	roots["no etc"] = openRoot(t, t.TempDir())
	odd := t.TempDir()
	if err := os.WriteFile(filepath.Join(odd, "etc"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	roots["etc is a file"] = openRoot(t, odd)
	for name, root := range roots {
		got, err := Resolve(root, Request{UID: ptr(1000), GID: ptr(7), SupplementalGroups: []int64{9}})
		if want := (Identity{UID: 1000, GID: 7, Groups: []uint32{7, 9}, Home: "/"}); err != nil || !cmp.Equal(got, want) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, want)
		}
		if got, err := Resolve(root, Request{ImageUser: "root"}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %+v, %v, want ErrNotFound for a name", name, got, err)
		}
		if got, err := Resolve(root, Request{ImageUser: "1:staff"}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %+v, %v, want ErrNotFound for a group", name, got, err)
		}
	}
}

// SEC-42: files that are no files, or too many bytes. Each in both places, for a name and for a number.
func TestHostileFiles(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "host-fifo")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	makes := map[string]func(t *testing.T, path string) error{
		"FIFO":      func(_ *testing.T, p string) error { return unix.Mkfifo(p, 0o666) },
		"directory": func(_ *testing.T, p string) error { return os.Mkdir(p, 0o755) },
		"socket": func(t *testing.T, p string) error {
			t.Chdir(filepath.Dir(p)) // socket paths are short
			l, err := net.Listen("unix", filepath.Base(p))
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return err
		},
		"2 GiB sparse": func(_ *testing.T, p string) error {
			if err := os.WriteFile(p, nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(p, 2<<30)
		},
		"one long line": func(_ *testing.T, p string) error {
			return os.WriteFile(p, []byte("app:x:1000:1000:"+strings.Repeat("a", maxLine)), 0o644)
		},
		"ten million members": func(_ *testing.T, p string) error {
			return os.WriteFile(p, []byte("g:x:1:"+strings.Repeat("m,", 5_000_000)), 0o644)
		},
		"more than 10 MiB": func(_ *testing.T, p string) error {
			return os.WriteFile(p, []byte(strings.Repeat("x:x:5:5:::\n", 1_000_000)), 0o644)
		},
		"link in a circle": func(_ *testing.T, p string) error { return os.Symlink(filepath.Base(p), p) },
	}
	for kind, mk := range makes {
		for _, file := range []string{"passwd", "group"} {
			t.Run(kind+"/"+file, func(t *testing.T) {
				dir := t.TempDir()
				if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
					t.Fatal(err)
				}
				other := map[string]string{"passwd": group, "group": passwd}[file]
				name := map[string]string{"passwd": "group", "group": "passwd"}[file]
				if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(other), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := mk(t, filepath.Join(dir, "etc", file)); err != nil {
					t.Fatal(err)
				}
				root := openRoot(t, dir)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				begin := time.Now()
				_, err := Resolve(root, Request{UID: ptr(1000)})
				if err == nil || !errors.Is(err, ErrFile) && !errors.Is(err, unix.ELOOP) {
					t.Errorf("got %v, want ErrFile", err)
				}
				if d := time.Since(begin); d > 5*time.Second {
					t.Errorf("took %v", d)
				}
				runtime.ReadMemStats(&after)
				if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
					t.Errorf("allocated %d bytes", n)
				}
			})
		}
	}
	// Links that would leave the root: what they name inside is not there, so neither is the file.
	for _, target := range []string{fifo, "/dev/zero", "/proc/kcore", "/proc/self/environ", "../../../../../../../../../../../etc/hosts"} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(dir, "etc/passwd")); err != nil {
			t.Fatal(err)
		}
		got, err := Resolve(openRoot(t, dir), Request{UID: ptr(0)})
		if want := (Identity{Home: "/", Groups: []uint32{0}}); err != nil || !cmp.Equal(got, want) {
			t.Errorf("passwd -> %s: got %+v, %v, want as without it", target, got, err)
		}
	}
	// A link within the root is followed as the container would.
	dir := t.TempDir()
	for _, d := range []string{"etc", "real"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/real/../real/passwd", filepath.Join(dir, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "real/passwd"), []byte(passwd), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := Resolve(openRoot(t, dir), Request{Username: "app"}); err != nil || got.UID != 1000 {
		t.Errorf("absolute link: got %+v, %v", got, err)
	}
}

// FuzzResolve: no spec and no files lead to an identity out of range, or to root through a number that is not 0.
func FuzzResolve(f *testing.F) {
	for _, user := range []string{"", "app", "1000:50", "4294967296", "huge", "0x0", "app:staff", "www-data:blocked"} {
		f.Add(user, passwd, group, false)
	}
	f.Add("a", "a:x:1:2:::\na:x:0:0:::", "g:x:3:a,a", true)
	dir := f.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		f.Fatal(err)
	}
	root := openRoot(f, dir)
	f.Fuzz(func(t *testing.T, user, passwd, group string, strict bool) {
		for name, data := range map[string]string{"passwd": passwd, "group": group} {
			if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := Resolve(root, Request{ImageUser: user, Strict: strict})
		uid, name, imageErr := ImageUser(user)
		if (imageErr != nil) != errors.Is(err, ErrInvalid) {
			t.Fatalf("Resolve says %v, ImageUser %v", err, imageErr)
		}
		if err != nil {
			return
		}
		if got.UID > MaxID || got.GID > MaxID || got.Home == "" {
			t.Fatalf("got %+v", got)
		}
		if uid != nil && int64(got.UID) != *uid {
			t.Fatalf("got uid %d, ImageStatus says %d", got.UID, *uid)
		}
		if name != "" && got.Username != name {
			t.Fatalf("got %+v, ImageStatus says %q", got, name)
		}
		if !slices.Contains(got.Groups, got.GID) || !slices.IsSorted(got.Groups) {
			t.Fatalf("got groups %v with gid %d", got.Groups, got.GID)
		}
		if strict && len(got.Groups) != 1 {
			t.Fatalf("strict: got groups %v", got.Groups)
		}
	})
}
