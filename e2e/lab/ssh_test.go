package lab

import (
	"bytes"
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
)

// TestSSH: commands run with their output and exit status, for the lab's own key and for no other.
func TestSSH(t *testing.T) {
	t.Parallel()
	c, other := &Cluster{dir: t.TempDir()}, &Cluster{dir: t.TempDir()}
	authorized, err := c.makeSSHKey()
	require.NoError(t, err)
	_, err = other.makeSSHKey()
	require.NoError(t, err)
	cfg, err := sshConfig(authorized)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serveSSH(t.Context(), conn, cfg)
		}
	}()
	dial := func(c *Cluster) (*ssh.Client, error) {
		text, err := os.ReadFile(c.SSHKey())
		require.NoError(t, err)
		signer, err := ssh.ParsePrivateKey(text)
		require.NoError(t, err)
		return ssh.Dial("tcp", l.Addr().String(), &ssh.ClientConfig{
			User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
	}
	_, err = dial(other)
	require.ErrorContains(t, err, "unable to authenticate")

	client, err := dial(c)
	require.NoError(t, err)
	defer client.Close()
	for _, row := range []struct {
		command, stdout, stderr string
		status                  int
	}{
		{"echo a | tr a b", "b\n", "", 0},
		{"echo x >&2; exit 3", "", "x\n", 3},
		{"no-such-program --version", "", "command not found", 127},
	} {
		s, err := client.NewSession()
		require.NoError(t, err)
		var stdout, stderr bytes.Buffer
		s.Stdout, s.Stderr = &stdout, &stderr
		err = s.Run(row.command)
		status := 0
		if err != nil {
			var exit *ssh.ExitError
			require.ErrorAs(t, err, &exit, row.command)
			status = exit.ExitStatus()
		}
		require.Equal(t, row.status, status, row.command)
		require.Equal(t, row.stdout, stdout.String(), row.command)
		require.Contains(t, stderr.String(), row.stderr, row.command)
	}
}
