package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/crisp-cri/crisp/image/fault"
	it "github.com/crisp-cri/crisp/image/imagetest"
)

// TestLayer: each kind of entry, and what becomes of its attributes. The
// process's umask must not matter.
func TestLayer(t *testing.T) {
	needRoot(t)
	defer syscall.Umask(syscall.Umask(0o177))
	large := strings.Repeat("0123456789abcdef", smallFile/16+1)
	root, result, err := unpackEntries(t,
		it.Dir("./", 0o711).Owned(5, 6),
		it.Dir("bin", 0o755), it.File("bin/su", "su", 0o4755).Owned(0, 10), it.File("bin/sg", "sg", 0o2755).Owned(1, 2), it.File("bin/large", large, 0o6711).Owned(3, 4),
		it.Dir("tmp", 0o1777), it.Dir("shared", 0o2775).Owned(0, 50), it.File("shared/f", "", 0o664), it.Dir("shared/d", 0o755),
		it.Link("bin/su", "bin/su2"), it.Symlink("su", "bin/su3").Owned(7, 8),
		it.Char("null", 0o666, 1, 3).Owned(0, 9), it.Block("disk", 0o660, 8, 17), it.Fifo("pipe", 0o622),
		it.File("implied/dir/file", "x", 0o600),
		it.File("cap", "", 0o755).Owned(1, 1).Xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
	)
	if err != nil {
		t.Fatal(err)
	}
	want := `. dir 0711 5:6 @T
bin dir 0755 0:0 @T
bin/large file 6711 3:4 "` + large[:200] + `..." @T
bin/sg file 2755 1:2 "sg" @T
bin/su file 4755 0:10 "su" link#1 @T
bin/su2 file 4755 0:10 "su" link#1 @T
bin/su3 symlink 0777 7:8 -> su @T
cap file 0755 1:1 "" security.capability="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" @T
disk block 0660 0:0 8,17 @T
implied dir 0755 0:0
implied/dir dir 0755 0:0
implied/dir/file file 0600 0:0 "x" @T
null char 0666 0:9 1,3 @T
pipe fifo 0622 0:0 @T
shared dir 2775 0:50 @T
shared/d dir 0755 0:0 @T
shared/f file 0664 0:0 "" @T
tmp dir 1777 0:0 @T
`
	if diff := cmp.Diff(want, show(t, root)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	if result.Inodes != 17 || result.OpaqueRoot { // 18 lines, one of them a second link
		t.Errorf("got %+v, want 17 inodes", result)
	}
}

// TestWhiteouts: OCI's whiteouts in overlayfs's form, and what both layers then show.
func TestWhiteouts(t *testing.T) {
	lower, _, err := unpackEntries(t,
		it.Dir("keep", 0o755), it.File("keep/a", "a", 0o644), it.File("keep/b", "b", 0o644),
		it.Dir("opaque", 0o755), it.File("opaque/old", "old", 0o644),
		it.Dir("anew", 0o755), it.File("anew/old", "old", 0o644),
		it.Dir("implicit", 0o755), it.File("implicit/old", "old", 0o644),
		it.File("file", "old", 0o644), it.File("tofile", "old", 0o644))
	if err != nil {
		t.Fatal(err)
	}
	upper, _, err := unpackEntries(t,
		it.Dir("keep", 0o755), it.File("keep/.wh.a", "", 0),
		it.Dir("opaque", 0o755), it.File("opaque/.wh..wh..opq", "", 0), it.File("opaque/new", "new", 0o644),
		it.File(".wh.anew", "", 0), it.Dir("anew", 0o755), it.File("anew/new", "new", 0o644), // removed and made again
		it.File(".wh.implicit", "", 0), it.File("implicit/new", "new", 0o644),
		it.File(".wh.file", "", 0), it.File("file", "new", 0o644), // whiteout first, file second
		it.File("tofile", "new", 0o644), it.File(".wh.tofile", "", 0), // and the other way round
		it.File(".wh..wh.plnk", "aufs", 0), it.Dir(".wh..wh.orph", 0o700),
		it.File(".wh.nothing", "", 0))
	if err != nil {
		t.Fatal(err)
	}
	want := `. dir 0755 0:0
anew dir 0755 0:0 trusted.overlay.opaque="y" @T
anew/new file 0644 0:0 "new" @T
file file 0644 0:0 "new" @T
implicit dir 0755 0:0 trusted.overlay.opaque="y"
implicit/new file 0644 0:0 "new" @T
keep dir 0755 0:0 @T
keep/a char 0600 0:0 0,0
nothing char 0600 0:0 0,0
opaque dir 0755 0:0 trusted.overlay.opaque="y" @T
opaque/new file 0644 0:0 "new" @T
tofile file 0644 0:0 "new" @T
`
	if diff := cmp.Diff(want, show(t, upper)); diff != "" {
		t.Errorf("upper layer (-want +got):\n%s", diff)
	}
	want = `. dir 0755 0:0
anew dir 0755 0:0 @T
anew/new file 0644 0:0 "new" @T
file file 0644 0:0 "new" @T
implicit dir 0755 0:0
implicit/new file 0644 0:0 "new" @T
keep dir 0755 0:0 @T
keep/b file 0644 0:0 "b" @T
opaque dir 0755 0:0 @T
opaque/new file 0644 0:0 "new" @T
tofile file 0644 0:0 "new" @T
`
	if diff := cmp.Diff(want, show(t, overlay(t, upper, lower))); diff != "" {
		t.Errorf("both (-want +got):\n%s", diff)
	}
}

func TestOpaqueRoot(t *testing.T) {
	_, result, err := unpackEntries(t, it.File(".wh..wh..opq", "", 0), it.File("x", "", 0o644))
	if err != nil || !result.OpaqueRoot {
		t.Errorf("got %+v, %v, want an opaque root", result, err)
	}
}

// TestSEC67Types: entries that take the place of others of another type.
func TestSEC67Types(t *testing.T) {
	type entries = []it.Entry
	kinds := map[string]func(string) entries{
		"file":    func(n string) entries { return entries{it.File(n, "new", 0o644)} },
		"large":   func(n string) entries { return entries{it.File(n, strings.Repeat("n", smallFile+1), 0o644)} },
		"dir":     func(n string) entries { return entries{it.Dir(n, 0o755), it.File(n+"/in", "in", 0o644)} },
		"symlink": func(n string) entries { return entries{it.Symlink("/elsewhere", n)} },
		"link":    func(n string) entries { return entries{it.File("other", "other", 0o644), it.Link("other", n)} },
		"char":    func(n string) entries { return entries{it.Char(n, 0o600, 5, 1)} },
		"block":   func(n string) entries { return entries{it.Block(n, 0o600, 7, 0)} },
		"fifo":    func(n string) entries { return entries{it.Fifo(n, 0o600)} },
	}
	shown := map[string]string{
		"file": "x file 0644", "large": "x file 0644", "dir": "x dir 0755", "symlink": "x symlink 0777", "link": "x file 0644",
		"char": "x char 0600", "block": "x block 0600", "fifo": "x fifo 0600",
	}
	for first, before := range kinds {
		for second, after := range kinds {
			t.Run(first+" to "+second, func(t *testing.T) {
				root, _, err := unpackEntries(t, append(before("x"), after("x")...)...)
				if err != nil {
					t.Fatal(err)
				}
				got := show(t, root)
				if !strings.Contains(got, "\n"+shown[second]) {
					t.Errorf("got tree\n%swant %s", got, shown[second])
				}
				if second == "dir" && first != "dir" && !strings.Contains(got, `trusted.overlay.opaque="y"`) {
					t.Errorf("got tree\n%swant x opaque: what it replaced hid the layers below", got)
				}
				if second != "dir" && strings.Contains(got, "x/in") {
					t.Errorf("got tree\n%swant nothing below x", got)
				}
			})
		}
	}
	for name, link := range map[string]it.Entry{
		"to a directory": it.Link("d", "l"), "to the root": it.Link("/", "l"), "to nothing": it.Link("nothing", "l"), "below a file": it.Link("f/x", "l"),
	} {
		t.Run("link "+name, func(t *testing.T) {
			_, _, err := unpackEntries(t, it.Dir("d", 0o755), it.File("f", "", 0o644), link)
			if !errors.Is(err, fault.Corrupt) {
				t.Errorf("got %v, want %v", err, fault.Corrupt)
			}
		})
	}
	t.Run("link to itself", func(t *testing.T) {
		root, _, err := unpackEntries(t, it.File("f", "x", 0o644), it.Link("./f", "f"))
		if err != nil || !strings.Contains(show(t, root), `f file 0644 0:0 "x"`) {
			t.Errorf("got %v, tree\n%s", err, show(t, root))
		}
	})
	t.Run("link over what holds its target", func(t *testing.T) {
		if _, _, err := unpackEntries(t, it.File("d/f", "x", 0o644), it.Link("d/f", "d")); !errors.Is(err, fault.Corrupt) {
			t.Errorf("got %v, want %v", err, fault.Corrupt)
		}
	})
	t.Run("socket", func(t *testing.T) {
		e := it.File("s", "", 0o644)
		e.Typeflag = 's'
		if _, _, err := unpackEntries(t, e); !errors.Is(err, fault.Unsupported) {
			t.Errorf("got %v, want %v", err, fault.Unsupported)
		}
	})
	for name, e := range map[string]it.Entry{
		"negative uid": it.File("f", "", 0o644).PAX("comment", "x").Owned(-1, 0),
		"large gid":    it.File("f", "", 0o644).Owned(0, 1<<32-1),
		"device major": it.Char("c", 0o600, 1<<12, 0),
		"device minor": it.Block("c", 0o600, 1, 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := unpackEntries(t, e); !errors.Is(err, fault.Corrupt) {
				t.Errorf("got %v, want %v", err, fault.Corrupt)
			}
		})
	}
}

// TestManyFiles: names that repeat while earlier ones are still being made by
// the makers. The last entry wins.
func TestManyFiles(t *testing.T) {
	var entries []it.Entry
	want := map[string]string{}
	for i := range 3000 {
		name := fmt.Sprintf("d%d/f%d", i%7, i%50)
		want[name] = fmt.Sprint(i)
		entries = append(entries, it.File(name, want[name], 0o644))
		if i%100 == 99 {
			entries = append(entries, it.Dir(fmt.Sprintf("d%d", i%7), 0o700), it.Link(name, "l"))
			want["l"] = want[name]
		}
	}
	root, _, err := unpackEntries(t, entries...)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range want {
		if name == "l" {
			continue // one inode with a file that may be replaced later; its content then is the older
		}
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != text {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, text)
		}
	}
}

// hostile is an archive that must fail, within time and memory.
type hostile struct {
	name    string
	archive io.Reader
	limits  Limits
	want    error
}

// TestSEC68Hostile: archives made to exhaust memory, stack, time or disk.
func TestSEC68Hostile(t *testing.T) {
	needRoot(t)
	for _, h := range []hostile{
		{name: "PAX record of 1 GiB", archive: io.MultiReader(bytes.NewReader(rawHeader('x', 1<<30)), io.LimitReader(zeros{}, 1<<30)), want: fault.Corrupt},
		{name: "GNU long name of 1 GiB", archive: io.MultiReader(bytes.NewReader(rawHeader('L', 1<<30)), io.LimitReader(zeros{}, 1<<30)), want: fault.Corrupt},
		{name: "header size 2^62", archive: bytes.NewReader(append(rawHeader('0', 1<<62), make([]byte, 1024)...)), want: fault.Limit},
		{name: "old sparse map without end", archive: oldSparse(10_000_000), want: fault.Corrupt},
		{name: "PAX sparse map of 10^7 regions", archive: paxSparse(10_000_000), want: fault.Corrupt},
		{name: "sparse file of 2^50 bytes", archive: sparseOf(1 << 50), want: fault.Limit},
		{name: "10^7 empty files", archive: manyFiles(10_000_000), limits: Limits{Entries: 2000}, want: fault.Limit},
		{name: "depth 5000 through links", archive: bytes.NewReader(deepLinks(5000)), limits: Limits{Depth: 900}, want: fault.Limit},
		{name: "20 000 xattrs", archive: bytes.NewReader(it.Tar(manyXattrs(20_000))), want: fault.Limit}, // more do not fit into 1 MiB of PAX,
		{name: "xattrs of 300 KiB", archive: bytes.NewReader(it.Tar(it.File("f", "", 0o644).Xattr("user.x", strings.Repeat("x", 300<<10)))), want: fault.Limit},
		{name: "gzip bomb", archive: gzipOf(4 << 30), want: fault.Limit},
		{name: "zstd bomb", archive: zstdOf(4 << 30), want: fault.Limit},
		{name: "zstd window of 2 GiB", archive: bytes.NewReader(zstdWindow()), want: fault.Limit},
		{name: "endless zeros after the archive", archive: io.MultiReader(bytes.NewReader(it.Tar(it.File("f", "", 0o644))), io.LimitReader(zeros{}, 64<<30)), limits: Limits{Entries: 1000}, want: fault.Limit},
		{name: "implied directories without end", archive: impliedDirs(), want: fault.Limit},
	} {
		t.Run(h.name, func(t *testing.T) {
			root := newRoot(t)
			runtime.GC()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			_, err := Layer(t.Context(), func(context.Context) io.Reader { return h.archive }, root, h.limits, NewBudget(64<<20, 3000))
			took := time.Since(start)
			runtime.ReadMemStats(&after)
			if c, ok := h.archive.(io.Closer); ok {
				_ = c.Close()
			}
			if !errors.Is(err, h.want) {
				t.Errorf("got %v, want %v", err, h.want)
			}
			if took > time.Minute { // half a second on a quiet machine
				t.Errorf("took %s", took)
			}
			if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 64<<20 {
				t.Errorf("the heap grew by %d MiB", grown>>20)
			}
			if err := os.RemoveAll(root); err != nil {
				t.Errorf("cannot remove what was unpacked: %v", err)
			}
		})
	}
	t.Run("10^6 gzip members", func(t *testing.T) {
		member := it.Compress(it.Gzip, nil)
		archive := io.MultiReader(&repeat{member, 1_000_000}, bytes.NewReader(it.Compress(it.Gzip, it.Tar(it.File("f", "", 0o644)))))
		start := time.Now()
		_, err := Layer(t.Context(), func(context.Context) io.Reader { return archive }, newRoot(t), Limits{}, NewBudget(1<<20, 100))
		if took := time.Since(start); err != nil || took > 60*time.Second {
			t.Errorf("got %v after %s", err, took)
		}
	})
}

// TestSEC70Budget: what the image's limits leave, all its layers share.
func TestSEC70Budget(t *testing.T) {
	needRoot(t)
	layer := func(budget *Budget) error {
		archive := it.Tar(it.File("a", strings.Repeat("x", 600), 0o644), it.File("b", "", 0o644))
		_, err := Layer(t.Context(), func(context.Context) io.Reader { return bytes.NewReader(archive) }, newRoot(t), Limits{}, budget)
		return err
	}
	for name, budget := range map[string]*Budget{"bytes": NewBudget(1000, 100), "entries": NewBudget(100_000, 3)} {
		if err := layer(budget); err != nil {
			t.Errorf("%s: first layer: %v", name, err)
		}
		err := layer(budget)
		if !errors.Is(err, fault.Limit) || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: second layer: got %v, want %v", name, err, fault.Limit)
		}
	}
}

// TestSEC69Differential: archives that parsers read differently. All of them are
// read, or refused; the digest is of the whole stream either way.
func TestSEC69Differential(t *testing.T) {
	pax := func(records map[string]string) it.Entry {
		e := it.File("name", "0123456789", 0o644)
		e.PAXRecords, e.Format = records, tar.FormatPAX
		return e
	}
	for _, tt := range []struct {
		name    string
		archive []byte
		want    string // a line of the tree; "" for an error
	}{
		{"PAX path wins", bytes.ReplaceAll(it.Tar(pax(map[string]string{"comment": "path=evil"})), []byte("21 comment=path=evil\n"), []byte("21 path=abcdefghijkl\n")), `abcdefghijkl file`},
		{"PAX size less than header's", bytes.ReplaceAll(it.Tar(pax(map[string]string{"comment": "xx"})), []byte("14 comment=xx\n"), []byte("14 size=00005\n")), `name file 0644 0:0 "01234"`},
		{"PAX size negative", bytes.ReplaceAll(it.Tar(pax(map[string]string{"comment": "xx"})), []byte("14 comment=xx\n"), []byte("14 size=-0010\n")), ""},
		{"duplicate entries", it.Tar(it.File("a", "first", 0o644), it.File("a", "second", 0o600)), `a file 0600 0:0 "second"`},
		{"size in base 256, negative", binarySize(-1), ""},
		{"truncated", it.Tar(it.File("a", strings.Repeat("x", 2000), 0o644))[:1500], ""},
		{"truncated in a large file", it.Tar(it.File("a", strings.Repeat("x", 200_000), 0o644))[:150_000], ""},
		{"garbage after the end", append(it.Tar(it.File("a", "x", 0o644)), "garbage"...), `a file 0644 0:0 "x"`},
		{"second archive after the end", append(it.Tar(it.File("a", "x", 0o644)), it.Tar(it.File("b", "x", 0o644))...), `a file 0644 0:0 "x"`},
		{"no end", it.Tar(it.File("a", "x", 0o644))[:1024], `a file 0644 0:0 "x"`},
		{"empty", nil, `. dir 0755 0:0`},
		{"not an archive", []byte(strings.Repeat("garbage ", 200)), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root, result, err := unpackArchive(t, tt.archive, Limits{})
			if tt.want == "" {
				if !errors.Is(err, fault.Corrupt) {
					t.Errorf("got %v, want %v, tree\n%s", err, fault.Corrupt, show(t, root))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := show(t, root); !strings.Contains("\n"+got, "\n"+tt.want) || strings.Contains(got, "\nb ") {
				t.Errorf("got tree\n%swant %s", got, tt.want)
			}
			if want := digest.FromBytes(tt.archive); result.DiffID != want {
				t.Errorf("got digest %s, want %s", result.DiffID, want)
			}
		})
	}
}

// TestCancel: an unpacking that waits for its source ends with the context.
func TestCancel(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan struct{})
	open := func(ctx context.Context) io.Reader {
		return readerFunc(func([]byte) (int, error) {
			close(waiting)
			<-ctx.Done()
			return 0, context.Cause(ctx)
		})
	}
	go func() { <-waiting; cancel() }()
	if _, err := Layer(ctx, open, newRoot(t), Limits{}, NewBudget(1, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// The forges of hostile archives.

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// repeat yields data n times.
type repeat struct {
	data []byte
	n    int
}

func (r *repeat) Read(p []byte) (int, error) {
	n := 0
	for r.n > 0 && n+len(r.data) <= len(p) {
		n += copy(p[n:], r.data)
		r.n--
	}
	if n == 0 && r.n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// rawHeader is a ustar header of a type and a size, octal or base 256 (tar(5)).
func rawHeader(kind byte, size int64) []byte {
	h := make([]byte, 512)
	copy(h, "name")
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	if size >= 0 && size < 1<<33 {
		copy(h[124:], fmt.Sprintf("%011o\x00", size))
	} else {
		h[124] = 0x80
		if size < 0 {
			h[124] = 0xff
			copy(h[125:], "\xff\xff\xff")
		}
		binary.BigEndian.PutUint64(h[128:], uint64(size))
	}
	copy(h[136:], "00000000000\x00")
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	return checksum(h)
}

func checksum(h []byte) []byte {
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

func binarySize(size int64) []byte { return append(rawHeader('0', size), make([]byte, 1024)...) }

// oldSparse is GNU's old sparse format with n extension blocks of 21 regions each.
func oldSparse(n int) io.Reader {
	h := rawHeader('S', 0)
	copy(h[257:], "ustar  \x00")
	copy(h[386:], "00000000000\x0000000000001\x00")
	h[482] = 1 // isextended
	copy(h[483:], "77777777777\x00")
	block := make([]byte, 512)
	for i := range 21 {
		copy(block[i*24:], "00000000001\x0000000000001\x00")
	}
	block[504] = 1
	return io.MultiReader(bytes.NewReader(checksum(h)), &repeat{block, n})
}

// paxSparse is GNU's sparse format 1.0: the map is at the beginning of the content.
func paxSparse(regions int) io.Reader {
	line := []byte("1\n1\n")
	size := int64(len(fmt.Sprint(regions))+1) + int64(regions*len(line))
	records := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", fmt.Sprintf("GNU.sparse.realsize=%d", 1<<40)} {
		n := len(kv) + 3
		if n >= 10 {
			n++
		}
		records += fmt.Sprintf("%d %s\n", len(fmt.Sprint(n))+len(kv)+2, kv)
	}
	body := make([]byte, 512)
	copy(body, records)
	return io.MultiReader(bytes.NewReader(rawHeader('x', int64(len(records)))), bytes.NewReader(body), bytes.NewReader(rawHeader('0', size)),
		strings.NewReader(fmt.Sprintf("%d\n", regions)), &repeat{line, regions})
}

// sparseOf is an old-format sparse file of a real size and no data.
func sparseOf(size int64) io.Reader {
	h := rawHeader('S', 0)
	copy(h[257:], "ustar  \x00")
	h[483] = 0x80
	binary.BigEndian.PutUint64(h[487:], uint64(size))
	return io.MultiReader(bytes.NewReader(checksum(h)), io.LimitReader(zeros{}, 1024))
}

func manyFiles(n int) io.Reader {
	r, w := io.Pipe()
	go func() { // ends when the test closes the reader
		tw := tar.NewWriter(w)
		for i := range n {
			if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("%d", i), Typeflag: tar.TypeReg}); err != nil {
				return
			}
		}
		_ = w.Close()
	}()
	return r
}

func impliedDirs() io.Reader {
	var entries []it.Entry
	for i := range 100 {
		entries = append(entries, it.File(fmt.Sprintf("%d/%sf", i, strings.Repeat("d/", 1500)), "", 0o644))
	}
	return bytes.NewReader(it.Tar(entries...))
}

func manyXattrs(n int) it.Entry {
	e := it.File("f", "", 0o644)
	e.PAXRecords, e.Format = map[string]string{}, tar.FormatPAX
	for i := range n {
		e.PAXRecords[fmt.Sprintf("SCHILY.xattr.user.%d", i)] = ""
	}
	return e
}

// deepLinks nests directories deeper than names can say: each link leads to the bottom so far.
func deepLinks(depth int) []byte {
	entries := []it.Entry{it.Dir("top", 0o755)}
	at := "top"
	for i := 0; i*500 < depth; i++ {
		below := strings.Repeat("d/", 500)
		entries = append(entries, it.Dir(at+"/"+below, 0o755))
		link := fmt.Sprintf("l%d", i)
		entries = append(entries, it.Symlink(at+"/"+below, link))
		at = link
	}
	return it.Tar(entries...)
}

func gzipOf(size int64) io.Reader {
	header := rawHeader('0', size)
	return io.MultiReader(bytes.NewReader(it.Compress(it.Gzip, header)), &repeat{it.Compress(it.Gzip, make([]byte, 1<<20)), int(size >> 20)})
}

func zstdOf(size int64) io.Reader {
	header := rawHeader('0', size)
	return io.MultiReader(bytes.NewReader(it.Compress(it.Zstd, header)), &repeat{it.Compress(it.Zstd, make([]byte, 1<<20)), int(size >> 20)})
}

// zstdWindow is a frame that wants a window of 2 GiB (RFC 8878 3.1.1.1.2: exponent 21).
func zstdWindow() []byte {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	frame := enc.EncodeAll(bytes.Repeat([]byte("x"), 4096), nil)
	_ = enc.Close()
	return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3}, frame[6:]...)
}
