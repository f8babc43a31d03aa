package vm

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet/internal/vm/plan"
)

// Image says what is in a guest and what it does.
type Image struct {
	// Kernel to boot.
	Kernel *Kernel

	// Init is the static program that becomes process 1: package guest.
	Init string

	// Modules to insert, by name, with what they need.
	Modules []string

	// Programs of the host, found in PATH or in /sbin, copied with the libraries that they ask for.
	// In the guest they are in /bin under the same name.
	Programs []string

	// Files by their path in the guest; the value is the path here. They are executable.
	Files map[string]string

	// Commands to run, one after the other. All run, also after one has failed.
	Commands [][]string

	// Env of the commands, as NAME=value, beside PATH, HOME and TMPDIR.
	Env []string
}

// build makes the initramfs.
func (im *Image) build(ctx context.Context) ([]byte, error) {
	mods, err := im.Kernel.load(ctx, im.Modules)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	c := newCPIO(zip)
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "run", "etc", "root", "mnt"} {
		c.dir(dir)
	}
	for _, link := range []string{"sbin", "usr/bin", "usr/sbin"} {
		c.link(link, "/bin")
	}
	p := plan.Plan{Commands: im.Commands, Env: im.Env}
	for i, m := range mods {
		path := fmt.Sprintf("/modules/%03d-%s.ko", i, m.name)
		c.file(path, 0o644, m.data)
		p.Modules = append(p.Modules, path)
	}
	planJSON, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode the guest's plan: %w", err)
	}
	c.file(plan.Path, 0o644, planJSON)
	files, err := im.files()
	if err != nil {
		return nil, err
	}
	for _, to := range sortedKeys(files) {
		data, err := os.ReadFile(files[to])
		if err != nil {
			return nil, fmt.Errorf("add to the initramfs: %w", err)
		}
		c.file(to, 0o755, data)
	}
	if err := errors.Join(c.close(), zip.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// files returns all files to copy, by their path in the guest.
func (im *Image) files() (map[string]string, error) {
	files := map[string]string{"/init": im.Init}
	for to, from := range im.Files {
		files[to] = from
	}
	for _, name := range im.Programs {
		path, err := findProgram(name)
		if err != nil {
			return nil, err
		}
		files["/bin/"+name] = path
		if err := addLibraries(files, path); err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", path, err)
		}
	}
	return files, nil
}

func findProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} { // not in the PATH of everybody
		if err == nil {
			return path, nil
		}
		path, err = exec.LookPath(filepath.Join(dir, name))
	}
	if err != nil {
		return "", fmt.Errorf("program for the guest: %w", err)
	}
	return path, nil
}

// libraryDirs is where Debian's loader looks on amd64.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/lib", "/usr/lib"}

// addLibraries adds the loader and the shared libraries of an ELF file, and theirs. In the guest they
// are where they are here, for that is where the loader looks.
func addLibraries(files map[string]string, path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read elf: %w", err)
	}
	defer func() { _ = f.Close() }() // nothing was written
	if s := f.Section(".interp"); s != nil {
		b, err := s.Data()
		if err != nil {
			return fmt.Errorf("read the loader's path: %w", err)
		}
		loader := string(bytes.TrimRight(b, "\x00"))
		files[loader] = loader
	}
	names, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read needed libraries: %w", err)
	}
	for _, name := range names {
		lib, err := findLibrary(name)
		if err != nil {
			return err
		}
		if _, ok := files[lib]; ok {
			continue
		}
		files[lib] = lib
		if err := addLibraries(files, lib); err != nil {
			return err
		}
	}
	return nil
}

func findLibrary(name string) (string, error) {
	for _, dir := range libraryDirs {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("library %s: not in %s", name, strings.Join(libraryDirs, ", "))
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
