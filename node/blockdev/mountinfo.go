package blockdev

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

const mountinfoPath = "/proc/self/mountinfo"

// mountEntry is one line of mountinfo (proc_pid_mountinfo(5)), as far as we need it.
type mountEntry struct {
	dev    string // "major:minor" of the filesystem
	root   string // what part of the filesystem is mounted
	point  string
	fstype string
	source string
}

// readMounts returns the mounts of this process's mount namespace, in the order they were made.
func readMounts() ([]mountEntry, error) {
	b, err := os.ReadFile(mountinfoPath)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMounts(string(b)), nil
}

// parseMounts parses mountinfo; lines that make no sense are passed over.
func parseMounts(text string) []mountEntry {
	var mounts []mountEntry
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		l, r := strings.Split(left, " "), strings.Split(right, " ")
		if !ok || len(l) < 6 || len(r) < 2 {
			continue
		}
		mounts = append(mounts, mountEntry{
			dev: l[2], root: unescapeMount(l[3]), point: unescapeMount(l[4]), fstype: r[0], source: unescapeMount(r[1]),
		})
	}
	return mounts
}

// unescapeMount undoes the kernel's \ooo for blanks and backslashes.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// usersOf returns the mounts that lead to a loop device: filesystems on it, and bind mounts of
// its device node, by which a pod gets a raw block volume.
func usersOf(mounts []mountEntry, l loopDevice) []mountEntry {
	dev, node := fmt.Sprintf("%d:%d", l.major, l.minor), fmt.Sprintf("/loop%d", l.number)
	var users []mountEntry
	for _, m := range mounts {
		if m.dev == dev || (m.fstype == "devtmpfs" && m.root == node) {
			users = append(users, m)
		}
	}
	return users
}
