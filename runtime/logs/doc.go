// Package logs writes what containers print into CRI log files. It runs inside
// the pod's init process, so that logging goes on when the daemon is dead,
// restarted or upgraded; it therefore imports only small packages and holds next
// to no memory while nothing is printed.
//
// A [Sink] is one container's log file. Each stream of the container is a pipe
// (or a terminal) that one goroutine copies into the sink:
//
//	container ──pipe──▶ Copy(stdout) ─┐
//	container ──pipe──▶ Copy(stderr) ─┴─▶ Sink ──write(2)──▶ file      Swap: the next file
//	                                       └──────────────▶ Taps       attached clients
//
// # Format
//
// One record per line, as the kubelet parses it (k8s.io/cri-client/pkg/logs):
//
//	2006-01-02T15:04:05.000000000Z stdout F content\n
//
// The time is UTC with nine digits of nanoseconds; the stream is stdout or
// stderr; the tag is F for a line or the last part of one, P for a part that
// more parts follow. A line longer than 16 KiB is cut into P…P F. What is left
// without a newline at the end of a stream is a P. Content is the container's
// bytes, unchanged.
//
// All lines of one read(2) carry one time: the time they were read.
//
// # Promises
//
//   - Every byte a container wrote is in its log once, or counted in [Stats.Dropped].
//   - A log that cannot be written (full or broken disk) never holds up the
//     container: its output is dropped until writes work again.
//   - The file consists of whole records, whatever fails in between; a line that lost
//     a part ends there.
//   - Records of both streams lie in the file in the order they were read.
//
// What it does not do: rotate (the kubelet does, and then [Sink.Swap] is called),
// open files (the daemon does), limit rates.
package logs

// Constants of the format (cri-api, "logging": kubernetes/community design-proposals/node/kubelet-cri-logging.md).
const (
	timeFormat = "2006-01-02T15:04:05.000000000Z" // always UTC

	// prefixLen is the length of everything before the content. "stdout" and "stderr" are
	// equally long, and so are the tags.
	prefixLen = len(timeFormat) + len(" stdout F ")
	tagOffset = prefixLen - 2

	tagFull    = 'F'
	tagPartial = 'P'

	// MaxContent is how many bytes of content a record has at most: containerd's default
	// of max_container_log_line_size.
	MaxContent = 16 << 10
)

// Constants of this implementation.
const (
	// readSize is the default capacity of a pipe, pipe(7): one read can empty it.
	readSize = 64 << 10
	// outSize takes what a full read of 100-byte lines becomes (1.4 times as much), so that it is one write(2).
	outSize = 128 << 10
	// maxBuffers is how many streams of the pod can be copied at the same moment. The others
	// wait in their pipes.
	maxBuffers = 4
	// burstReads is after how many reads a stream that never pauses gives its buffers to others and
	// looks whether it was stopped.
	burstReads = 16
)

// Stream is one of a container's two outputs.
type Stream uint8

const (
	Stdout Stream = iota
	Stderr
)

func (s Stream) String() string {
	if s == Stderr {
		return "stderr"
	}
	return "stdout"
}
