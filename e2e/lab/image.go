package lab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Image is a container image of one layer.
type Image struct {
	// Name is the full reference, such as docker.io/library/busybox:latest.
	Name string
	// Files are what is in it. Their folders are made, with mode 0755.
	Files []ImageFile
	// Entrypoint, Cmd and Env as in a Dockerfile.
	Entrypoint, Cmd, Env []string
}

// ImageFile is a file of an image, owned by root. Exactly one of Source, Link and Text counts, in this
// order; none of them with a mode of a folder makes a folder.
type ImageFile struct {
	Path   string // without a leading slash
	Mode   fs.FileMode
	Source string // a file of this machine to copy
	Link   string // target of a symbolic link
	Text   string
}

// WriteImage writes img to path as an archive in the format of `docker save`, which containerd
// imports:
//
//	layer.tar       the files
//	DIGEST.json     configuration: entrypoint, and the SHA-256 of layer.tar
//	manifest.json   which is which, and the name
//
// The same image gives the same bytes. The archive appears whole or not at all.
func WriteImage(path string, img Image) error {
	if img.Name == "" || len(img.Files) == 0 {
		return fmt.Errorf("write image %q: needs a name and files", img.Name)
	}
	layer, err := os.CreateTemp(filepath.Dir(path), ".layer-")
	if err != nil {
		return fmt.Errorf("write image %s: %w", img.Name, err)
	}
	defer os.Remove(layer.Name()) //nolint:errcheck // a file of no use beside the archive
	defer layer.Close()
	sum := sha256.New()
	if err := writeLayer(io.MultiWriter(layer, sum), img.Files); err != nil {
		return fmt.Errorf("write image %s: %w", img.Name, err)
	}
	if err := writeArchive(path, img, layer, hex.EncodeToString(sum.Sum(nil))); err != nil {
		return fmt.Errorf("write image %s: %w", img.Name, err)
	}
	return nil
}

func writeArchive(path string, img Image, layer *os.File, layerSum string) error {
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": img.Entrypoint, "Cmd": img.Cmd, "Env": img.Env},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + layerSum}},
	})
	if err != nil {
		return err
	}
	configSum := sha256.Sum256(config)
	configName := hex.EncodeToString(configSum[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{img.Name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	size, err := layer.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	out, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	t := tar.NewWriter(out)
	err = errors.Join(
		addEntry(t, "layer.tar", size, layer),
		addEntry(t, configName, int64(len(config)), bytes.NewReader(config)),
		addEntry(t, "manifest.json", int64(len(manifest)), bytes.NewReader(manifest)),
		t.Close(), out.Close(),
	)
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return os.Rename(path+".new", path)
}

func addEntry(t *tar.Writer, name string, size int64, from io.Reader) error {
	if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err := io.Copy(t, from)
	return err
}

// writeLayer writes folders before what is in them, sorted, without times.
func writeLayer(w io.Writer, files []ImageFile) error {
	all := slices.Clone(files)
	have := map[string]bool{}
	for _, f := range files {
		if f.Path == "" || strings.HasPrefix(f.Path, "/") || path.Clean(f.Path) != f.Path || have[f.Path] {
			return fmt.Errorf("file %q: must be a clean path without a leading slash, and only once", f.Path)
		}
		have[f.Path] = true
	}
	for _, f := range files {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if !have[dir] {
				have[dir] = true
				all = append(all, ImageFile{Path: dir, Mode: fs.ModeDir | 0o755})
			}
		}
	}
	slices.SortFunc(all, func(a, b ImageFile) int { return strings.Compare(a.Path, b.Path) })
	t := tar.NewWriter(w)
	for _, f := range all {
		if err := addFile(t, f); err != nil {
			return fmt.Errorf("file %s: %w", f.Path, err)
		}
	}
	return t.Close()
}

func addFile(t *tar.Writer, f ImageFile) error {
	h := &tar.Header{Name: f.Path, Mode: int64(f.Mode.Perm()), Format: tar.FormatPAX}
	if f.Mode&fs.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch {
	case f.Mode.IsDir():
		h.Name, h.Typeflag = f.Path+"/", tar.TypeDir
		return t.WriteHeader(h)
	case f.Source != "":
		return copyInto(t, h, f.Source)
	case f.Link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
		return t.WriteHeader(h)
	}
	h.Typeflag, h.Size = tar.TypeReg, int64(len(f.Text))
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.WriteString(t, f.Text)
	return err
}

func copyInto(t *tar.Writer, h *tar.Header, source string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	h.Typeflag, h.Size = tar.TypeReg, info.Size()
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(t, in)
	return err
}
