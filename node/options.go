package node

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
)

// defaultFSType is what a volume is formatted with when nobody says.
const defaultFSType = "ext4"

// filesystems maps the supported filesystems to the package that has their tools.
var filesystems = map[string]struct{ tools string }{
	"ext4": {tools: "e2fsprogs"},
	"xfs":  {tools: "xfsprogs"},
}

// mountOptions are the mount options that a StorageClass or PersistentVolume may ask for; whatever
// is not here is refused (S9). Left out on purpose: what turns flushes off (barrier=0, nobarrier,
// data=writeback), since promise 1 rests on them; what hides damage (errors=continue); and suid and
// dev, which are the kernel's defaults anyway.
var mountOptions = []string{
	"ro", "rw", "atime", "noatime", "diratime", "nodiratime", "relatime", "strictatime", "lazytime",
	"nosuid", "nodev", "noexec", "sync", "dirsync", "discard", "nodiscard",
	"errors=remount-ro", "data=ordered", "data=journal",
	"acl", "user_xattr", "noquota", "uquota", "gquota", "pquota", "usrquota", "grpquota", "prjquota",
	"inode64", "nouuid", "largeio", "swalloc",
}

// mountPatterns are the mount options that carry a value. The last three are SELinux labels, which
// the kubelet adds; they hold commas within quotes.
var mountPatterns = []*regexp.Regexp{
	regexp.MustCompile(`^(commit|stripe|allocsize|logbufs|logbsize|sunit|swidth)=[0-9]{1,9}[kmg]?$`),
	regexp.MustCompile(`^(context|fscontext|defcontext|rootcontext)="[A-Za-z0-9_:.,-]{1,255}"$`),
	regexp.MustCompile(`^(context|fscontext|defcontext|rootcontext)=[A-Za-z0-9_:.-]{1,255}$`),
}

// checkMountOptions returns ErrUnsupported, naming the first option that is not allowed.
func checkMountOptions(options []string) error {
	for _, o := range options {
		if slices.Contains(mountOptions, o) {
			continue
		}
		if !slices.ContainsFunc(mountPatterns, func(re *regexp.Regexp) bool { return re.MatchString(o) }) {
			return fmt.Errorf("mount option %q: %w", o, ErrUnsupported)
		}
	}
	return nil
}

// checkFSType returns the filesystem to use, or ErrUnsupported.
func checkFSType(fsType string) (string, error) {
	if fsType == "" {
		fsType = defaultFSType
	}
	if _, ok := filesystems[fsType]; !ok {
		return "", fmt.Errorf("filesystem %q (ext4 and xfs are supported): %w", fsType, ErrUnsupported)
	}
	return fsType, nil
}

// checkPath returns the cleaned path, or ErrInvalid unless it is absolute, below the root, without
// ".." and free of control characters (S7, S8).
func checkPath(what, path string) (string, error) {
	clean := filepath.Clean(path)
	switch {
	case path == "":
		return "", fmt.Errorf("%s path is empty: %w", what, trivet.ErrInvalid)
	case !filepath.IsAbs(path) || clean == "/":
		return "", fmt.Errorf("%s path %q: want an absolute path below /: %w", what, path, trivet.ErrInvalid)
	case slices.Contains(strings.Split(path, "/"), ".."):
		return "", fmt.Errorf("%s path %q has a .. in it: %w", what, path, trivet.ErrInvalid)
	case len(path) >= 4096 || strings.ContainsFunc(path, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return "", fmt.Errorf("%s path %q is too long or has a control character: %w", what, path, trivet.ErrInvalid)
	}
	return clean, nil
}
