// Command walhook is a sidecar that turns rows committed to a Postgres outbox table into webhooks.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
)

// version and commitID are set by the linker.
var (
	version  = "dev"
	commitID = "unknown"
)

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2 // wrong usage or config
)

func main() {
	profiled := profile()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	stop()
	profiled()
	os.Exit(code)
}

// run is the program: it returns the exit code when everything that it started has ended.
func run(ctx context.Context, args []string, env func(string) (string, bool), stdout, stderr io.Writer) int {
	cmd := rootCommand(env)
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	said := newLogQueue(stderr) // that nobody reads stderr must not keep the process
	fmt.Fprintf(said, "walhook: %v\n", err)
	_ = said.Sync()
	var coded interface{ ExitCode() int }
	if errors.As(err, &coded) {
		return coded.ExitCode()
	}
	return exitFailed
}

// usageError is a mistake on the command line.
type usageError struct{ error }

func (usageError) ExitCode() int { return exitUsage }

// failed is an error that was said already, or that has a code of its own.
type failed struct {
	error
	code int
}

func (f failed) ExitCode() int { return f.code }
func (f failed) Unwrap() error { return f.error }

// options are the flags that all commands share.
type options struct {
	env    func(string) (string, bool)
	config string
	output string
}

func (o *options) load() (*Config, error) { return LoadConfig(o.config, o.env) }

func rootCommand(env func(string) (string, bool)) *cobra.Command {
	o := &options{env: env}
	root := &cobra.Command{
		Use:           "walhook",
		Short:         "Turns rows committed to a Postgres outbox table into webhooks",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q; see walhook --help", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVarP(&o.config, "config", "c", "", "configuration file (default $WALHOOK_CONFIG, then walhook.yaml)")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(runCommand(o), demoCommand(o), checkCommand(o), initCommand(o), versionCommand(),
		endpointsCommand(o), deliveriesCommand(o), replayCommand(o), tailCommand(o), dropSlotCommand(o))
	for _, c := range root.Commands() {
		if !c.HasSubCommands() { // of those below, each has its own
			c.Args = noArgs
		}
	}
	return root
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments, got %q", cmd.CommandPath(), args[0])}
	}
	return nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "walhook %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		},
	}
}
