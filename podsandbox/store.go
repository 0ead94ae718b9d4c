package podsandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unicode/utf8"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
	"github.com/crisp-cri/crisp/runtime/spawn"
	"github.com/crisp-cri/crisp/runtime/user"
)

// recordVersion is the version of what is written here. A record of another is left where it is and reported.
const recordVersion = 1

// What is synced, and why
//
// The page cache outlives the daemon, so a plain write is enough for a daemon that crashes. A sync is
// for a machine that loses power, and then everything in the kernel is gone, too:
//
//   - The intent needs none. What it announces does not survive either, but for a directory without
//     a readable record, which recovery collects.
//   - The commit of a pod or container, and the start, are synced in the background within a second (flushDelay). What a power cut
//     may take is the last moments; what must not happen later is that a container that ran is forgotten, since a
//     restart policy of Never depends on it.
//   - The exit code, and what was still to be synced, is synced at once, off the path of those who wait for the exit.
//   - Stopping and removing need none: after a power cut every pod is stopped, and removing is repeated.
//
// Nothing that may be durable is replaced by something that is not: files are created once, or only grow,
// or (config.json, at an update) are replaced by a synced one. Measured on the development machine (ext4): a record
// replaced by rename 140 µs (ext4 starts to write at once, auto_da_alloc), with sync 390 µs, created 60 µs,
// a line appended 25 µs. On a disk that honours flushes a sync takes 1 to 10 ms, which would be most of a pod's start;
// and while anybody syncs anything there, creating a file waits, too: so what need not survive a reboot is in the run root.

// Errors of reading records; they never stop the daemon.
var (
	errDamaged = errors.New("record is damaged")
	errVersion = errors.New("record is of another version of crisp")
)

// podRecord is a pod.json: everything that undoing needs, known before the first effect.
type podRecord struct {
	ID         string          `json:"id"`
	Config     *PodConfig      `json:"config"`
	CreatedAt  time.Time       `json:"createdAt"`
	BootID     string          `json:"bootID"`
	CgroupPath string          `json:"cgroupPath"`        // pod level
	NetNSName  string          `json:"netns,omitempty"`   // "" with the host's network
	Network    *network.Result `json:"network,omitempty"` // as planned
}

// podState is a line of a pod's state file.
type podState struct {
	Phase   podPhase        `json:"phase"`
	Reason  string          `json:"reason,omitempty"` // why it is not ready
	At      time.Time       `json:"at"`
	Handle  *spawn.Handle   `json:"handle,omitempty"`
	Network *network.Result `json:"network,omitempty"` // as set up
	// CgroupOurs: the pod-level cgroup was made by us, not by the kubelet.
	CgroupOurs bool `json:"cgroupOurs,omitempty"`
	// NetworkDown: torn down, its addresses may be another pod's by now.
	NetworkDown bool     `json:"networkDown,omitempty"`
	Timings     []Timing `json:"timings,omitempty"`
	// Resources is what NotePodResources was given last; not interpreted.
	Resources []byte `json:"resources,omitempty"`
}

// containerRecord is a container.json.
type containerRecord struct {
	ID        string           `json:"id"`
	PodID     string           `json:"podID"`
	Config    *ContainerConfig `json:"config"`
	CreatedAt time.Time        `json:"createdAt"`
}

// containerState is a line of a container's state file.
type containerState struct {
	Phase      containerPhase `json:"phase"`
	StartedAt  time.Time      `json:"startedAt,omitzero"`
	FinishedAt time.Time      `json:"finishedAt,omitzero"`
	PID        int            `json:"pid,omitempty"` // means something only while the pod's init lives
	ExitCode   int            `json:"exitCode,omitempty"`
	Reason     string         `json:"reason,omitempty"`
	Message    string         `json:"message,omitempty"`
	// KillAt is when a stop that was begun will kill; the stop signal has been sent. A daemon that
	// starts later neither sends it again nor waits anew (C-04).
	KillAt  time.Time     `json:"killAt,omitzero"`
	User    user.Identity `json:"user"`
	Timings []Timing      `json:"timings,omitempty"`
	LogLost uint64        `json:"logLost,omitempty"` // bytes
	// OOMScoreAdj that an update asked for before the start.
	OOMScoreAdj *int `json:"oomScoreAdj,omitempty"`
	// Poststop: a start was begun, and its poststop hooks have not all been run since.
	Poststop bool `json:"poststop,omitempty"`
}

// Names in the directories drawn in the package's documentation.
const (
	podFile       = "pod.json"
	containerFile = "container.json"
	configFile    = "config.json"
	stateFile     = "state"
	podsDir       = "pods"
	containersDir = "containers"
	damagedDir    = "damaged"
	upperDir      = "upper"
	workDir       = "work"
	rootfsDir     = "rootfs" // empty: root.path of config.json, where hooks find the root file system in the container's namespace
)

// maxRecord bounds what is read of a file: a CRI request has 16 MiB, and is stored up to three times.
const maxRecord = 64 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) string { return fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli)) }

// envelope is the form of pod.json and container.json.
type envelope struct {
	Version int             `json:"version"`
	CRC32C  string          `json:"crc32c"` // of the bytes of Record
	Record  json.RawMessage `json:"record"`
}

func encodeRecord(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(body)+64)
	b = fmt.Appendf(b, `{"version":%d,"crc32c":%q,"record":`, recordVersion, checksum(body))
	b = append(b, body...)
	return append(b, "}\n"...), nil
}

// decodeRecord reads what encodeRecord wrote. With errVersion and errDamaged, v has what could be understood: not to be relied upon.
func decodeRecord(b []byte, v any) error {
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	if e.Version > recordVersion {
		_ = json.Unmarshal(e.Record, v) // as much as we understand of it
		return fmt.Errorf("%w (%d, this is %d)", errVersion, e.Version, recordVersion)
	}
	if e.Version != recordVersion || checksum(e.Record) != e.CRC32C {
		_ = json.Unmarshal(e.Record, v) // as above
		return fmt.Errorf("%w: checksum %s, version %d", errDamaged, checksum(e.Record), e.Version)
	}
	if err := json.Unmarshal(e.Record, v); err != nil {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil
}

// stateLine is "<version> <crc32c> <json>\n". It begins with a newline of its own, which ends a
// line that was not written whole.
func stateLine(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(body)+16)
	b = fmt.Appendf(b, "\n%d %s ", recordVersion, checksum(body))
	b = append(b, body...)
	return append(b, '\n'), nil
}

// lastState reads the last whole line of a state file into v and says whether there was one.
// errDamaged: there is something, but no whole line.
func lastState(b []byte, v any) (bool, error) {
	lines := bytes.Split(b, []byte("\n"))
	blank := true
	for i := len(lines) - 1; i >= 0; i-- {
		if len(bytes.TrimSpace(lines[i])) == 0 {
			continue
		}
		blank = false
		version, rest, _ := bytes.Cut(lines[i], []byte(" "))
		sum, body, ok := bytes.Cut(rest, []byte(" "))
		n, err := strconv.Atoi(string(version))
		if !ok || err != nil || checksum(body) != string(sum) {
			continue
		}
		if n != recordVersion {
			return false, fmt.Errorf("%w (%d, this is %d)", errVersion, n, recordVersion)
		}
		if json.Unmarshal(body, v) == nil {
			return true, nil
		}
	}
	if blank {
		return false, nil
	}
	return false, errDamaged
}

// store is the only writer of records. It has no lock: each object's files are written by the holder of the object's turn.
type store struct {
	state, run string // roots
	flush      *flusher
	// fault, in tests, is asked before each write or deletion whether it may happen.
	fault func(what string) error
}

func (s *store) may(what string) error {
	if s.fault == nil {
		return nil
	}
	return s.fault(what)
}

func openStore(state, run string) (*store, error) {
	for _, d := range []string{filepath.Join(state, podsDir), filepath.Join(run, podsDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	return &store{state: state, run: run, flush: newFlusher(flushDelay, syncFile)}, nil
}

func (s *store) podDir(id string) string { return filepath.Join(s.state, podsDir, id) }
func (s *store) runDir(id string) string { return filepath.Join(s.run, podsDir, id) }
func (s *store) containerDir(pod, id string) string {
	return filepath.Join(s.podDir(pod), containersDir, id)
}

// createPod writes a pod's intent, and makes its directories.
func (s *store) createPod(r *podRecord) error {
	if err := s.may("store.createPod"); err != nil {
		return err
	}
	b, err := encodeRecord(r)
	if err != nil {
		return err
	}
	for _, dir := range []string{s.podDir(r.ID), s.runDir(r.ID)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		if err := createFile(filepath.Join(dir, podFile), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// removePod deletes everything of a pod. What is in its containers' directories must be deleted already.
//
// The copy goes first, then the record, then the rest: a record without its state is one of a pod that was being made, and the next daemon
// would give its addresses back a second time.
func (s *store) removePod(id string) error {
	if err := s.may("store.removePod"); err != nil {
		return err
	}
	if err := os.RemoveAll(s.runDir(id)); err != nil {
		return err
	}
	if err := s.may("store.removePodRecord"); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(s.podDir(id), podFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.may("store.removePodRest"); err != nil {
		return err
	}
	return os.RemoveAll(s.podDir(id))
}

// createContainer writes a container's intent, and makes its directories.
func (s *store) createContainer(r *containerRecord) error {
	if err := s.may("store.createContainer"); err != nil {
		return err
	}
	b, err := encodeRecord(r)
	if err != nil {
		return err
	}
	dir := s.containerDir(r.PodID, r.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return createFile(filepath.Join(dir, containerFile), b, 0o600)
}

// removeContainer deletes everything of a container, its writable layer first, which the
// container has written. Its record goes last.
func (s *store) removeContainer(pod, id string) error {
	if err := s.may("store.removeContainer"); err != nil {
		return err
	}
	dir := s.containerDir(pod, id)
	if err := removeTrees(dir, upperDir, workDir); err != nil {
		return fmt.Errorf("delete writable layer: %w", err)
	}
	return os.RemoveAll(dir)
}

// appendState adds a line to the state file in dir.
func (s *store) appendState(dir string, v any) error {
	if err := s.may("store.appendState"); err != nil {
		return err
	}
	line, err := stateLine(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, stateFile), os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(line)
	return errors.Join(err, f.Close())
}

// config is a config.json: the spec as OCI writes it, and what JSON cannot say.
type config struct {
	*specs.Spec
	// EnvBytes are the entries of process.env that are not UTF-8, by their index: CRI's values are any bytes, JSON's
	// strings are not, and encoding/json puts U+FFFD in their place.
	EnvBytes map[int][]byte `json:"crispEnvBytes,omitempty"`
}

func encodeConfig(spec *specs.Spec) ([]byte, error) {
	c := config{Spec: spec}
	if spec.Process != nil {
		for i, e := range spec.Process.Env {
			if utf8.ValidString(e) {
				continue
			}
			if c.EnvBytes == nil {
				c.EnvBytes = map[int][]byte{}
			}
			c.EnvBytes[i] = []byte(e)
		}
	}
	return json.Marshal(c)
}

func decodeConfig(b []byte) (*specs.Spec, error) {
	c := config{Spec: &specs.Spec{}}
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	for i, e := range c.EnvBytes {
		if c.Process == nil || i < 0 || i >= len(c.Process.Env) {
			return nil, fmt.Errorf("%w: bytes of environment entry %d, which is not there", errDamaged, i)
		}
		c.Process.Env[i] = string(e)
	}
	return c.Spec, nil
}

// writeConfig stores a container's spec. The first is created, later ones replace it.
func (s *store) writeConfig(pod, id string, spec *specs.Spec) error {
	if err := s.may("store.writeConfig"); err != nil {
		return err
	}
	b, err := encodeConfig(spec)
	if err != nil {
		return err
	}
	path := filepath.Join(s.containerDir(pod, id), configFile)
	err = createFile(path, b, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return replaceFile(path, b)
	}
	return err
}

func (s *store) readConfig(pod, id string) (*specs.Spec, error) {
	b, err := readFile(filepath.Join(s.containerDir(pod, id), configFile))
	if err != nil {
		return nil, err
	}
	return decodeConfig(b)
}

// createFile makes a file that must not exist.
func createFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && mode != 0o600 {
		err = f.Chmod(mode) // whatever the umask
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(path) // half a file is worth nothing; if it stays, its checksum is wrong
	}
	return err
}

// replaceFile exchanges a file for another, whole and durable.
func replaceFile(path string, b []byte) error {
	temp := path + ".new"
	_ = os.Remove(temp) // of a crash
	if err := createFile(temp, b, 0o600); err != nil {
		return err
	}
	if err := syncFile(temp); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncFile(filepath.Dir(path))
}

// syncFile makes a file's or a directory's present content durable.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// readFile reads a file of ours, of at most maxRecord bytes.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err == nil && len(b) > maxRecord {
		err = fmt.Errorf("%w: %s is larger than %d bytes", errDamaged, path, maxRecord)
	}
	return b, err
}

// readRecord reads a pod.json or container.json.
func readRecord(path string, v any) error {
	b, err := readFile(path)
	if err != nil {
		return err
	}
	return decodeRecord(b, v)
}

// readState reads a state file. found is false when nothing was committed.
func readState(dir string, v any) (found bool, err error) {
	b, err := readFile(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return lastState(b, v)
}

// setAside moves what could not be read out of the way and returns where it is now.
func (s *store) setAside(path, name string, now time.Time) (string, error) {
	dir := filepath.Join(s.state, damagedDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	to := filepath.Join(dir, fmt.Sprintf("%s-%d", name, now.UnixNano()))
	return to, os.Rename(path, to)
}

// ids names the directories in dir that can be an object's.
func ids(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var l []string
	for _, e := range entries {
		if e.IsDir() && isID(e.Name()) {
			l = append(l, e.Name())
		}
	}
	return l, err
}

// isID says whether s is a full id: 64 hexadecimal digits.
func isID(s string) bool { return len(s) == idLen && isHex(s) }

const idLen = 64

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
