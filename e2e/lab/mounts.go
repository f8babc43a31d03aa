package lab

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
)

// mount is a line of /proc/PID/mountinfo.
type mount struct {
	major, minor uint64
	point        string
	kind         string // filesystem, such as ext4 or fuse.trivet
}

// readMounts returns the mounts that process pid ("self" or a number) sees.
func readMounts(pid string) ([]mount, error) {
	text, err := os.ReadFile("/proc/" + pid + "/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	var mounts []mount
	for line := range strings.Lines(string(text)) {
		m, err := parseMount(line)
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// parseMount reads `36 35 98:0 /root /point rw,noatime shared:1 - ext4 /dev/x rw`; the optional fields
// end at the hyphen (proc_pid_mountinfo(5)).
func parseMount(line string) (mount, error) {
	before, after, ok := strings.Cut(line, " - ")
	left, right := strings.Fields(before), strings.Fields(after)
	if !ok || len(left) < 6 || len(right) < 1 {
		return mount{}, fmt.Errorf("mount %q: not a line of mountinfo", line)
	}
	majorText, minorText, _ := strings.Cut(left[2], ":")
	major, err1 := strconv.ParseUint(majorText, 10, 32)
	minor, err2 := strconv.ParseUint(minorText, 10, 32)
	if err1 != nil || err2 != nil {
		return mount{}, fmt.Errorf("mount %q: device %q is not two numbers", line, left[2])
	}
	return mount{major: major, minor: minor, point: unescape(left[4]), kind: right[0]}, nil
}

// unescape undoes the octal escapes of blank, tab, newline and backslash.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// descendsFromAny says whether process pid is one of the ancestors or descends from one.
func descendsFromAny(pid int, ancestors map[int]bool) bool {
	for ; pid > 1; pid = parentOf(pid) {
		if ancestors[pid] {
			return true
		}
	}
	return false
}

func parentOf(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "PPid:"); ok {
			parent, err := strconv.Atoi(strings.TrimSpace(rest))
			if err != nil {
				return 0
			}
			return parent
		}
	}
	return 0
}

func linkExists(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}
