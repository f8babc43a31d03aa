package vm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/vm/plan"
)

// cpioEntry is what readCPIO finds.
type cpioEntry struct {
	name string
	mode uint64
	data string
}

// readCPIO reads a newc archive by the letter of the kernel's document, unlike the writer's code.
func readCPIO(t *testing.T, b []byte) []cpioEntry {
	t.Helper()
	var entries []cpioEntry
	for at := 0; ; {
		require.Equal(t, "070701", string(b[at:at+6]), "magic at %d", at)
		field := func(i int) uint64 {
			n, err := strconv.ParseUint(string(b[at+6+8*i:at+14+8*i]), 16, 64)
			require.NoError(t, err)
			return n
		}
		mode, size, nameN := field(1), int(field(6)), int(field(11))
		name := b[at+110 : at+110+nameN]
		require.Zero(t, name[nameN-1], "a name ends with NUL")
		dataAt := (at + 110 + nameN + 3) / 4 * 4
		e := cpioEntry{name: string(name[:nameN-1]), mode: mode, data: string(b[dataAt : dataAt+size])}
		at = (dataAt + size + 3) / 4 * 4
		if e.name == "TRAILER!!!" {
			require.Len(t, b, at)
			return entries
		}
		entries = append(entries, e)
	}
}

func TestCPIO(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	c := newCPIO(&out)
	c.dir("proc")
	c.file("/a/bc/file", 0o755, []byte("hello"))
	c.file("a/bc/empty", 0o644, nil)
	c.link("sbin", "/bin")
	c.dir("/a/bc")
	require.NoError(t, c.close())
	require.Equal(t, []cpioEntry{
		{"proc", 0o40755, ""},
		{"a", 0o40755, ""},
		{"a/bc", 0o40755, ""},
		{"a/bc/file", 0o100755, "hello"},
		{"a/bc/empty", 0o100644, ""},
		{"sbin", 0o120777, "/bin"},
	}, readCPIO(t, out.Bytes()))
}

// TestVerdict runs processes that exit as QEMU would.
func TestVerdict(t *testing.T) {
	t.Parallel()
	written := func(v int) int { return v<<1 | 1 } // as isa-debug-exit does
	for _, c := range []struct {
		name string
		code int
		want int
		none bool
	}{
		{name: "all passed", code: written(plan.ExitPass), want: 0},
		{name: "three failed", code: written(plan.ExitPass + 3), want: 3},
		{name: "most that can be told", code: written(plan.ExitPass + plan.FailsMax), want: plan.FailsMax},
		{name: "reset or power-off", code: 0, none: true},
		{name: "qemu could not start", code: 1, none: true},
		{name: "even", code: 34, none: true},
		{name: "too many", code: written(plan.ExitPass + plan.FailsMax + 1), none: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), "sh", "-c", fmt.Sprintf("exit %d", c.code))
			err := cmd.Run()
			got, err := verdict(cmd.ProcessState, err)
			if c.none {
				require.ErrorIs(t, err, ErrNoVerdict)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
}

func TestVerdictOfKilled(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "kill -9 $$")
	err := cmd.Run()
	_, err = verdict(cmd.ProcessState, err)
	require.ErrorIs(t, err, ErrNoVerdict)
}

// kernelTree makes a folder like an unpacked package, with modules that need each other as given.
func kernelTree(t *testing.T, needs map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "lib", "modules", "1.2")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "kernel"), 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "boot"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "boot", "vmlinuz-1.2"), nil, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(root, "modules.builtin"), []byte("kernel/lib/built-in.ko\n"), 0o644))
	for name, depends := range needs {
		path := filepath.Join(root, "kernel", name+".ko")
		require.NoError(t, os.WriteFile(path, elfWith(".modinfo", "license=GPL\x00depends="+depends+"\x00"), 0o644))
	}
	return dir
}

// elfWith is a 64-bit relocatable file of two sections: name with data, and the table of names.
func elfWith(name, data string) []byte {
	names := "\x00" + name + "\x00.shstrtab\x00"
	head := make([]byte, 64)
	copy(head, "\x7fELF\x02\x01\x01")
	le := func(b []byte, at int, v uint64, n int) {
		for i := range n {
			b[at+i] = byte(v >> (8 * i))
		}
	}
	sectionsAt := uint64(64 + len(data) + len(names))
	le(head, 16, 1, 2)  // relocatable
	le(head, 18, 62, 2) // x86-64
	le(head, 20, 1, 4)
	le(head, 40, sectionsAt, 8)
	le(head, 52, 64, 2)
	le(head, 58, 64, 2)
	le(head, 60, 3, 2)
	le(head, 62, 2, 2)
	section := func(nameAt, kind, offset, size int) []byte {
		b := make([]byte, 64)
		le(b, 0, uint64(nameAt), 4)
		le(b, 4, uint64(kind), 4)
		le(b, 24, uint64(offset), 8)
		le(b, 32, uint64(size), 8)
		return b
	}
	return slices.Concat(head, []byte(data), []byte(names), make([]byte, 64), section(1, 1, 64, len(data)),
		section(len(name)+2, 3, 64+len(data), len(names)))
}

func TestModulesInOrder(t *testing.T) {
	t.Parallel()
	k, err := FindKernel(kernelTree(t, map[string]string{
		"ext4": "jbd2,mbcache", "jbd2": "crc-x,built_in", "mbcache": "", "crc-x": "", "a": "b", "b": "a", "lost": "nowhere",
	}))
	require.NoError(t, err)
	require.Equal(t, "1.2", k.Release)
	mods, err := k.load(context.Background(), []string{"ext4", "crc_x", "built-in"})
	require.NoError(t, err)
	var names []string
	for _, m := range mods {
		names = append(names, m.name)
	}
	require.Equal(t, []string{"crc_x", "jbd2", "mbcache", "ext4"}, names)

	_, err = k.load(context.Background(), []string{"a"})
	require.ErrorContains(t, err, "needs itself")
	_, err = k.load(context.Background(), []string{"lost"})
	require.ErrorContains(t, err, "nowhere: not in kernel 1.2")
}
