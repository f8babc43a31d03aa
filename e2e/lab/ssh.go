package lab

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/crypto/ssh"
)

// sshSpec is what a node's SSH server is told.
type sshSpec struct {
	Listen     string
	Authorized string // the only public key that may enter, as in authorized_keys
}

// SSHKey returns the path of the private key with which the nodes of a lab with [Config].SSH let root in.
func (c *Cluster) SSHKey() string { return filepath.Join(c.dir, "pki", "ssh") }

// makeSSHKey writes a new key pair and returns the public half, as in authorized_keys.
func (c *Cluster) makeSSHKey() (string, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make ssh key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, "trivet-e2e")
	if err != nil {
		return "", fmt.Errorf("make ssh key: %w", err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("make ssh key: %w", err)
	}
	return string(ssh.MarshalAuthorizedKey(key)), writeFile(c.SSHKey(), pem.EncodeToMemory(block), 0o600)
}

// runSSH is the SSH server of a node: it runs commands in bash, as root, in the node's namespaces, and does nothing
// else. Kubernetes' own tests stop and start kubelets by it.
func runSSH(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("an ssh server takes one argument, not %d", len(args))
	}
	var spec sshSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return fmt.Errorf("read what to be: %w", err)
	}
	cfg, err := sshConfig(spec.Authorized)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", spec.Listen)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go serveSSH(ctx, conn, cfg)
	}
}

func sshConfig(authorized string) (*ssh.ServerConfig, error) {
	want, _, _, _, err := ssh.ParseAuthorizedKey([]byte(authorized))
	if err != nil {
		return nil, fmt.Errorf("the key that may enter: %w", err)
	}
	cfg := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if string(key.Marshal()) != string(want.Marshal()) {
				return nil, errors.New("not the key of this lab")
			}
			return &ssh.Permissions{}, nil
		},
	}
	_, host, err := ed25519.GenerateKey(rand.Reader) // of this process: nobody remembers it
	if err != nil {
		return nil, fmt.Errorf("make host key: %w", err)
	}
	signer, err := ssh.NewSignerFromKey(host)
	if err != nil {
		return nil, fmt.Errorf("make host key: %w", err)
	}
	cfg.AddHostKey(signer)
	return cfg, nil
}

// serveSSH serves one connection until its client goes.
func serveSSH(ctx context.Context, conn net.Conn, cfg *ssh.ServerConfig) {
	defer conn.Close()
	server, channels, requests, err := ssh.NewServerConn(conn, cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "ssh:", err)
		return
	}
	defer server.Close()
	go ssh.DiscardRequests(requests)
	for c := range channels {
		if c.ChannelType() != "session" {
			_ = c.Reject(ssh.UnknownChannelType, "only sessions") // the client is told, or is gone
			continue
		}
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		go serveSession(ctx, channel, requests)
	}
}

// serveSession runs the command of an exec request and reports its exit status.
func serveSession(ctx context.Context, channel ssh.Channel, requests <-chan *ssh.Request) {
	defer channel.Close()
	for r := range requests {
		var exec struct{ Command string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &exec) != nil {
			_ = r.Reply(false, nil) // the client is told, or is gone
			continue
		}
		_ = r.Reply(true, nil)
		status := struct{ Status uint32 }{runCommand(ctx, exec.Command, channel, channel.Stderr())}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(&status))
		return
	}
}

// runCommand returns the exit status of a command, 255 for one that did not run. Bash, because Kubernetes' tests read
// its "command not found".
func runCommand(ctx context.Context, command string, stdout, stderr io.Writer) uint32 {
	cmd := exec.CommandContext(ctx, "bash", "-c", command)
	cmd.Stdout, cmd.Stderr, cmd.Dir = stdout, stderr, "/root"
	fmt.Fprintf(os.Stderr, "ssh: %s\n", command)
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return uint32(exit.ExitCode())
	}
	fmt.Fprintf(stderr, "%v\n", err)
	return 255
}
