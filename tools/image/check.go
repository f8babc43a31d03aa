package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// machines are the processors of the architectures that the check knows.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// program is one executable file of the layers and what must be there for it to start.
type program struct {
	name      string
	loader    string   // absolute path in the image: of the dynamic loader, or of a script's interpreter
	libraries []string // file names
}

// contents is what the check has seen in the layers so far.
type contents struct {
	machine  elf.Machine
	files    map[string]bool   // absolute names in the image, links that end nowhere left out
	folders  map[string]string // links to folders at the top, such as /bin → usr/bin
	library  map[string]bool   // names of files in folders of libraries
	programs []program
}

// checkPrograms refuses layers in which a program could not start. It looks at names only: that a library has every
// symbol is left to the packages. A file that a higher layer replaces is checked as well.
func checkPrograms(layers []string, arch string) error {
	machine, ok := machines[arch]
	if !ok {
		return fmt.Errorf("%w: -arch %q is neither amd64 nor arm64", errUsage, arch)
	}
	c := contents{machine: machine, files: map[string]bool{}, folders: map[string]string{}, library: map[string]bool{}}
	for _, dir := range layers {
		if info, err := os.Stat(dir); err != nil {
			return fmt.Errorf("layer %s: %w", dir, err)
		} else if !info.IsDir() {
			return fmt.Errorf("layer %s is not a folder", dir)
		}
		if err := c.scan(dir); err != nil {
			return fmt.Errorf("check layer %s: %w", dir, err)
		}
	}
	return c.missing()
}

func (c *contents) scan(dir string) error {
	return filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		name := "/" + filepath.ToSlash(rel)
		if d.Type() == fs.ModeSymlink {
			return c.symlink(dir, file, name)
		}
		c.addFile(name)
		if !d.Type().IsRegular() {
			return nil // writeTree says why not
		}
		return c.inspect(file, name)
	})
}

func (c *contents) addFile(name string) {
	c.files[name] = true
	if strings.HasPrefix(name, "/lib") || strings.HasPrefix(name, "/usr/lib") {
		c.library[path.Base(name)] = true
	}
}

// symlink counts a link as a file when it leads to one of the same layer, and remembers links to folders.
func (c *contents) symlink(dir, file, name string) error {
	target, err := os.Readlink(file)
	if err != nil {
		return err
	}
	full := path.Join(path.Dir(name), target)
	if path.IsAbs(target) {
		full = target
	}
	info, err := os.Stat(filepath.Join(dir, full))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		c.folders[name] = full
	default:
		c.addFile(name)
	}
	return nil
}

// inspect remembers what a program or library needs; other files are left alone.
func (c *contents) inspect(file, name string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 256)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return err
	}
	switch head = head[:n]; {
	case bytes.HasPrefix(head, []byte("#!")):
		return c.inspectScript(f, name, head)
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		return c.inspectELF(f, name)
	}
	return nil
}

func (c *contents) inspectScript(f *os.File, name string, head []byte) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	line, _, _ := bytes.Cut(head[2:], []byte("\n"))
	if words := strings.Fields(string(line)); len(words) > 0 && info.Mode()&0o111 != 0 {
		c.programs = append(c.programs, program{name: name, loader: words[0]})
	}
	return nil
}

func (c *contents) inspectELF(f *os.File, name string) error {
	e, err := elf.NewFile(f)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if e.Machine != c.machine {
		return fmt.Errorf("%s is for %s, but the image is for %s", name, e.Machine, c.machine)
	}
	libraries, err := e.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("libraries of %s: %w", name, err)
	}
	p := program{name: name, libraries: libraries}
	for _, segment := range e.Progs {
		if segment.Type != elf.PT_INTERP {
			continue
		}
		loader, err := io.ReadAll(segment.Open())
		if err != nil {
			return fmt.Errorf("loader of %s: %w", name, err)
		}
		p.loader = string(bytes.TrimRight(loader, "\x00"))
	}
	c.programs = append(c.programs, p)
	return nil
}

// missing returns one error for each file that a program needs and no layer has.
func (c *contents) missing() error {
	var errs []error
	for _, p := range c.programs {
		if p.loader != "" && !c.files[c.resolve(p.loader)] {
			errs = append(errs, fmt.Errorf("%s needs %s, which no layer has", p.name, p.loader))
		}
		for _, library := range p.libraries {
			if !c.library[library] {
				errs = append(errs, fmt.Errorf("%s needs the library %s, which no layer has", p.name, library))
			}
		}
	}
	return errors.Join(errs...)
}

// resolve follows a link to a folder at the start of name, as /bin in /bin/sh.
func (c *contents) resolve(name string) string {
	top, rest, found := strings.Cut(strings.TrimPrefix(name, "/"), "/")
	if target, ok := c.folders["/"+top]; ok && found {
		return path.Join(target, rest)
	}
	return name
}
