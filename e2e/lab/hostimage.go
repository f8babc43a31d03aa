package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// LoadPrograms gives every node an image with programs of this machine, the shared objects that they load, and busybox
// for the rest.
func (c *Cluster) LoadPrograms(ctx context.Context, name string, programs ...string) error {
	img, err := c.programsImage(ctx, name, programs)
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	archive := filepath.Join(c.dir, "images", "programs.tar")
	if err := WriteImage(archive, img); err != nil {
		return err
	}
	return c.LoadImage(ctx, archive)
}

func (c *Cluster) programsImage(ctx context.Context, name string, programs []string) (Image, error) {
	img, err := busyboxImage(ctx, c.cache.deb("bin/busybox"))
	if err != nil {
		return Image{}, err
	}
	img.Name = name
	img.Files = slices.DeleteFunc(img.Files, func(f ImageFile) bool { // the real one is to be found
		return slices.Contains(programs, filepath.Base(f.Path))
	})
	files, err := hostFiles(ctx, programs)
	if err != nil {
		return Image{}, err
	}
	img.Files = append(img.Files, files...)
	return img, nil
}

// hostFiles returns programs of this machine, in bin, and the shared objects that they load, where they are here.
func hostFiles(ctx context.Context, programs []string) ([]ImageFile, error) {
	var files []ImageFile
	have := map[string]bool{}
	add := func(at, source string) {
		if !have[at] {
			have[at] = true
			files = append(files, ImageFile{Path: at, Mode: 0o755, Source: source})
		}
	}
	for _, program := range programs {
		path, err := exec.LookPath(program)
		if err != nil {
			return nil, err
		}
		objects, err := sharedObjects(ctx, path)
		if err != nil {
			return nil, err
		}
		for _, source := range objects {
			add(strings.TrimPrefix(source, "/"), source)
		}
		add("bin/"+program, path)
	}
	return files, nil
}

// sharedObjects returns the absolute paths of what the dynamic loader would load for a program, itself included.
func sharedObjects(ctx context.Context, program string) ([]string, error) {
	out, err := output(ctx, "ldd", program)
	if err != nil {
		return nil, err
	}
	var paths []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("ldd %s: %s", program, strings.TrimSpace(line))
		}
		for _, word := range strings.Fields(line) {
			if filepath.IsAbs(word) {
				paths = append(paths, word)
			}
		}
	}
	if len(paths) == 0 {
		return nil, errors.New("ldd " + program + ": no shared object")
	}
	return paths, nil
}
