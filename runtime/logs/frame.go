package logs

import (
	"bytes"
	"time"
)

// source is one stream's way into a sink. It belongs to its Copy, and is changed under the sink's
// lock only.
type source struct {
	stream Stream
	prefix [prefixLen]byte // of the batch at hand, tag F
	// flush is called whenever the output may not take another record. It returns it empty.
	flush func(records []byte) []byte
	lines uint64 // in what was not flushed yet
	// pending is an unfinished line, at most MaxContent bytes. It keeps its memory.
	pending []byte

	// open: the last record of this stream in the file is a P. lost: records after
	// it were dropped, so the line has to end before anything else comes.
	open, lost bool
}

// stamp sets the time of the batch that begins.
func (s *source) stamp(now time.Time) {
	p := now.UTC().AppendFormat(s.prefix[:0], timeFormat)
	p = append(p, ' ')
	p = append(p, s.stream.String()...)
	_ = append(p, ' ', tagFull, ' ')
}

// frame turns data into records, appended to out as far as its capacity goes. An unfinished
// line is kept for the next call.
func (s *source) frame(out, data []byte) []byte {
	for len(data) > 0 {
		n := bytes.IndexByte(data, '\n')
		tag, line := byte(tagFull), data
		if n >= 0 {
			line, data = data[:n], data[n+1:]
		} else {
			tag, data = 0, nil // goes on in the next batch
		}
		for len(s.pending)+len(line) > MaxContent {
			part := MaxContent - len(s.pending)
			out = s.record(out, tagPartial, line[:part])
			line = line[part:]
		}
		if tag == 0 {
			s.pending = append(s.pending, line...)
			break
		}
		out = s.record(out, tag, line)
	}
	return out
}

// record appends one record of what is pending and line.
func (s *source) record(out []byte, tag byte, line []byte) []byte {
	if len(out)+prefixLen+len(s.pending)+len(line)+1 > cap(out) {
		out = s.flush(out)
	}
	if tag == tagFull {
		s.lines++
	}
	start := len(out)
	out = append(out, s.prefix[:]...)
	out[start+tagOffset] = tag
	if len(s.pending) > 0 {
		out = append(out, s.pending...)
		s.pending = s.pending[:0]
	}
	out = append(out, line...)
	return append(out, '\n')
}

// emptyRecord ends a line whose rest was lost.
func (s *source) emptyRecord() []byte { return append(s.prefix[:len(s.prefix):len(s.prefix)], '\n') }

// endsOpen says whether the last of some records is a P. No record contains a newline but at its end.
func endsOpen(records []byte) bool {
	last := bytes.LastIndexByte(records[:len(records)-1], '\n') + 1
	return records[last+tagOffset] == tagPartial
}

// content counts what records hold: their lines, and the container's bytes (a newline after a full line is one).
func content(records []byte) (lines, payload uint64) {
	for len(records) > 0 {
		n := bytes.IndexByte(records, '\n') + 1
		payload += uint64(n - prefixLen - 1)
		if records[tagOffset] == tagFull {
			lines++
			payload++
		}
		records = records[n:]
	}
	return lines, payload
}
