// Command lab brings a real Kubernetes of three nodes up on this machine, and removes it again without
// a trace; package lab says how. It needs root and the binaries that build.sh makes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet/e2e/lab"
)

const usage = `usage: lab COMMAND [--dir FOLDER] ...

  up [--cache FOLDER] [--nodes n1,n2,n3]   make a cluster; a previous one in the folder is removed first
  down                                     remove it; what is left over is an error
  status                                   nodes and pods
  kubectl -- ARGUMENTS                     run kubectl as administrator
  exec NODE -- PROGRAM ARGUMENTS           run a program in the namespaces of a node
  kill NODE NAMESPACE POD CONTAINER        SIGKILL the main process of a container
  load ARCHIVE...                          give images to every node

The folder is ` + lab.DefaultDir + ` unless --dir or TRIVET_E2E_DIR says otherwise.
`

func main() {
	lab.Hook()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab: %v\n", err)
		os.Exit(1)
	}
}

// options are those of all commands.
type options struct {
	dir, cache, nodes string
	args              []string
}

func parse(command string, args []string) (options, error) {
	o := options{}
	dir := os.Getenv("TRIVET_E2E_DIR")
	if dir == "" {
		dir = lab.DefaultDir
	}
	flags := flag.NewFlagSet("lab "+command, flag.ContinueOnError)
	flags.StringVar(&o.dir, "dir", dir, "the lab's folder")
	flags.StringVar(&o.cache, "cache", "", "the folder of binaries (default: what build.sh --print says)")
	flags.StringVar(&o.nodes, "nodes", "n1,n2,n3", "names of the nodes")
	err := flags.Parse(args)
	o.args = flags.Args()
	return o, err
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no command; `lab help` lists them")
	}
	if args[0] == "help" || args[0] == "--help" {
		fmt.Print(usage)
		return nil
	}
	o, err := parse(args[0], args[1:])
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	switch args[0] {
	case "up":
		return up(ctx, o, log)
	case "down":
		return lab.Down(ctx, o.dir, log)
	}
	c, err := lab.Open(o.dir, log)
	if err != nil {
		return err
	}
	switch args[0] {
	case "status":
		return status(ctx, c)
	case "kubectl":
		return kubectl(ctx, c, o.args)
	case "exec":
		return execute(ctx, c, o.args)
	case "kill":
		if len(o.args) != 4 {
			return errors.New("kill needs a node, a namespace, a pod and a container")
		}
		return c.KillContainer(ctx, o.args[0], o.args[1], o.args[2], o.args[3])
	case "load":
		for _, archive := range o.args {
			if err := c.LoadImage(ctx, archive); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("no command %s; `lab help` lists them", args[0])
}

func up(ctx context.Context, o options, log *slog.Logger) error {
	began := time.Now()
	if o.cache == "" {
		var err error
		if o.cache, err = findCache(ctx); err != nil {
			return err
		}
	}
	c, err := lab.Up(ctx, lab.Config{Dir: o.dir, Cache: o.cache, Nodes: strings.Split(o.nodes, ","), Log: log})
	if err != nil {
		return err
	}
	fmt.Printf("lab is up after %.0f s\nexport KUBECONFIG=%s\n", time.Since(began).Seconds(), c.Kubeconfig())
	return nil
}

// findCache looks for build.sh here and in the folder e2e.
func findCache(ctx context.Context) (string, error) {
	for _, dir := range []string{".", "e2e"} {
		if _, err := os.Stat(filepath.Join(dir, "build.sh")); err == nil {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return "", err
			}
			return lab.FindCache(ctx, abs)
		}
	}
	return "", errors.New("no build.sh here or in e2e; run it in the clone, or give --cache")
}

func status(ctx context.Context, c *lab.Cluster) error {
	for _, what := range []string{"nodes", "pods"} {
		out, err := c.Kubectl(ctx, "get", what, "--all-namespaces", "--output", "wide")
		if err != nil {
			return err
		}
		fmt.Println(out)
	}
	return nil
}

func kubectl(ctx context.Context, c *lab.Cluster, args []string) error {
	cmd := c.KubectlCommand(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func execute(ctx context.Context, c *lab.Cluster, args []string) error {
	if len(args) > 1 && args[1] == "--" {
		args = append(args[:1:1], args[2:]...)
	}
	if len(args) < 2 {
		return errors.New("exec needs a node and a program")
	}
	out, err := c.Exec(ctx, args[0], args[1:]...)
	fmt.Print(out)
	return err
}
