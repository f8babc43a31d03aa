package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// The family "nbd" (include/uapi/linux/nbd-netlink.h; drivers/block/nbd.c: nbd_genl_*).
const (
	nbdFamily        = "nbd"
	nbdFamilyVersion = 1

	nbdGenlConnect     = 1
	nbdGenlDisconnect  = 2
	nbdGenlReconfigure = 3
	nbdGenlStatus      = 5

	nbdAttrIndex       = 1
	nbdAttrSizeBytes   = 2
	nbdAttrBlockBytes  = 3
	nbdAttrServerFlags = 5
	nbdAttrSockets     = 7
	nbdAttrDeadWait    = 8 // seconds u64
	nbdAttrDeviceList  = 9
	nbdAttrBackend     = 10

	nbdAttrSocketItem      = 1
	nbdAttrSocketFD        = 1
	nbdAttrDeviceItem      = 1
	nbdAttrDeviceConnected = 2
)

// nbdDeadWait is how long the kernel lets a new request wait while no process serves the device, before it fails it and
// all that follow with EIO: as long as the keeper waits before it ends the device. A request that the dead process had
// got is left waiting by the kernel (nbd.c: nbd_xmit_timeout looks for a new socket, and there is none): that one is
// for the keeper.
func nbdDeadWait(k *keeper.Client) time.Duration {
	if k != nil {
		if d, err := k.Watchdog(); err == nil {
			return d
		}
	}
	return keeper.DefaultWatchdog
}

// appendDeadWait appends it, in whole seconds: 0 would be no wait at all.
func appendDeadWait(b []byte, wait time.Duration) []byte {
	return appendAttr64(b, nbdAttrDeadWait, uint64((wait+time.Second-1)/time.Second))
}

// nbdControl asks the kernel's NBD client.
type nbdControl struct{ *genlConn }

// dialNBD returns ErrUnavailable where nbd.ko is not loaded.
func dialNBD() (nbdControl, error) {
	c, err := dialGenl(nbdFamily)
	if err != nil {
		return nbdControl{}, fmt.Errorf("nbd (is the module loaded?): %w", err)
	}
	return nbdControl{c}, nil
}

// connect gives sockets, which are past the handshake, to a free device and returns its number. The
// kernel keeps references of its own to the sockets.
func (c nbdControl) connect(sockets []int, sizeBytes int64, flags uint16, backend string, wait time.Duration,
) (int, error) {
	b := appendAttr64(nil, nbdAttrSizeBytes, uint64(sizeBytes))
	b = appendAttr64(b, nbdAttrBlockBytes, trivet.BlockSize)
	b = appendAttr64(b, nbdAttrServerFlags, uint64(flags))
	b = appendDeadWait(b, wait)
	b = appendAttr(b, nbdAttrBackend, append([]byte(backend), 0))
	b = appendAttr(b, nbdAttrSockets, socketList(sockets))
	answer, err := c.do(nbdGenlConnect, nbdFamilyVersion, b)
	if err != nil {
		return 0, fmt.Errorf("nbd connect: %w", err)
	}
	index, ok := findAttr(answer, nbdAttrIndex)
	if !ok || len(index) < 4 {
		return 0, fmt.Errorf("nbd connect: answer without a device number: %w", trivet.ErrCorrupt)
	}
	return int(binary.NativeEndian.Uint32(index)), nil
}

// reconnect gives new sockets to a device in the place of dead ones. The kernel refuses if backend is
// not the one of connect. It drops sockets silently that find no dead one: then their other end is
// closed as soon as ours is.
func (c nbdControl) reconnect(index int, backend string, sockets []int, wait time.Duration) error {
	b := appendDeadWait(c.which(index, backend), wait)
	b = appendAttr(b, nbdAttrSockets, socketList(sockets))
	if _, err := c.do(nbdGenlReconfigure, nbdFamilyVersion, b); err != nil {
		return fmt.Errorf("nbd reconnect %d: %w", index, err)
	}
	return nil
}

// resize tells the kernel a new size.
func (c nbdControl) resize(index int, backend string, sizeBytes int64) error {
	b := appendAttr64(c.which(index, backend), nbdAttrSizeBytes, uint64(sizeBytes))
	if _, err := c.do(nbdGenlReconfigure, nbdFamilyVersion, b); err != nil {
		return fmt.Errorf("nbd resize %d to %d bytes: %w", index, sizeBytes, err)
	}
	return nil
}

func (nbdControl) which(index int, backend string) []byte {
	b := appendAttr32(nil, nbdAttrIndex, uint32(index))
	return appendAttr(b, nbdAttrBackend, append([]byte(backend), 0))
}

// disconnect ends a device: what is under way fails with EIO. It has no check of the backend, so the
// caller looks before (nbdBackend).
func (c nbdControl) disconnect(index int) error {
	_, err := c.do(nbdGenlDisconnect, nbdFamilyVersion, appendAttr32(nil, nbdAttrIndex, uint32(index)))
	if err != nil {
		return fmt.Errorf("nbd disconnect %d: %w", index, err)
	}
	return nil
}

// connected tells whether a device has a configuration, be its server alive or not.
func (c nbdControl) connected(index int) (bool, error) {
	answer, err := c.do(nbdGenlStatus, nbdFamilyVersion, appendAttr32(nil, nbdAttrIndex, uint32(index)))
	if err != nil {
		return false, fmt.Errorf("nbd status %d: %w", index, err)
	}
	list, _ := findAttr(answer, nbdAttrDeviceList)
	item, _ := findAttr(list, nbdAttrDeviceItem)
	state, ok := findAttr(item, nbdAttrDeviceConnected)
	if !ok || len(state) < 1 {
		return false, fmt.Errorf("nbd status %d: answer without a state: %w", index, trivet.ErrCorrupt)
	}
	return state[0] != 0, nil
}

// socketList encodes SOCKETS { ITEM { FD u32 } ... }.
func socketList(sockets []int) []byte {
	var list []byte
	for _, fd := range sockets {
		list = appendAttr(list, nbdAttrSocketItem, appendAttr32(nil, nbdAttrSocketFD, uint32(fd)))
	}
	return list
}

// nbdBackend returns the backend identifier of a device, "" if it has none.
func nbdBackend(index int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/nbd%d/backend", index))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) { // ENODEV: it went while we read
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("backend of nbd%d: %w", index, err)
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// findNBD returns the number of the device with a backend identifier, noNBD if there is none. It is
// how a device is found whose maker died between connecting it and writing down its number.
func findNBD(backend string) (int, error) {
	files, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		return noNBD, fmt.Errorf("list nbd devices: %w", err)
	}
	for _, f := range files {
		index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(f)), "nbd"))
		if err != nil {
			continue // a partition, or not ours
		}
		got, err := nbdBackend(index)
		if err != nil {
			return noNBD, err
		}
		if got == backend {
			return index, nil
		}
	}
	return noNBD, nil
}

// noNBD is the number of no device.
const noNBD = -1
