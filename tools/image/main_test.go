package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/stretchr/testify/require"
)

// makeTree makes a folder with one of everything that a layer may hold.
func makeTree(t *testing.T, at time.Time) string {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, "usr/bin/tool", "#!/bin/sh\n", 0o755)
	put(t, dir, "usr/bin/sh", "a shell", 0o755)
	put(t, dir, "usr/bin/mount", "mounts", 0o755)
	put(t, dir, "root/secret", "mine", 0o600)
	put(t, dir, "tmp/x", "x", 0o644)
	require.NoError(t, os.Symlink("usr/bin", filepath.Join(dir, "bin")))
	require.NoError(t, os.Link(filepath.Join(dir, "usr/bin/mount"), filepath.Join(dir, "usr/bin/umount")))
	require.NoError(t, os.Chmod(filepath.Join(dir, "usr/bin/mount"), 0o755|fs.ModeSetuid|fs.ModeSetgid))
	require.NoError(t, os.Chmod(filepath.Join(dir, "tmp"), 0o777|fs.ModeSticky))
	require.NoError(t, os.Chmod(filepath.Join(dir, "root"), 0o700))
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type() == fs.ModeSymlink {
			return err
		}
		return os.Chtimes(path, at, at)
	}))
	return dir
}

func put(t *testing.T, dir, name, contents string, mode fs.FileMode) {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(contents), mode))
}

// write runs the program and returns the archive it wrote.
func write(t *testing.T, args ...string) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	require.NoError(t, run(append(args, "-o", file), io.Discard))
	raw, err := os.ReadFile(file)
	require.NoError(t, err)
	return raw
}

// open unpacks an archive and has the library read and check it: every digest, size and media type.
func open(t *testing.T, archive []byte) (v1.Descriptor, v1.Image) {
	t.Helper()
	dir := t.TempDir()
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		contents, err := io.ReadAll(r)
		require.NoError(t, err)
		put(t, dir, h.Name, string(contents), 0o644)
	}
	index, err := layout.ImageIndexFromPath(dir)
	require.NoError(t, err)
	require.NoError(t, validate.Index(index))
	manifest, err := index.IndexManifest()
	require.NoError(t, err)
	require.Len(t, manifest.Manifests, 1)
	img, err := index.Image(manifest.Manifests[0].Digest)
	require.NoError(t, err)
	return manifest.Manifests[0], img
}

// entries reads the headers of a layer.
func entries(t *testing.T, img v1.Image, n int) []*tar.Header {
	t.Helper()
	layers, err := img.Layers()
	require.NoError(t, err)
	r, err := layers[n].Uncompressed()
	require.NoError(t, err)
	defer r.Close()
	var headers []*tar.Header
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return headers
		}
		require.NoError(t, err)
		headers = append(headers, h)
	}
}

func TestImageHasWhatItWasGiven(t *testing.T) {
	t.Parallel()
	program := t.TempDir()
	put(t, program, "usr/local/bin/trivet", "program", 0o755)
	entry, img := open(t, write(t, "-ref", "trivet", "-arch", "arm64", "-created", "1700000000",
		"-layer", makeTree(t, time.Now()), "-layer", program, "-entrypoint", "/usr/local/bin/trivet",
		"-entrypoint", "server", "-env", "PATH=/usr/bin", "-user", "0:0", "-label", "a.version=1=2"))

	require.Equal(t, types.OCIManifestSchema1, entry.MediaType)
	require.Equal(t, &v1.Platform{OS: "linux", Architecture: "arm64"}, entry.Platform)
	require.Equal(t, map[string]string{
		"io.containerd.image.name":          "docker.io/library/trivet:latest",
		"org.opencontainers.image.ref.name": "latest",
	}, entry.Annotations)

	config, err := img.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, "arm64", config.Architecture)
	require.Equal(t, "linux", config.OS)
	require.Equal(t, int64(1700000000), config.Created.Unix())
	require.Equal(t, []string{"/usr/local/bin/trivet", "server"}, config.Config.Entrypoint)
	require.Equal(t, []string{"PATH=/usr/bin"}, config.Config.Env)
	require.Equal(t, "0:0", config.Config.User)
	labels := map[string]string{
		"a.version": "1=2", "org.opencontainers.image.created": "2023-11-14T22:13:20Z",
	}
	require.Equal(t, labels, config.Config.Labels)
	require.Len(t, config.History, 2)

	manifest, err := img.Manifest()
	require.NoError(t, err)
	require.Equal(t, labels, manifest.Annotations)
	require.Equal(t, types.OCIConfigJSON, manifest.Config.MediaType)
	require.Len(t, manifest.Layers, 2)
	require.Equal(t, types.OCILayer, manifest.Layers[1].MediaType)
	top := entries(t, img, 1)
	require.Equal(t, "usr/local/bin/trivet", top[len(top)-1].Name)
}

func TestLayerKeepsModesAndNoOwnersOrTimes(t *testing.T) {
	t.Parallel()
	_, img := open(t, write(t, "-ref", "trivet", "-arch", "amd64", "-layer", makeTree(t, time.Now())))
	type entry struct {
		name string
		kind byte
		mode int64
		link string
	}
	var got []entry
	for _, h := range entries(t, img, 0) {
		require.Zero(t, h.Uid, h.Name)
		require.Zero(t, h.Gid, h.Name)
		require.Empty(t, h.Uname+h.Gname, h.Name)
		require.Zero(t, h.ModTime.Unix(), h.Name)
		got = append(got, entry{h.Name, h.Typeflag, h.Mode, h.Linkname})
	}
	require.Equal(t, []entry{
		{"bin", tar.TypeSymlink, 0o777, "usr/bin"},
		{"root/", tar.TypeDir, 0o700, ""},
		{"root/secret", tar.TypeReg, 0o600, ""},
		{"tmp/", tar.TypeDir, 0o1777, ""},
		{"tmp/x", tar.TypeReg, 0o644, ""},
		{"usr/", tar.TypeDir, 0o755, ""},
		{"usr/bin/", tar.TypeDir, 0o755, ""},
		{"usr/bin/mount", tar.TypeReg, 0o755, ""}, // it was setuid and setgid
		{"usr/bin/sh", tar.TypeReg, 0o755, ""},
		{"usr/bin/tool", tar.TypeReg, 0o755, ""},
		{"usr/bin/umount", tar.TypeLink, 0o755, "usr/bin/mount"},
	}, got)
}

func TestSameInputsGiveTheSameBytes(t *testing.T) {
	t.Parallel()
	// Copies of one tree in folders of one name, as in two checkouts; only their times differ.
	args := func(tree, created string) []string {
		dir := filepath.Join(t.TempDir(), "rootfs")
		require.NoError(t, os.Rename(tree, dir))
		return []string{
			"-ref", "trivet:1", "-arch", "amd64", "-created", created, "-layer", dir,
			"-label", "c=3", "-label", "a=1", "-label", "b=2",
		}
	}
	first := write(t, args(makeTree(t, time.Unix(1e9, 0)), "5")...)
	second := write(t, args(makeTree(t, time.Now()), "5")...)
	require.True(t, bytes.Equal(first, second), "two archives of the same inputs differ")

	_, img := open(t, first)
	_, later := open(t, write(t, args(makeTree(t, time.Now()), "6")...))
	before, err := img.Manifest()
	require.NoError(t, err)
	after, err := later.Manifest()
	require.NoError(t, err)
	require.Equal(t, before.Layers, after.Layers, "the time of the image must not change a layer")
	require.NotEqual(t, before.Config, after.Config)

	changed := makeTree(t, time.Now())
	put(t, changed, "tmp/x", "y", 0o644)
	require.False(t, bytes.Equal(first, write(t, args(changed, "5")...)), "a changed file changes nothing")
}

func TestEqualLayersAreOneBlob(t *testing.T) {
	t.Parallel()
	archive := write(t, "-ref", "trivet", "-arch", "amd64",
		"-layer", makeTree(t, time.Now()), "-layer", makeTree(t, time.Now()))
	seen := map[string]bool{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		require.False(t, seen[h.Name], "%s is there twice", h.Name)
		seen[h.Name] = true
	}
	_, img := open(t, archive)
	layers, err := img.Layers()
	require.NoError(t, err)
	require.Len(t, layers, 2)
}

func TestFullName(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ ref, want, tag, err string }{
		{ref: "trivet", want: "docker.io/library/trivet:latest", tag: "latest"},
		{ref: "trivet:v1.2", want: "docker.io/library/trivet:v1.2", tag: "v1.2"},
		{ref: "me/trivet", want: "docker.io/me/trivet:latest", tag: "latest"},
		{ref: "docker.io/library/trivet:latest", want: "docker.io/library/trivet:latest", tag: "latest"},
		{ref: "reg.example:5000/a/b:c", want: "reg.example:5000/a/b:c", tag: "c"},
		{ref: "", err: `-ref ""`},
		{ref: "Trivet", err: `-ref "Trivet"`},
		{ref: "trivet:a b", err: `-ref "trivet:a b"`},
		{ref: "trivet@sha256:" + string(bytes.Repeat([]byte("0"), 64)), err: "-ref"},
	} {
		full, tag, err := fullName(row.ref)
		if row.err != "" {
			require.ErrorIs(t, err, errUsage, row.ref)
			require.ErrorContains(t, err, row.err)
			continue
		}
		require.NoError(t, err, row.ref)
		require.Equal(t, row.want, full)
		require.Equal(t, row.tag, tag)
	}
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	dir := makeTree(t, time.Now())
	good := []string{"-o", filepath.Join(t.TempDir(), "f"), "-ref", "trivet", "-arch", "amd64", "-layer", dir}
	for _, row := range []struct {
		args []string
		want string
	}{
		{nil, "-o is missing"},
		{[]string{"-o", "f"}, "-layer is missing"},
		{append(slices.Clip(good), "extra"), `"extra" is not a flag`},
		{append(slices.Clip(good), "-created", "-1"), "-created -1 is negative"},
		{append(slices.Clip(good), "-created", "now"), "-created"},
		{append(slices.Clip(good), "-label", "novalue"), "not of the form K=V"},
		{append(slices.Clip(good), "-env", "=x"), "not of the form K=V"},
		{append(slices.Clip(good), "-arch", "vax"), `-arch "vax" is neither amd64 nor arm64`},
		{append(slices.Clip(good), "-ref", "a:b:c"), `-ref "a:b:c"`},
		{append(slices.Clip(good), "-nonsense"), "nonsense"},
	} {
		err := run(row.args, io.Discard)
		require.ErrorIs(t, err, errUsage, "%v", row.args)
		require.ErrorContains(t, err, row.want)
	}
	require.ErrorIs(t, run([]string{"-h"}, io.Discard), flag.ErrHelp)
}

func TestRefusedLayers(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, want string
		spoil      func(t *testing.T, dir string)
	}{
		{"a whiteout", "a name that begins with .wh. means a deletion", func(t *testing.T, dir string) {
			put(t, dir, "etc/.wh.passwd", "", 0o644)
		}},
		{"a pipe", "etc/pipe is neither file, folder nor symbolic link", func(t *testing.T, dir string) {
			require.NoError(t, os.Mkdir(filepath.Join(dir, "etc"), 0o755))
			require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "etc/pipe"), 0o600))
		}},
		{"no interpreter", "/usr/bin/x needs /bin/bash, which no layer has", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/x", "#! /bin/bash -e\n", 0o755)
		}},
		{"an interpreter that is a dead link", "/usr/bin/x needs /usr/bin/dead, which", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/x", "#!/usr/bin/dead\n", 0o755)
			require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "usr/bin/dead")))
		}},
		{"no loader", "/usr/bin/p needs /lib64/ld.so, which no layer has", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/p", makeELF(t, elf.EM_X86_64, "/lib64/ld.so"), 0o755)
		}},
		{"no library", "/usr/bin/p needs the library libgone.so.1, which no layer has", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/p", makeELF(t, elf.EM_X86_64, "/usr/bin/sh", "libgone.so.1"), 0o755)
		}},
		{"a library elsewhere", "/usr/bin/p needs the library liba.so.1, which", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/p", makeELF(t, elf.EM_X86_64, "/usr/bin/sh", "liba.so.1"), 0o755)
			put(t, dir, "opt/liba.so.1", "", 0o644)
		}},
		{"another machine", "/usr/bin/p is for EM_AARCH64, but the image is for EM_X86_64", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/p", makeELF(t, elf.EM_AARCH64, ""), 0o755)
		}},
		{"a broken program", "/usr/bin/p:", func(t *testing.T, dir string) {
			put(t, dir, "usr/bin/p", elf.ELFMAG+"and then nothing that makes sense", 0o755)
		}},
		{"nothing", "the folder is empty", func(t *testing.T, dir string) {
			names, err := os.ReadDir(dir)
			require.NoError(t, err)
			for _, n := range names {
				require.NoError(t, os.RemoveAll(filepath.Join(dir, n.Name())))
			}
		}},
		{"no folder", "no such file or directory", func(t *testing.T, dir string) {
			require.NoError(t, os.RemoveAll(dir))
		}},
		{"a file", "is not a folder", func(t *testing.T, dir string) {
			require.NoError(t, os.RemoveAll(dir))
			require.NoError(t, os.WriteFile(dir, nil, 0o644))
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir, out := makeTree(t, time.Now()), t.TempDir()
			row.spoil(t, dir)
			file := filepath.Join(out, "image.tar")
			require.NoError(t, os.WriteFile(file, []byte("the image of before"), 0o644))
			err := run([]string{"-o", file, "-ref", "trivet", "-arch", "amd64", "-layer", dir}, io.Discard)
			require.ErrorContains(t, err, row.want)
			require.NotErrorIs(t, err, errUsage)
			left, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, "the image of before", string(left))
			names, err := os.ReadDir(out)
			require.NoError(t, err)
			require.Len(t, names, 1, "something is left beside the file")
		})
	}
}

func TestProgramsMayNeedWhatOtherLayersHave(t *testing.T) {
	t.Parallel()
	upper, lower := t.TempDir(), makeTree(t, time.Now())
	put(t, upper, "usr/local/bin/p", makeELF(t, elf.EM_X86_64, "/lib64/ld.so", "liba.so.1", "libb.so.2"), 0o755)
	put(t, upper, "usr/local/bin/script", "#!/bin/sh\n", 0o755)
	put(t, upper, "usr/share/notes", "#!/bin/nothing\n", 0o644) // not executable, so not a program
	put(t, lower, "usr/lib/machine/ld.so", makeELF(t, elf.EM_X86_64, ""), 0o755)
	put(t, lower, "usr/lib/machine/liba.so.1.2", makeELF(t, elf.EM_X86_64, ""), 0o644)
	put(t, lower, "usr/lib/machine/libb.so.2", makeELF(t, elf.EM_X86_64, "", "liba.so.1"), 0o644)
	require.NoError(t, os.Symlink("liba.so.1.2", filepath.Join(lower, "usr/lib/machine/liba.so.1")))
	require.NoError(t, os.Symlink("usr/lib", filepath.Join(lower, "lib")))
	require.NoError(t, os.Mkdir(filepath.Join(lower, "usr/lib64"), 0o755))
	require.NoError(t, os.Symlink("usr/lib64", filepath.Join(lower, "lib64")))
	require.NoError(t, os.Symlink("/lib/machine/ld.so", filepath.Join(lower, "usr/lib64/ld.so")))
	require.NoError(t, checkPrograms([]string{lower, upper}, "amd64"))
}

func TestNoFolderForTheArchive(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "no", "image.tar")
	err := run([]string{
		"-o", file, "-ref", "trivet", "-arch", "amd64", "-layer", makeTree(t, time.Now()),
	}, io.Discard)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorContains(t, err, "write "+file)
}

func TestNothingIsLeftOfAnArchiveThatFailed(t *testing.T) {
	t.Parallel()
	out := t.TempDir()
	file := filepath.Join(out, "image.tar")
	require.NoError(t, os.Mkdir(file, 0o755)) // so that the last step fails
	err := run([]string{"-o", file, "-ref", "trivet", "-arch", "amd64", "-layer", makeTree(t, time.Now())}, io.Discard)
	require.ErrorContains(t, err, "write "+file)
	names, err := os.ReadDir(out)
	require.NoError(t, err)
	require.Len(t, names, 1)
}

// makeELF makes a 64-bit little-endian program that names a loader, if any, and libraries, and has no code.
//
//	header | program header | names and loader | dynamic section | section headers: null, names, dynamic
func makeELF(t *testing.T, machine elf.Machine, loader string, libraries ...string) string {
	t.Helper()
	const headerBytes, programBytes, sectionBytes = 64, 56, 64
	names := []byte{0}
	var dynamic []elf.Dyn64
	for _, library := range libraries {
		dynamic = append(dynamic, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: uint64(len(names))})
		names = append(append(names, library...), 0)
	}
	dynamic = append(dynamic, elf.Dyn64{Tag: int64(elf.DT_NULL)})
	loaderAt := uint64(len(names))
	names = append(append(names, loader...), 0)
	namesAt := uint64(headerBytes + programBytes)
	dynamicAt := namesAt + uint64(len(names))
	dynamicBytes := uint64(16 * len(dynamic))

	header := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
		Phoff: headerBytes, Shoff: dynamicAt + dynamicBytes, Ehsize: headerBytes,
		Phentsize: programBytes, Phnum: 1, Shentsize: sectionBytes, Shnum: 3, Shstrndx: 1,
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	segment := elf.Prog64{Type: uint32(elf.PT_NULL)}
	if loader != "" {
		segment = elf.Prog64{
			Type: uint32(elf.PT_INTERP), Off: namesAt + loaderAt, Filesz: uint64(len(loader) + 1),
		}
	}
	var b bytes.Buffer
	for _, part := range []any{
		header, segment, names, dynamic,
		elf.Section64{},
		elf.Section64{Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))},
		elf.Section64{Type: uint32(elf.SHT_DYNAMIC), Off: dynamicAt, Size: dynamicBytes, Link: 1, Entsize: 16},
	} {
		require.NoError(t, binary.Write(&b, binary.LittleEndian, part))
	}
	return b.String()
}
