package node

import (
	"os"
	"strconv"
	"strings"

	"github.com/trivet-csi/trivet/node/blockdev"
)

const (
	// ublkParameter is how many ublk devices the kernel module makes: of all users together on Linux 6.0 and the kernels
	// after it, of unprivileged ones on newer ones, where it is a cautious guess for us.
	ublkParameter = "/sys/module/ublk_drv/parameters/ublks_max"
	// ublkDefault is the module's own number (drivers/block/ublk_drv.c, ublks_max).
	ublkDefault = 64
)

// maxVolumes returns how many volumes can be attached here at a time: what the operator said, or as many as the kernel
// makes devices of the kind in use; 0 = no limit. Loop devices, and nbd devices made through netlink, have none. It is
// read anew each time: a module may be loaded with another number while we run.
func (c *Config) maxVolumes() int64 {
	if c.MaxVolumes > 0 || c.Attach != blockdev.KindUblk {
		return c.MaxVolumes
	}
	return ublkLimit(ublkParameter)
}

func ublkLimit(path string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return ublkDefault // not loaded yet, or it does not tell
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || n <= 0 {
		return ublkDefault
	}
	return n
}
