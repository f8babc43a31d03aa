package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Kernel is an unpacked Debian kernel package.
type Kernel struct {
	// Image is the bzImage to boot.
	Image string

	// Release is the kernel's name, as uname -r prints it in the guest.
	Release string

	modules map[string]string // name with '_' for '-' -> file
	builtin map[string]bool
}

// FindKernel looks into a folder into which a kernel package was unpacked. It wants exactly one.
func FindKernel(dir string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, fmt.Errorf("look for a kernel in %s: %w", dir, err)
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("look for a kernel in %s: found %d, want one", dir, len(images))
	}
	k := &Kernel{Image: images[0], modules: map[string]string{}, builtin: map[string]bool{}}
	k.Release = strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	root := filepath.Join(dir, "lib", "modules", k.Release)
	if _, err := os.Stat(root); err != nil { // Debian 13 has /usr/lib
		root = filepath.Join(dir, "usr", "lib", "modules", k.Release)
	}
	b, err := os.ReadFile(filepath.Join(root, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("look for modules in the kernel: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		k.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	err = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if strings.Contains(filepath.Base(path), ".ko") {
			k.modules[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look for modules in the kernel: %w", err)
	}
	return k, nil
}

// moduleName is the name under which a module depends on the one in a file such as ublk-drv.ko.xz.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// module is a kernel module, not compressed.
type module struct {
	name string
	data []byte
}

// load returns the named modules and those that they need, in the order to insert them. What is built
// in is left out. The package comes without modules.dep, which depmod would make after the
// installation, so the dependencies are read from where depmod has them: the section .modinfo.
func (k *Kernel) load(ctx context.Context, names []string) ([]module, error) {
	var order []module
	done := map[string]bool{}
	var visit func(name string, chain []string) error
	visit = func(name string, chain []string) error {
		name = strings.ReplaceAll(name, "-", "_")
		if done[name] || k.builtin[name] {
			return nil
		}
		if slices.Contains(chain, name) {
			return fmt.Errorf("kernel module %s: needs itself by %v", name, chain)
		}
		file, ok := k.modules[name]
		if !ok {
			return fmt.Errorf("kernel module %s: not in kernel %s", name, k.Release)
		}
		data, err := decompress(ctx, file)
		if err != nil {
			return fmt.Errorf("kernel module %s: %w", name, err)
		}
		needs, err := moduleNeeds(data)
		if err != nil {
			return fmt.Errorf("kernel module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := visit(n, append(chain, name)); err != nil {
				return err
			}
		}
		done[name] = true
		order = append(order, module{name: name, data: data})
		return nil
	}
	for _, name := range names {
		if err := visit(name, nil); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleNeeds reads "depends=a,b" from a module's .modinfo, which is a row of strings with a NUL each.
func moduleNeeds(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("read elf: %w", err)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("read elf: no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	for line := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := strings.CutPrefix(string(line), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}

// decompress reads a module, by the tool that its name asks for. The guest's kernel could do it for
// some formats, but not all.
func decompress(ctx context.Context, file string) ([]byte, error) {
	tool := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}[filepath.Ext(file)]
	if tool == "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read module: %w", err)
		}
		return b, nil
	}
	b, err := exec.CommandContext(ctx, tool, "-d", "-c", file).Output()
	if err != nil {
		return nil, fmt.Errorf("unpack by %s: %w", tool, err)
	}
	return b, nil
}
