package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
)

// run runs the command line and returns what it printed.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"1": 1, "4096": 4096, "1Ki": 1 << 10, "64Mi": 64 << 20, "10Gi": 10 << 30, "2Ti": 2 << 40, "1k": 1000, "3M": 3e6,
		"5G": 5e9, "1T": 1e12,
	} {
		got, err := parseSize(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, got, text)
	}
	for _, text := range []string{
		"", "0", "0Gi", "-1", "+1", "1.5Gi", "Gi", "1gi", "1 Gi", "ten", "0x10", "9999999999999999999", "9999999Ti",
		"1Gi\x00",
	} {
		_, err := parseSize(text)
		var usage usageError
		assert.ErrorAs(t, err, &usage, "%q", text)
	}
}

func TestParseRate(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"0": 0, "64Ki": 64 << 10, "100Mi": 100 << 20} {
		got, err := parseRate(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, got, text)
	}
	_, err := parseRate("fast")
	var usage usageError
	require.ErrorAs(t, err, &usage)
	require.ErrorContains(t, err, "--catch-up-bandwidth")
}

func TestSizeText(t *testing.T) {
	t.Parallel()
	for want, n := range map[string]int64{
		"0": 0, "512": 512, "4Ki": 4096, "1Gi": 1 << 30, "1.5Gi": 3 << 29, "64Ti": 64 << 40,
	} {
		assert.Equal(t, want, sizeText(n))
	}
}

// TestEveryCommandExplainsItself walks the tree: each command says what it does, and those that only
// hold others refuse a word they do not know.
func TestEveryCommandExplainsItself(t *testing.T) {
	t.Parallel()
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		assert.NotEmpty(t, c.Short, c.CommandPath())
		assert.True(t, c.Runnable() || c.HasSubCommands(), c.CommandPath())
		for _, child := range c.Commands() {
			walk(child)
		}
	}
	walk(newRoot())
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"volum"},
		{"volume", "creat"},
		{"volume", "create"},
		{"volume", "create", "a", "b", "--size", "1Gi"},
		{"volume", "create", "a", "--size", "0"},
		{"volume", "create", "a", "--size", "1Gi", "--param", "replicas"},
		{"volume", "create", "a", "--size", "1Gi", "--label", "tier"},
		{"volume", "label", "a"},
		{"volume", "label", "a", "tier"},
		{"volume", "list", "--no-such-flag"},
		{"volume", "list", "-o", "yaml"},
		{"cluster", "status", "extra"},
		{"volume", "move-leader", "a"},
		{"volume", "set-replicas", "a"},
		{"volume", "set-replicas", "a", "2"},
		{"volume", "set-replicas", "a", "three"},
		{"replica", "lst"},
		{"replica", "list"},
		{"replica", "move", "a", "n1"},
		{"replica", "move", "a", "n1", "n2", "n3"},
		{"node", "drain"},
		{"node", "forget"},
		{"node", "drain", "n1", "--wait=perhaps"},
		{"node", "cordon", "n1", "n2"},
		{"node", "uncordon"},
		{"node", "place", "n1"},
		{"node", "place", "n1", "--zone", "a", "--own"},
		{"server", "--replace-after", "soon"},
		{"server", "--log-level", "loud"},
		{"cert", "ca", "--cluster", "x"},
	} {
		_, err := run(t, args...)
		var usage usageError
		assert.ErrorAs(t, err, &usage, "%q", args)
	}
}

func TestNoCertificates(t *testing.T) {
	t.Parallel()
	_, err := run(t, "volume", "list", "--certs", t.TempDir())
	require.ErrorIs(t, err, trivet.ErrNotFound)
	assert.ErrorContains(t, err, "--certs")
}

func TestCerts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca")
	out, err := run(t, "cert", "ca", "--dir", ca, "-o", "json")
	require.NoError(t, err)
	var made struct{ Cluster string }
	require.NoError(t, json.Unmarshal([]byte(out), &made))
	require.NoError(t, trivet.ValidateUUID(made.Cluster))

	_, err = run(t, "cert", "ca", "--dir", ca)
	require.ErrorIs(t, err, trivet.ErrExists, "a second CA would cut off the first one's certificates")
	_, err = run(t, "cert", "node", "n1", "--ca", ca, "--dir", filepath.Join(dir, "n1"))
	require.NoError(t, err)
	_, err = run(t, "cert", "client", "ops", "--ca", ca, "--dir", filepath.Join(dir, "ops"))
	require.NoError(t, err)
	assert.FileExists(t, filepath.Join(dir, "n1", "node.key"))
	assert.FileExists(t, filepath.Join(dir, "ops", "client.key"))
	assert.NoFileExists(t, filepath.Join(dir, "n1", "ca.key"))

	_, err = run(t, "cert", "node", "../n2", "--ca", ca, "--dir", filepath.Join(dir, "n2"))
	require.ErrorIs(t, err, trivet.ErrInvalid)
	_, err = run(t, "cert", "node", "n2", "--ca", dir, "--dir", filepath.Join(dir, "n2"))
	require.ErrorIs(t, err, trivet.ErrNotFound)
	assert.ErrorContains(t, err, "--ca")
}

func TestExplain(t *testing.T) {
	t.Parallel()
	assert.Equal(t, "plain", explain(errors.New("plain")))
	assert.Equal(t, `volume "x": not found`, explain(status.Error(codes.NotFound, `volume "x": not found`)))
	assert.Contains(t, explain(fmt.Errorf("list: %w", status.Error(codes.Unavailable, "gone"))), "--server")
	assert.Contains(t, explain(status.Error(codes.PermissionDenied, "no")), "trivet cert client")
	assert.Contains(t, explain(status.Error(codes.DeadlineExceeded, "late")), "--timeout")
}

func TestVolumeViews(t *testing.T) {
	t.Parallel()
	o := &options{output: outputJSON}
	var out bytes.Buffer
	require.NoError(t, o.show(&out, volumeOf(&api.Volume{Name: "v", SizeBytes: 1 << 40}), table{}))
	assert.Contains(t, out.String(), `"sizeBytes": 1099511627776`, "numbers stay numbers")
	assert.Contains(t, out.String(), `"replicas": []`, "a list is never null")

	o.output = outputTable
	out.Reset()
	view := volumeOf(&api.Volume{Name: "v", SizeBytes: 1 << 30, Replicas: []*api.Replica{
		{Node: "n1", Leader: true, Term: 3, Applied: 9, UsedBytes: 4096}, {Node: "n2"},
	}})
	require.NoError(t, o.show(&out, view, replicaTable(view)))
	assert.Contains(t, out.String(), "4Ki")
}
