package lab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// readTar returns the headers in order and the contents by name.
func readTar(t *testing.T, from io.Reader) ([]*tar.Header, map[string][]byte) {
	t.Helper()
	var headers []*tar.Header
	contents := map[string][]byte{}
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return headers, contents
		}
		require.NoError(t, err)
		text, err := io.ReadAll(r)
		require.NoError(t, err)
		headers = append(headers, h)
		contents[h.Name] = text
	}
}

func testImage(t *testing.T) Image {
	t.Helper()
	program := filepath.Join(t.TempDir(), "program")
	require.NoError(t, os.WriteFile(program, []byte("#!/bin/sh\n"), 0o600))
	return Image{
		Name: "example.invalid/a:1",
		Files: []ImageFile{
			{Path: "usr/bin/program", Mode: 0o755, Source: program},
			{Path: "bin/sh", Link: "/usr/bin/program"},
			{Path: "etc/text", Mode: 0o600, Text: "hello"},
			tmpFolder,
		},
		Entrypoint: []string{"/usr/bin/program"}, Env: []string{"A=b"},
	}
}

func TestWriteImage(t *testing.T) {
	t.Parallel()
	img := testImage(t)
	path := filepath.Join(t.TempDir(), "a.tar")
	require.NoError(t, WriteImage(path, img))
	archive, err := os.ReadFile(path)
	require.NoError(t, err)
	_, parts := readTar(t, bytes.NewReader(archive))

	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}
	require.NoError(t, json.Unmarshal(parts["manifest.json"], &manifest))
	require.Len(t, manifest, 1)
	require.Equal(t, []string{"example.invalid/a:1"}, manifest[0].RepoTags)
	require.Equal(t, []string{"layer.tar"}, manifest[0].Layers)

	config := parts[manifest[0].Config]
	sum := sha256.Sum256(config)
	require.Equal(t, hex.EncodeToString(sum[:])+".json", manifest[0].Config)
	var c struct {
		Config struct{ Entrypoint, Env []string } `json:"config"`
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	require.NoError(t, json.Unmarshal(config, &c))
	require.Equal(t, img.Entrypoint, c.Config.Entrypoint)
	require.Equal(t, img.Env, c.Config.Env)
	sum = sha256.Sum256(parts["layer.tar"])
	require.Equal(t, []string{"sha256:" + hex.EncodeToString(sum[:])}, c.RootFS.DiffIDs)

	headers, files := readTar(t, bytes.NewReader(parts["layer.tar"]))
	var names []string
	modes := map[string]int64{}
	for _, h := range headers {
		names = append(names, h.Name)
		modes[h.Name] = h.Mode
		require.Zero(t, h.Uid+h.Gid)
	}
	require.Equal(t, []string{
		"bin/", "bin/sh", "etc/", "etc/text", "tmp/", "usr/", "usr/bin/", "usr/bin/program",
	}, names, "folders come before what is in them")
	require.EqualValues(t, 0o755, modes["usr/bin/program"])
	require.EqualValues(t, 0o600, modes["etc/text"])
	require.EqualValues(t, 0o1777, modes["tmp/"])
	require.Equal(t, "#!/bin/sh\n", string(files["usr/bin/program"]))
	require.Equal(t, "hello", string(files["etc/text"]))
}

func TestWriteImageIsReproducible(t *testing.T) {
	t.Parallel()
	img := testImage(t)
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	require.NoError(t, WriteImage(a, img))
	img.Files[0], img.Files[2] = img.Files[2], img.Files[0]
	require.NoError(t, WriteImage(b, img))
	textA, err := os.ReadFile(a)
	require.NoError(t, err)
	textB, err := os.ReadFile(b)
	require.NoError(t, err)
	require.True(t, bytes.Equal(textA, textB))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 2, "nothing but the archives is left")
}

func TestWriteImageRefuses(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		img  Image
		want string
	}{
		{"no name", Image{Files: []ImageFile{{Path: "a"}}}, "needs a name"},
		{"no files", Image{Name: "a"}, "needs a name and files"},
		{"absolute path", Image{Name: "a", Files: []ImageFile{{Path: "/etc/x"}}}, `"/etc/x"`},
		{"path upwards", Image{Name: "a", Files: []ImageFile{{Path: "etc/../x"}}}, `"etc/../x"`},
		{"file twice", Image{Name: "a", Files: []ImageFile{{Path: "x"}, {Path: "x"}}}, `"x"`},
		{"no source", Image{Name: "a", Files: []ImageFile{{Path: "x", Source: "/nonexistent/y"}}}, "/nonexistent/y"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "a.tar")
			err := WriteImage(path, row.img)
			require.ErrorContains(t, err, row.want)
			_, err = os.Stat(path)
			require.ErrorIs(t, err, fs.ErrNotExist, "a half archive must not appear")
		})
	}
}
