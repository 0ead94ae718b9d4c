package unpack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/image/fault"
	it "github.com/crisp-cri/crisp/image/imagetest"
)

// breakout is one of containerd's TestBreakouts (pkg/archive/tar_test.go), the
// regression tests of CVE-2021-32760 and its kin, in our words. before are the
// entries that containerd has on the disk already.
type breakout struct {
	name          string
	before, layer []it.Entry
	want          []string // lines of show, in the layer made of both; "!x": there is no x
	wantErr       error
}

var passwd = []it.Entry{it.Dir("etc", 0o770), it.File("/etc/passwd", "inside", 0o644)}

func with(before []it.Entry, more ...it.Entry) []it.Entry {
	return append(append([]it.Entry{}, before...), more...)
}

var breakouts = []breakout{
	{name: "SymlinkAbsolute", layer: []it.Entry{it.Dir("etc", 0o755), it.Symlink("/etc", "localetc"), it.File("/localetc/unbroken", "unbroken", 0o644)},
		want: []string{`etc/unbroken file 0644 0:0 "unbroken"`}},
	{name: "SymlinkUpAndOut", layer: []it.Entry{it.Dir("etc", 0o755), it.Dir("dummy", 0o755), it.Symlink("/dummy/../etc", "localetc"), it.File("/localetc/unbroken", "unbroken", 0o644)},
		want: []string{`etc/unbroken file 0644 0:0 "unbroken"`}},
	{name: "SymlinkMultipleAbsolute", layer: []it.Entry{it.Dir("etc", 0o755), it.Dir("dummy", 0o755), it.Symlink("/etc", "/dummy/etc"), it.Symlink("/dummy/etc", "localetc"), it.File("/dummy/etc/unbroken", "unbroken", 0o644)},
		want: []string{`etc/unbroken file 0644 0:0 "unbroken"`}},
	{name: "SymlinkMultipleRelative", layer: []it.Entry{it.Dir("etc", 0o755), it.Dir("dummy", 0o755), it.Symlink("/etc", "/dummy/etc"), it.Symlink("./dummy/etc", "localetc"), it.File("/localetc/unbroken", "unbroken", 0o644)},
		want: []string{`etc/unbroken file 0644 0:0 "unbroken"`}},
	{name: "SymlinkEmptyFile", layer: []it.Entry{it.Dir("etc", 0o755), it.File("etc/emptied", "notempty", 0o644), it.Symlink("/etc", "localetc"), it.File("/localetc/emptied", "", 0o644)},
		want: []string{`etc/emptied file 0644 0:0 ""`}},
	{name: "HardlinkRelative", layer: with(passwd, it.Dir("breakouts", 0o755), it.Symlink("../../etc", "breakouts/d1"), it.Link("/breakouts/d1/passwd", "breakouts/mypasswd")),
		want: []string{`breakouts/mypasswd file 0644 0:0 "inside" link#1`}},
	{name: "HardlinkDownAndOut", layer: with(passwd, it.Dir("breakouts", 0o755), it.Dir("downandout", 0o755), it.Symlink("../downandout/../../etc", "breakouts/d1"), it.Link("/breakouts/d1/passwd", "breakouts/mypasswd")),
		want: []string{`breakouts/mypasswd file 0644 0:0 "inside" link#1`}},
	{name: "HardlinkAbsolute", layer: with(passwd, it.Symlink("/etc", "localetc"), it.Link("/localetc/passwd", "localpasswd")),
		want: []string{`localpasswd file 0644 0:0 "inside" link#1`}},
	{name: "HardlinkRelativeLong", layer: with(passwd, it.Symlink("../../../../../../../etc", "localetc"), it.Link("/localetc/passwd", "localpasswd")),
		want: []string{`localpasswd file 0644 0:0 "inside" link#1`}},
	// "upandout" does not exist, so the link leads nowhere for the kernel;
	// containerd cleans it lexically.
	{name: "HardlinkRelativeUpAndOut", layer: with(passwd, it.Symlink("upandout/../../../etc", "localetc"), it.Link("/localetc/passwd", "localpasswd")),
		wantErr: fault.Corrupt},
	{name: "HardlinkDirectRelative", layer: with(passwd, it.Link("../../../../../etc/passwd", "localpasswd")),
		want: []string{`localpasswd file 0644 0:0 "inside" link#1`}},
	{name: "HardlinkDirectAbsolute", layer: with(passwd, it.Link("/etc/passwd", "localpasswd")),
		want: []string{`localpasswd file 0644 0:0 "inside" link#1`}},
	{name: "SymlinkParentDirectory", layer: with(passwd, it.Symlink("/etc/", ".."), it.Link("/etc/passwd", "localpasswd")), wantErr: fault.Corrupt},
	{name: "SymlinkEmptyFilename", layer: with(passwd, it.Symlink("/etc/", ""), it.Link("/etc/passwd", "localpasswd")), wantErr: fault.Corrupt},
	{name: "SymlinkParentRelative", layer: with(passwd, it.Symlink("/etc/", "localetc/sub/.."), it.Link("/etc/passwd", "/localetc/localpasswd")),
		want: []string{`etc/localpasswd file 0644 0:0 "inside" link#1`, "localetc symlink 0777 0:0 -> /etc/"}},
	{name: "SymlinkSlashEnded", layer: with(passwd, it.Dir("localetc/", 0o770), it.Link("/etc/passwd", "/localetc/localpasswd")),
		want: []string{`localetc/localpasswd file 0644 0:0 "inside" link#1`}},
	{name: "SymlinkOverrideDirectory", before: with(passwd, it.Dir("/localetc/", 0o755)), layer: []it.Entry{it.Symlink("/etc", "localetc"), it.Link("/etc/passwd", "/localetc/localpasswd")},
		want: []string{`etc/localpasswd file 0644 0:0 "inside" link#1`, "localetc symlink 0777 0:0 -> /etc"}},
	{name: "SymlinkOverrideDirectoryRelative", before: with(passwd, it.Dir("/localetc/", 0o755)), layer: []it.Entry{it.Symlink("../../etc", "localetc"), it.Link("/etc/passwd", "/localetc/localpasswd")},
		want: []string{`etc/localpasswd file 0644 0:0 "inside" link#1`}},
	{name: "DirectoryOverrideSymlink", before: with(passwd, it.Symlink("/etc", "localetc")), layer: []it.Entry{it.Dir("/localetc/", 0o755), it.Link("/etc/passwd", "/localetc/localpasswd")},
		want: []string{`localetc/localpasswd file 0644 0:0 "inside" link#1`}},
	{name: "DirectoryOverrideSymlinkAndHardlink", before: with(passwd, it.Symlink("etc", "localetc"), it.Link("/etc/passwd", "/localetc/localpasswd")),
		layer: []it.Entry{it.Dir("/localetc/", 0o755), it.File("/localetc/localpasswd", "different", 0o644)},
		want:  []string{`etc/passwd file 0644 0:0 "inside" link#1`, `localetc/localpasswd file 0644 0:0 "different"`}},
	{name: "WhiteoutRootParent", before: passwd, layer: []it.Entry{it.File(".wh...", "", 0o644)}, wantErr: fault.Corrupt},
	{name: "WhiteoutParent", before: passwd, layer: []it.Entry{it.File("etc/.wh...", "", 0o644)}, wantErr: fault.Corrupt},
	{name: "WhiteoutRoot", before: passwd, layer: []it.Entry{it.File(".wh..", "", 0o644)}, wantErr: fault.Corrupt},
	{name: "WhiteoutCurrentDirectory", before: passwd, layer: []it.Entry{it.File("etc/.wh..", "", 0o644)}, wantErr: fault.Corrupt},
	{name: "WhiteoutNothing", before: passwd, layer: []it.Entry{it.File("etc/.wh.", "", 0o644)}, wantErr: fault.Corrupt},
	{name: "WhiteoutNothingDirectory", before: passwd, layer: []it.Entry{it.Dir("etc/.wh./", 0o755)}, wantErr: fault.Corrupt},
	// A whiteout is for the layers below: in one layer it leaves the entries be.
	{name: "WhiteoutSymlink", before: with(passwd, it.Symlink("/etc", "localetc")), layer: []it.Entry{it.File(".wh.localetc", "", 0o644)},
		want: []string{`etc/passwd file 0644 0:0 "inside"`, "localetc symlink 0777 0:0 -> /etc"}},
	{name: "WhiteoutSymlinkPath", before: with(passwd, it.File("/etc/whitedout", "ahhhh whiteout", 0o644), it.Symlink("/etc", "localetc")), layer: []it.Entry{it.File("localetc/.wh.whitedout", "", 0o644)},
		want: []string{`etc/passwd file 0644 0:0 "inside"`, `etc/whitedout file 0644 0:0 "ahhhh whiteout"`}},
	{name: "WhiteoutDirectoryName", before: with(passwd, it.Symlink("/etc", "localetc")), layer: []it.Entry{it.File(".wh.etc/somefile", "non-empty", 0o644)},
		want: []string{`etc/passwd file 0644 0:0 "inside"`, `.wh.etc/somefile file 0644 0:0 "non-empty"`}},
	{name: "WhiteoutDeadSymlinkParent", before: with(passwd, it.Symlink("/dne", "localetc")), layer: []it.Entry{it.File("localetc/.wh.etc", "", 0o644)}, wantErr: fault.Corrupt},
	{name: "WhiteoutRelativePath", before: passwd, layer: []it.Entry{it.File("dne/../.wh.etc", "", 0o644)},
		want: []string{`etc dir 0770 0:0 trusted.overlay.opaque="y"`}},
	{name: "WhiteoutOpaqueThroughSymlink", before: with(passwd, it.Symlink("../../etc", "localetc")), layer: []it.Entry{it.File("localetc/.wh..wh..opq", "", 0o644)},
		want: []string{`etc dir 0770 0:0 trusted.overlay.opaque="y"`}},
	{name: "HardlinkSymlinkBeforeCreateTarget", layer: []it.Entry{it.Dir("etc", 0o770), it.Symlink("/etc/passwd", "localpasswd"), it.Link("localpasswd", "localpasswd-dup"), it.File("/etc/passwd", "after", 0o644)},
		want: []string{`etc/passwd file 0644 0:0 "after"`, "localpasswd-dup symlink 0777 0:0 -> /etc/passwd link#1"}},
	{name: "HardlinkSymlinkRelative", layer: with(passwd, it.Symlink("../../../../../etc/passwd", "passwdlink"), it.Link("/passwdlink", "localpasswd")),
		want: []string{"localpasswd symlink 0777 0:0 -> ../../../../../etc/passwd link#1"}},
	{name: "HardlinkSymlinkAbsolute", layer: with(passwd, it.Symlink("/etc/passwd", "passwdlink"), it.Link("/passwdlink", "localpasswd")),
		want: []string{"localpasswd symlink 0777 0:0 -> /etc/passwd link#1"}},
	{name: "HardlinkSymlinkChmod", layer: []it.Entry{it.Symlink("/etc/passwd", "/also/outside"), it.Link("/also/outside", "sketchylink").With(func(e *it.Entry) { e.Mode = 0o6777 })},
		want: []string{"sketchylink symlink 0777 0:0 -> /etc/passwd link#1"}},
}

// TestSEC61Breakouts: containerd's breakouts (its hard links over symbolic
// links, CVE-2021-32760, among them), in one layer.
func TestSEC61Breakouts(t *testing.T) {
	for _, b := range breakouts {
		t.Run(b.name, func(t *testing.T) {
			needRoot(t)
			root := newRoot(t)
			c := newCanary(t, root)
			_, err := unpackInto(root, it.Tar(append(append([]it.Entry{}, b.before...), b.layer...)...), Limits{})
			c.check(t)
			if !errors.Is(err, b.wantErr) {
				t.Fatalf("got error %v, want %v", err, b.wantErr)
			}
			if err != nil {
				return
			}
			got := show(t, root)
			for _, line := range b.want {
				if !strings.Contains("\n"+got, "\n"+line) {
					t.Errorf("got tree\n%swant a line %q", got, line)
				}
			}
		})
	}
}

func newRoot(t testing.TB) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "layer", "fs")
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	return root
}

// TestSEC61BreakoutsSplit: the same over two layers, merged by overlayfs.
func TestSEC61BreakoutsSplit(t *testing.T) {
	for _, b := range breakouts {
		t.Run(b.name, func(t *testing.T) {
			needRoot(t)
			lower, upper := newRoot(t), newRoot(t)
			cl, cu := newCanary(t, lower), newCanary(t, upper)
			half := len(b.layer) / 2
			first, second := with(b.before, b.layer[:half]...), b.layer[half:]
			_, errLower := unpackInto(lower, it.Tar(first...), Limits{})
			result, errUpper := layerInto(upper, it.Tar(second...), Limits{})
			cl.check(t)
			cu.check(t)
			if errLower != nil || errUpper != nil {
				return // an error is fine: a link's target may be in the other half
			}
			tie := newRoot(t)
			ct := newCanary(t, tie)
			if _, _, err := Tie(t.Context(), upper, []string{lower}, result.ImpliedRoot, result.Loose, tie); err != nil && !errors.Is(err, fault.Corrupt) {
				t.Errorf("got %v, want none or %v", err, fault.Corrupt)
			}
			show(t, overlay(t, tie, upper, lower)) // can be walked
			cl.check(t)
			cu.check(t)
			ct.check(t)
		})
	}
}

// TestSEC61Matrix: every way to make "lnk" lead elsewhere, then every operation
// on lnk itself and below it.
func TestSEC61Matrix(t *testing.T) {
	needRoot(t)
	leads := map[string][]it.Entry{
		"absolute":        {it.Symlink("/etc", "lnk")},
		"up":              {it.Symlink("../../../../../../../../etc", "lnk")},
		"up one":          {it.Symlink("../etc", "lnk")},
		"chained":         {it.Symlink("/etc", "a"), it.Symlink("a", "b"), it.Symlink("../b", "lnk")},
		"over directory":  {it.Dir("lnk", 0o755), it.File("lnk/f", "", 0o644), it.Symlink("../../etc", "lnk")},
		"linked":          {it.Symlink("/etc", "a"), it.Link("a", "lnk")},
		"below directory": {it.Dir("d", 0o755), it.Symlink("../../../etc", "d/s"), it.Symlink("d/s", "lnk")},
		"to a magic link": {it.Symlink("/proc/self/root/etc", "lnk")},
		"to a descriptor": {it.Symlink("/proc/self/fd/3/../etc", "lnk")},
		"to the file":     {it.Symlink("/etc/passwd", "lnk")},
	}
	operations := map[string]func(name string) []it.Entry{
		"file":     func(n string) []it.Entry { return []it.Entry{it.File(n, "evil", 0o6777)} },
		"large":    func(n string) []it.Entry { return []it.Entry{it.File(n, strings.Repeat("x", 100_000), 0o644)} },
		"dir":      func(n string) []it.Entry { return []it.Entry{it.Dir(n, 0o7777).Owned(1, 1)} },
		"symlink":  func(n string) []it.Entry { return []it.Entry{it.Symlink("x", n)} },
		"linkTo":   func(n string) []it.Entry { return []it.Entry{it.Link(n, "stolen")} },
		"linkFrom": func(n string) []it.Entry { return []it.Entry{it.File("mine", "evil", 0o644), it.Link("mine", n)} },
		"char":     func(n string) []it.Entry { return []it.Entry{it.Char(n, 0o666, 1, 3)} },
		"fifo":     func(n string) []it.Entry { return []it.Entry{it.Fifo(n, 0o666)} },
		"xattr":    func(n string) []it.Entry { return []it.Entry{it.Dir(n, 0o755).Xattr("user.evil", "1")} },
		"whiteout": func(n string) []it.Entry { return []it.Entry{it.File(n+"/.wh.passwd", "", 0)} },
		"opaque":   func(n string) []it.Entry { return []it.Entry{it.File(n+"/.wh..wh..opq", "", 0)} },
	}
	// One canary for all roots, which are side by side.
	top := filepath.Join(t.TempDir(), "layers")
	if err := os.Mkdir(top, 0o700); err != nil {
		t.Fatal(err)
	}
	c := newCanary(t, filepath.Join(top, "0"))
	roots := 0
	for leadName, lead := range leads {
		for opName, op := range operations {
			for _, name := range []string{"lnk", "lnk/passwd", "lnk/new", "lnk/sub/deep", "lnk/../../etc/passwd"} {
				t.Run(fmt.Sprintf("%s/%s/%s", leadName, opName, strings.ReplaceAll(name, "/", "_")), func(t *testing.T) {
					for _, etc := range [][]it.Entry{nil, passwd} { // with and without an etc in the layer
						roots++
						root := filepath.Join(top, fmt.Sprint(roots))
						if err := os.Mkdir(root, 0o700); err != nil {
							t.Fatal(err)
						}
						_, _ = unpackInto(root, it.Tar(append(append([]it.Entry{}, etc...), append(lead, op(name)...)...)...), Limits{})
						c.check(t)
						if _, err := os.Stat(filepath.Join(root, "stolen")); err == nil && etc == nil {
							if text, err := os.ReadFile(filepath.Join(root, "stolen")); err == nil && strings.Contains(string(text), "canary") {
								t.Error("a file from outside is in the layer")
							}
						}
					}
				})
			}
		}
	}
}

// TestSEC60Names: names that try to lead out, and odd ones.
func TestSEC60Names(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct{ name, in, want string }{
		{"up", "../x", "x"},
		{"absolute", "/x", "x"},
		{"up in the middle", "a/../../x", "x"},
		{"many slashes", "a//..//..//x", "x"},
		{"dots only", "./././x", "x"},
		{"not UTF-8", "x\xff\xfe", "x\xff\xfe"},
		{"newline", "x\ny", "x\ny"},
		{"deep up", strings.Repeat("../", 1000) + "x", "x"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := newRoot(t)
			c := newCanary(t, root)
			_, err := unpackInto(root, it.Tar(it.File(tt.in, "content", 0o644).PAX("comment", "forces PAX").With(func(e *it.Entry) {
				if strings.Contains(tt.in, "\xff") {
					e.PAXRecords, e.Format = nil, 0
				}
			})), Limits{})
			c.check(t)
			if err != nil {
				t.Fatal(err)
			}
			if text, err := os.ReadFile(filepath.Join(root, tt.want)); err != nil || string(text) != "content" {
				t.Errorf("got %q, %v", text, err)
			}
		})
	}
	for _, tt := range []struct {
		name string
		in   it.Entry
		want error
	}{
		{"4097 bytes", it.File(strings.Repeat("d/", 2048)+"x", "", 0o644), fault.Limit},
		{"component of 256 bytes", it.File(strings.Repeat("x", 256), "", 0o644), unix.ENAMETOOLONG},
		{"file called dot", it.File(".", "x", 0o644), fault.Corrupt},
		{"file called nothing", it.File("", "", 0o644), fault.Corrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := newRoot(t)
			if _, err := unpackInto(root, it.Tar(tt.in), Limits{}); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	// A NUL ends a name in the header (tar(5)); in a PAX record it is refused.
	t.Run("NUL", func(t *testing.T) {
		raw := it.Tar(it.File("xx", "", 0o644).PAX("comment", "path=abcdefgh"))
		raw = []byte(strings.ReplaceAll(string(raw), "25 comment=path=abcdefgh\n", "25 path=../../etc/abcde\x00\n"))
		root := newRoot(t)
		c := newCanary(t, root)
		_, err := unpackInto(root, raw, Limits{})
		c.check(t)
		if err == nil {
			t.Errorf("got no error, tree\n%s", show(t, root))
		}
	})
}

// TestSEC63Root: the root directory as something else (CVE-2021-29136).
func TestSEC63Root(t *testing.T) {
	for _, name := range []string{".", "/.", "./.", "a/..", "../.."} {
		for kind, e := range map[string]it.Entry{
			"symlink": it.Symlink("/etc", name), "link": it.Link("etc", name), "char": it.Char(name, 0o644, 1, 3), "fifo": it.Fifo(name, 0o644),
			"file": it.File(name, "x", 0o644),
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				needRoot(t)
				root := newRoot(t)
				c := newCanary(t, root)
				_, err := unpackInto(root, it.Tar(it.Dir("etc", 0o755), e, it.File("etc/x", "", 0o644)), Limits{})
				c.check(t)
				if !errors.Is(err, fault.Corrupt) {
					t.Errorf("got %v, want %v", err, fault.Corrupt)
				}
				if fi, err := os.Lstat(root); err != nil || !fi.IsDir() {
					t.Errorf("the root is %v, %v", fi, err)
				}
			})
		}
	}
}

// TestSEC62Parallel: layers that swap a directory and a symbolic link, unpacked
// side by side many times (CVE-2025-47290 was a race between them).
func TestSEC62Parallel(t *testing.T) {
	needRoot(t)
	top := t.TempDir()
	c := newCanary(t, filepath.Join(top, "0-0", "fs"))
	var archive []it.Entry
	for range 3 {
		archive = append(archive, it.Dir("d", 0o755), it.File("d/passwd", "evil", 0o644), it.Symlink("../../etc", "d"), it.File("d/passwd2", "evil", 0o644),
			it.Dir("e", 0o755), it.Symlink("../etc", "e"), it.Dir("etc", 0o755), it.Fifo("e/pipe", 0o644))
	}
	// "e/pipe" through "../etc" is etc/pipe inside; "d/passwd2" through "../../etc" is etc/passwd2 inside.
	archive = append([]it.Entry{it.Dir("etc", 0o755)}, archive...)
	bytes := it.Tar(archive...)
	const parallel, rounds = 8, 25
	var wg sync.WaitGroup
	for p := range parallel {
		wg.Go(func() {
			for r := range rounds {
				root := filepath.Join(top, fmt.Sprintf("%d-%d", p, r), "fs")
				if err := os.MkdirAll(root, 0o700); err != nil {
					t.Error(err)
					return
				}
				if _, err := unpackInto(root, bytes, Limits{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	c.check(t)
}

// TestSEC65Overlay: what only the runtime may say to overlayfs.
func TestSEC65Overlay(t *testing.T) {
	root, _, err := unpackEntries(t,
		it.Dir("d", 0o755).Xattr("trusted.overlay.redirect", "/etc").Xattr("trusted.overlay.opaque", "y").Xattr("user.overlay.opaque", "y").Xattr("user.kept", "1"),
		it.File("f", "x", 0o755).Xattr("trusted.overlay.metacopy", "").Xattr("trusted.overlay.origin", "x").
			Xattr("security.selinux", "system_u:object_r:shadow_t:s0").Xattr("security.ima", "x").
			Xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
	)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"d": "[user.kept]", "f": "[security.capability]"} {
		if got := fmt.Sprint(xattrsOf(filepath.Join(root, path))); got != want {
			t.Errorf("%s: got %s, want %s", path, got, want)
		}
	}
	for name, e := range map[string]it.Entry{"char": it.Char("w", 0o644, 0, 0), "below": it.Char("d/w", 0, 0, 0)} {
		if _, _, err := unpackEntries(t, e); !errors.Is(err, fault.Corrupt) {
			t.Errorf("%s 0:0: got %v, want %v", name, err, fault.Corrupt)
		}
	}
	// A whiteout cannot be copied to another name by linking to it.
	if _, _, err := unpackEntries(t, it.File(".wh.w", "", 0), it.Link("w", "x")); !errors.Is(err, fault.Corrupt) {
		t.Errorf("link to a whiteout: got %v, want %v", err, fault.Corrupt)
	}
}
