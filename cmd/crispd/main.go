// Command crispd is the daemon of crisp, a Kubernetes container runtime: it
// serves CRI v1 on a unix socket and makes pods.
//
// This package is flags, configuration, wiring and signals; what a pod is
// and how it is made is in package podsandbox and below. The import arrows are
// proved by test/arrows.
//
//	crispd serve     the daemon (serve.go, wire.go, lock.go, listen.go; watchdog.go, journal.go)
//	crispd check     what this host offers, and what is missing (package check)
//	crispd config    the effective configuration (config.go)
//	crispd version   version.go
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/crisp-cri/crisp/cmd/crispd/check"
)

func main() {
	check.RunHelper() // does not return in a child that check started
	if err := command().Execute(); err != nil {
		var out io.Writer = os.Stderr
		if isJournal(os.Stderr, os.Getenv("JOURNAL_STREAM")) {
			out = &prefixed{out, journalError}
		}
		fmt.Fprintln(out, "crispd:", err)
		os.Exit(1)
	}
}

// command builds the command line. Flags override the configuration file.
func command() *cobra.Command {
	var from source
	root := &cobra.Command{
		Use:           "crispd",
		Short:         "A Kubernetes container runtime that does the kernel work itself",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	from.addFlags(root.PersistentFlags())

	root.AddCommand(&cobra.Command{
		Use:   "serve",
		Short: "Serve CRI until SIGTERM",
		Long: `Serve CRI v1 on the unix socket until SIGTERM or SIGINT.

SIGTERM, SIGINT  stop accepting calls, wait for those that run (drain_timeout),
                 exit; pods keep running, and the next crispd finds them again
SIGHUP           ignored: certs.d is read anew at every pull; for any other
                 setting start crispd again, which no pod notices`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := from.load()
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg)
		},
	})

	output := "table"
	checkCmd := &cobra.Command{
		Use:   "check",
		Short: "Say what this host offers and what is missing, and what that costs",
		Long: `Probe this kernel and host for everything crisp uses. Each probe answers yes, no
(with the reason) or unknown. Features are tried, versions never compared. Nothing
is left behind. The exit status is 1 when something is missing that crisp cannot do without.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := from.load()
			if err != nil {
				return err
			}
			return runCheck(cmd.OutOrStdout(), cfg, output)
		},
	}
	checkCmd.Flags().StringVarP(&output, "output", "o", output, "table or json")
	root.AddCommand(checkCmd)

	root.AddCommand(&cobra.Command{
		Use:   "config",
		Short: "Print the effective configuration as TOML, with comments",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := from.load()
			if err != nil {
				return err
			}
			return cfg.Print(cmd.OutOrStdout())
		},
	})

	root.AddCommand(&cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), versionText()) },
	})
	return root
}
