package main

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// longAgo is the time of every file in a layer. It is not the time of the image: a layer whose files are the same must
// stay the same layer from one version to the next, so that nodes pull it once.
var longAgo = time.Unix(0, 0)

// newLayer makes a compressed layer of the files below dir. The files must not change until the image is written.
func newLayer(dir string) (v1.Layer, error) {
	opener := func() (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() { w.CloseWithError(writeTree(w, dir)) }() // ends when its reader has closed
		return r, nil
	}
	layer, err := tarball.LayerFromOpener(opener, tarball.WithMediaType(types.OCILayer),
		tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", dir, err)
	}
	return layer, nil
}

// inode tells one file from another; two names of one file are hard links.
type inode struct{ dev, ino uint64 }

// treeWriter turns a folder into a tar, in the order of its names, with nothing in it that differs between machines.
type treeWriter struct {
	dir   string
	tar   *tar.Writer
	first map[inode]string // the first name of a file with several
}

// writeTree writes everything below dir to w as a tar. It refuses what no layer should bring: devices, sockets, pipes,
// and names that readers of layers take for whiteouts.
func writeTree(w io.Writer, dir string) error {
	t := treeWriter{dir: dir, tar: tar.NewWriter(w), first: map[inode]string{}}
	n := 0
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		n++
		return t.add(path)
	})
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("the folder is empty")
	}
	return t.tar.Close()
}

func (t *treeWriter) add(path string) error {
	name, err := filepath.Rel(t.dir, path)
	if err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	header, err := t.header(path, filepath.ToSlash(name), info)
	if err != nil {
		return err
	}
	if err := t.tar.WriteHeader(header); err != nil {
		return fmt.Errorf("write the header of %s: %w", name, err)
	}
	if header.Typeflag != tar.TypeReg {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(t.tar, f); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// header describes the file at path: its mode without setuid and setgid, no owner but 0:0, no time.
func (t *treeWriter) header(path, name string, info fs.FileInfo) (*tar.Header, error) {
	if strings.HasPrefix(info.Name(), ".wh.") {
		return nil, fmt.Errorf("%s: a name that begins with .wh. means a deletion in a layer: rename it", name)
	}
	h := &tar.Header{Name: name, Mode: int64(info.Mode().Perm()), ModTime: longAgo}
	if info.Mode()&fs.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case fs.ModeSymlink:
		target, err := os.Readlink(path)
		if err != nil {
			return nil, err
		}
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, target, 0o777
	case 0:
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
		if first, linked := t.link(name, info); linked {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		}
	default:
		return nil, fmt.Errorf("%s is neither file, folder nor symbolic link (mode %s): remove it", name, info.Mode())
	}
	return h, nil
}

// link tells whether the file is in the tar already, under another name of it.
func (t *treeWriter) link(name string, info fs.FileInfo) (string, bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || stat.Nlink < 2 {
		return "", false
	}
	key := inode{dev: stat.Dev, ino: stat.Ino}
	if first, ok := t.first[key]; ok {
		return first, true
	}
	t.first[key] = name
	return "", false
}
