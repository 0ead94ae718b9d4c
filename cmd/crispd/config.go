package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
)

// DefaultConfigFile is read when it is there; a file named by --config must be.
const DefaultConfigFile = "/etc/crisp/config.toml"

// Duration is a time.Duration written as "30s" in TOML.
type Duration time.Duration

func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// Size is a number of bytes, written as "64MiB" in TOML.
type Size int64

var sizeUnits = []struct {
	suffix string
	bytes  Size
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

func (s Size) MarshalText() ([]byte, error) {
	for _, u := range sizeUnits {
		if s != 0 && s%u.bytes == 0 {
			return fmt.Appendf(nil, "%d%s", s/u.bytes, u.suffix), nil
		}
	}
	return []byte("0B"), nil
}

func (s *Size) UnmarshalText(b []byte) error {
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(string(b), u.suffix)
		if !ok {
			continue
		}
		var n int64
		if _, err := fmt.Sscanf(digits, "%d", &n); err != nil || fmt.Sprint(n) != digits || n < 0 || n > (1<<62)/int64(u.bytes) {
			break
		}
		*s = Size(n) * u.bytes
		return nil
	}
	return fmt.Errorf("want a size like 512MiB, got %q", b)
}

// source is where the configuration comes from: later parts win.
type source struct {
	file    string
	roots   struct{ state, run, socket string }
	level   int
	set     []string
	changed func(flag string) bool
}

func (s *source) addFlags(flags *pflag.FlagSet) {
	flags.StringVarP(&s.file, "config", "c", DefaultConfigFile, "configuration file (TOML); the default one may be absent")
	flags.StringVar(&s.roots.state, "state-root", "", "override state_root")
	flags.StringVar(&s.roots.run, "run-root", "", "override run_root")
	flags.StringVar(&s.roots.socket, "socket", "", "override socket")
	flags.IntVarP(&s.level, "log-level", "v", 0, "override log_level")
	flags.StringArrayVar(&s.set, "set", nil, "override any key: --set network.bridge=crisp1 --set 'network.subnets=[\"10.1.0.0/16\"]'")
	s.changed = flags.Changed
}

// load reads defaults, file and flags, in this order, and validates the result.
func (s *source) load() (*Config, error) {
	cfg := Defaults()
	data, err := os.ReadFile(s.file)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !s.changed("config"):
	case err != nil:
		return nil, fmt.Errorf("cannot read configuration: %w", err)
	default:
		if err := cfg.decode(data); err != nil {
			return nil, fmt.Errorf("cannot read configuration %s: %w", s.file, err)
		}
	}
	for flag, to := range map[string]struct {
		key   *string
		value string
	}{"state-root": {&cfg.StateRoot, s.roots.state}, "run-root": {&cfg.RunRoot, s.roots.run}, "socket": {&cfg.Socket, s.roots.socket}} {
		if s.changed(flag) {
			*to.key = to.value
		}
	}
	if s.changed("log-level") {
		cfg.LogLevel = s.level
	}
	for _, assignment := range s.set {
		if err := cfg.assign(assignment); err != nil {
			return nil, fmt.Errorf("cannot apply --set %s: %w", assignment, err)
		}
	}
	cfg.derive()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("invalid configuration: %w", err)
	}
	return cfg, nil
}

// decode lays the keys of a TOML text over cfg. An unknown key is an error that
// names it and its line.
func (c *Config) decode(text []byte) error {
	dec := toml.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	err := dec.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var all []error
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			all = append(all, fmt.Errorf("line %d: unknown key %q", line, strings.Join(e.Key(), ".")))
		}
		return errors.Join(all...)
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		line, _ := wrong.Position()
		if key := strings.Join(wrong.Key(), "."); key != "" {
			return fmt.Errorf("line %d: key %q: %w", line, key, err)
		}
		return fmt.Errorf("line %d: %w", line, err)
	}
	return err
}

// assign applies "key=value"; the value is TOML, or a string without its quotes.
func (c *Config) assign(assignment string) error {
	key, value, ok := strings.Cut(assignment, "=")
	if !ok {
		return errors.New("want key=value")
	}
	doc := fmt.Sprintf("%s = %s", key, value)
	var parsed map[string]any
	if toml.Unmarshal([]byte(doc), &parsed) != nil {
		doc = fmt.Sprintf("%s = %q", key, value)
	}
	return c.decode([]byte(doc))
}

// derive fills the keys whose default depends on another key.
func (c *Config) derive() {
	if c.Socket == "" {
		c.Socket = filepath.Join(c.RunRoot, "crisp.sock")
	}
	if c.Runtime.InitPath == "" {
		c.Runtime.InitPath = "crisp-init"
		if self, err := os.Executable(); err == nil {
			c.Runtime.InitPath = filepath.Join(filepath.Dir(self), "crisp-init")
		}
	}
}

// Print writes the configuration as TOML that load would read back, each key
// under its comment.
func (c *Config) Print(w io.Writer) error {
	var b bytes.Buffer
	enc := toml.NewEncoder(&b)
	enc.SetIndentTables(false)
	if err := enc.Encode(c); err != nil {
		return fmt.Errorf("cannot print configuration: %w", err)
	}
	_, err := w.Write(b.Bytes())
	return err
}
