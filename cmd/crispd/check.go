package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/crisp-cri/crisp/cmd/crispd/check"
)

// runCheck prints what the host offers; missing requirements are the error.
func runCheck(w io.Writer, cfg *Config, format string) error {
	print, ok := map[string]func(io.Writer, []check.Finding) error{"table": check.WriteTable, "json": check.WriteJSON}[format]
	if !ok {
		return fmt.Errorf("unknown output %q: want table or json", format)
	}
	findings, err := check.Run(check.Paths{StateRoot: cfg.StateRoot, RunRoot: cfg.RunRoot, InitPath: cfg.Runtime.InitPath})
	if err != nil {
		return err
	}
	if err := print(w, findings); err != nil {
		return err
	}
	if missing := check.Missing(findings); len(missing) > 0 {
		return fmt.Errorf("this host lacks %s", strings.Join(missing, ", "))
	}
	return nil
}
