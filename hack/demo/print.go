package main

import (
	"fmt"
	"os"
	"strings"
	"time"
	"unicode/utf8"
)

// printer writes for people: colours when stdout is a terminal, and NO_COLOR is not set.
type printer struct{ colour bool }

var out = printer{colour: isTerminal() && os.Getenv("NO_COLOR") == ""}

func isTerminal() bool {
	info, err := os.Stdout.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

type colour string

const (
	bold   colour = "1"
	dim    colour = "2"
	red    colour = "31"
	green  colour = "32"
	yellow colour = "33"
	cyan   colour = "36"
)

func (p printer) paint(c colour, text string) string {
	if !p.colour {
		return text
	}
	return "\x1b[" + string(c) + "m" + text + "\x1b[0m"
}

func (p printer) title(text string) { fmt.Println(p.paint(bold, text)) }
func (p printer) section(text string) {
	fmt.Printf("\n%s %s\n", p.paint(cyan, "──"), p.paint(bold, text))
}
func (p printer) note(format string, args ...any) {
	fmt.Println("   " + p.paint(dim, fmt.Sprintf(format, args...)))
}
func (p printer) good(format string, args ...any) {
	fmt.Println("   " + p.paint(green, "✓ "+fmt.Sprintf(format, args...)))
}
func (p printer) bad(format string, args ...any) {
	fmt.Fprintln(os.Stderr, "   "+p.paint(red, "✗ "+fmt.Sprintf(format, args...)))
}

// line prints a heading and text of one or more lines beside it.
func (p printer) line(heading, text string) {
	for i, l := range strings.Split(text, "\n") {
		if i > 0 {
			heading = ""
		}
		fmt.Printf("   %s %s\n", pad(heading, 32), l)
	}
}

// table prints rows under the first one, the heading.
func (p printer) table(rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], visible(cell))
		}
	}
	for i, row := range rows {
		var b strings.Builder
		for j, cell := range row {
			if i == 0 {
				cell = p.paint(dim, cell)
			}
			b.WriteString(pad(cell, widths[j]) + "  ")
		}
		fmt.Println("   " + strings.TrimRight(b.String(), " "))
	}
}

// visible is how many columns text takes: without its escape sequences.
func visible(text string) int {
	n := 0
	for {
		before, after, ok := strings.Cut(text, "\x1b[")
		n += utf8.RuneCountInString(before)
		if !ok {
			return n
		}
		_, text, _ = strings.Cut(after, "m")
	}
}

func pad(text string, width int) string {
	return text + strings.Repeat(" ", max(0, width-visible(text)))
}

// stopwatch notes how long each step took.
type stopwatch struct {
	rows [][]string
}

func (s *stopwatch) time(name string, do func() error) error {
	began := time.Now()
	err := do()
	s.rows = append(s.rows, []string{name, fmt.Sprintf("%8.1f ms", float64(time.Since(began).Microseconds())/1000)})
	if err != nil {
		return fmt.Errorf("cannot %s: %w", name, err)
	}
	return nil
}

func (s *stopwatch) print() { out.table(append([][]string{{"step", "took"}}, s.rows...)) }
