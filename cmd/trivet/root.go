package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// usageError is a wrong command line: exit code 2.
type usageError struct{ error }

// options are the flags that every command has.
type options struct {
	server  string        // host:port of any server of the cluster
	certs   string        // folder with ca.crt, client.crt and client.key
	output  string        // table | json
	timeout time.Duration // of one command
}

func newRoot() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   "trivet",
		Short: "Replicated block volumes for Kubernetes",
		Long: "Trivet keeps every volume on three machines by Raft and gives it to a pod, or to you, as an\n" +
			"ordinary block device. Try it with `trivet dev`.",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs, // RunE refuses them by name
		RunE:          onlyHolds,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if o.output != outputTable && o.output != outputJSON {
				return usageError{fmt.Errorf("--output %q: want %s or %s", o.output, outputTable, outputJSON)}
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see `%s --help`)", err, cmd.CommandPath())}
	})
	f := root.PersistentFlags()
	f.StringVar(&o.server, "server", envOr("TRIVET_SERVER", "127.0.0.1:7400"),
		"address of any server of the cluster (TRIVET_SERVER)")
	f.StringVar(&o.certs, "certs", envOr("TRIVET_CERTS", defaultCerts()),
		"folder with ca.crt and the command's certificate and key (TRIVET_CERTS)")
	f.StringVarP(&o.output, "output", "o", outputTable, "output format: table or json")
	f.DurationVar(&o.timeout, "timeout", time.Minute, "give up after this long")
	root.AddCommand(newServer(o), newController(o), newDev(o), newCert(o), newCluster(o), newNode(o), newVolume(o),
		newReplica(o), newAudit(o), newDisk(o), newKube(o), newKeeper(o), newSnapshot(o))
	return root
}

func envOr(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func defaultCerts() string {
	home, err := os.UserHomeDir()
	if err != nil {
		return "certs"
	}
	return filepath.Join(home, ".trivet")
}

// exactArgs is cobra.ExactArgs with an error that names what is missing.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usageError{fmt.Errorf("%s: %s is missing (see `%s --help`)",
				cmd.CommandPath(), names[len(args)], cmd.CommandPath())}
		case len(args) > len(names):
			return usageError{fmt.Errorf("%s: unexpected argument %q", cmd.CommandPath(), args[len(names)])}
		}
		return nil
	}
}

// group makes a command that only holds others: called alone it prints its help, and an unknown
// word below it is an error rather than silence.
func group(use, short string, children ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: onlyHolds}
	c.AddCommand(children...)
	return c
}

// onlyHolds runs a command that only holds others.
func onlyHolds(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unknown command %q (see `%s --help`)", args[0], cmd.CommandPath())}
	}
	return cmd.Help()
}

// explain turns an error into what an operator should read: what went wrong and the next step.
func explain(err error) string {
	st, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	switch st.Code() {
	case codes.Unavailable:
		return st.Message() + "\n  Is the server up, and has a majority of the cluster quorum? Ask another with --server; " +
			"`trivet cluster status` shows what it knows."
	case codes.DeadlineExceeded:
		return st.Message() + "\n  No answer in time; the request may still be carried out. Run it again: it is safe to " +
			"repeat, and --timeout gives it longer."
	case codes.Unauthenticated, codes.PermissionDenied:
		return st.Message() + "\n  The certificate in --certs must be a client certificate of this cluster " +
			"(`trivet cert client`)."
	case codes.OK, codes.Unknown, codes.Internal:
		return err.Error()
	case codes.Canceled, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.ResourceExhausted,
		codes.FailedPrecondition, codes.Aborted, codes.OutOfRange, codes.Unimplemented, codes.DataLoss:
		return st.Message()
	}
	return st.Message()
}
