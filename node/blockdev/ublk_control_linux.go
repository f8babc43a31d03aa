package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// ublk (kernel document block/ublk.rst; include/uapi/linux/ublk_cmd.h; drivers/block/ublk_drv.c). A device
// is made by commands to /dev/ublk-control and served by commands to /dev/ublkcN, both by io_uring.
// Integers are in the machine's byte order.
const (
	ublkControlPath = "/dev/ublk-control"

	// Commands of the control device, encoded as ioctls (UBLK_F_CMD_IOCTL_ENCODE): _IOWR('u', nr, 32 bytes),
	// and _IOR for those that only ask.
	ublkGetDevInfo    = 2<<30 | 32<<16 | 'u'<<8 | 0x02
	ublkAddDev        = 3<<30 | 32<<16 | 'u'<<8 | 0x04
	ublkDelDev        = 3<<30 | 32<<16 | 'u'<<8 | 0x05
	ublkStartDev      = 3<<30 | 32<<16 | 'u'<<8 | 0x06
	ublkStopDev       = 3<<30 | 32<<16 | 'u'<<8 | 0x07
	ublkSetParams     = 3<<30 | 32<<16 | 'u'<<8 | 0x08
	ublkStartRecovery = 3<<30 | 32<<16 | 'u'<<8 | 0x10
	ublkEndRecovery   = 3<<30 | 32<<16 | 'u'<<8 | 0x11
	ublkDelDevAsync   = 2<<30 | 32<<16 | 'u'<<8 | 0x14 // Linux 6.9: does not wait for the last user
	ublkGetFeatures   = 2<<30 | 32<<16 | 'u'<<8 | 0x13
	ublkUpdateSize    = 3<<30 | 32<<16 | 'u'<<8 | 0x15

	// UBLK_F_*.
	ublkUserRecovery = 1 << 3  // the device outlives its server
	ublkReissue      = 1 << 4  // and so do requests under way
	ublkIoctlEncode  = 1 << 6  // see above
	ublkUserCopy     = 1 << 7  // data move by pread and pwrite on ublkcN, not to an address given with each fetch
	ublkHasSize      = 1 << 10 // UBLK_F_UPDATE_SIZE, Linux 6.16
	ublkFlags        = ublkUserRecovery | ublkReissue | ublkIoctlEncode | ublkUserCopy

	ublkStateQuiesced = 2 // of a device: its server is dead, requests wait

	ublkAnyNumber = 1<<32 - 1

	// Parameters.
	ublkParamBasic     = 1 << 0
	ublkParamDiscard   = 1 << 1
	ublkAttrCache      = 1 << 2 // volatile: the kernel sends flushes
	ublkAttrFUA        = 1 << 3
	ublkZeroSectorsMax = 1<<31>>9 - trivet.BlockSize/sectorBytes // longest discard or zeroing: just below 2 GiB
	blockShift         = 12
)

// Both sides agree on the block size.
var _ = [1]struct{}{}[trivet.BlockSize-1<<blockShift]

// ublkCtrlCmd is struct ublksrv_ctrl_cmd.
type ublkCtrlCmd struct {
	device    uint32
	queue     uint16 // all ones: not about a queue
	lenBytes  uint16 // of what addr points to
	addr      uint64
	data      uint64
	pathBytes uint16
	_         uint16
	_         uint32
}

// ublkInfo is struct ublksrv_ctrl_dev_info.
type ublkInfo struct {
	queues, depth, state, _ uint16
	requestBytesMax         uint32
	device                  uint32
	pid                     int32
	_                       uint32
	flags                   uint64
	tag                     uint64 // ublksrv_flags: ours, the driver keeps it as it is
	_, _                    uint32 // owner, of unprivileged devices
	_, _                    uint64
}

// ublkControl sends commands to the control device. It is used by one goroutine at a time.
type ublkControl struct {
	fd   int
	ring *uring
}

// dialUblk returns ErrUnavailable where ublk_drv is not loaded, too old, or io_uring is forbidden.
func dialUblk() (*ublkControl, error) {
	fd, err := unix.Open(ublkControlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s (is ublk_drv loaded?): %w: %w", ublkControlPath, err, trivet.ErrUnavailable)
	}
	ring, err := openUring(4, uringSQE128)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	c := &ublkControl{fd: fd, ring: ring}
	features, err := c.features()
	if err == nil && features&ublkFlags != ublkFlags {
		err = fmt.Errorf("ublk features %#x, want %#x (Linux 6.5): %w", features, ublkFlags, trivet.ErrUnavailable)
	}
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

func (c *ublkControl) close() error { return errors.Join(c.ring.close(), unix.Close(c.fd)) }

// command runs one command to its end. buf is what the command reads or fills. An errno of the kernel
// is returned as such.
func (c *ublkControl) command(op uint32, device uint32, data uint64, buf []byte) error {
	sqe := c.ring.push()
	if sqe == nil {
		return fmt.Errorf("ublk control ring is full: %w", trivet.ErrUnavailable)
	}
	putCmd(sqe, c.fd, op, 0)
	cmd := (*ublkCtrlCmd)(unsafe.Pointer(&sqe[uringCmdOffset]))
	cmd.device, cmd.queue, cmd.data = device, 1<<16-1, data
	if len(buf) > 0 {
		// buf does not move: it is on the heap, and referenced until the completion.
		cmd.addr, cmd.lenBytes = uint64(uintptr(unsafe.Pointer(&buf[0]))), uint16(len(buf))
	}
	for {
		if err := c.ring.enter(1); err != nil {
			return err
		}
		if _, result, ok := c.ring.pop(); ok {
			runtime.KeepAlive(buf)
			if result < 0 {
				return unix.Errno(-result)
			}
			return nil
		}
	}
}

func (c *ublkControl) features() (uint64, error) {
	buf := make([]byte, 8)
	if err := c.command(ublkGetFeatures, ublkAnyNumber, 0, buf); err != nil {
		return 0, fmt.Errorf("ublk features (Linux 6.5 has them): %w: %w", err, trivet.ErrUnavailable)
	}
	return binary.NativeEndian.Uint64(buf), nil
}

// add makes a device, not yet started; info.device ublkAnyNumber takes a free one and tells which.
func (c *ublkControl) add(info *ublkInfo) error {
	if err := c.command(ublkAddDev, info.device, 0, bytesOf(info)); err != nil {
		return fmt.Errorf("add ublk device: %w", err)
	}
	return nil
}

// info returns what the kernel knows of a device. ErrNotFound if there is none.
func (c *ublkControl) info(device uint32) (*ublkInfo, error) {
	info := new(ublkInfo)
	err := c.command(ublkGetDevInfo, device, 0, bytesOf(info))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("ublk device %d: %w", device, trivet.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("ask for ublk device %d: %w", device, err)
	}
	return info, nil
}

// setParams sets size and limits, before the start.
func (c *ublkControl) setParams(device uint32, sizeBytes int64) error {
	p := ublkParams{types: ublkParamBasic | ublkParamDiscard}
	p.lenBytes = uint32(unsafe.Sizeof(p))
	p.attrs = ublkAttrCache | ublkAttrFUA
	p.logicalShift, p.physicalShift, p.ioOptShift, p.ioMinShift = blockShift, blockShift, blockShift, blockShift
	p.sectorsMax, p.sectors = requestBytesMax/sectorBytes, uint64(sizeBytes/sectorBytes)
	p.discardGranularity = trivet.BlockSize
	p.discardSectorsMax, p.zeroSectorsMax, p.discardSegmentsMax = ublkZeroSectorsMax, ublkZeroSectorsMax, 1
	if err := c.command(ublkSetParams, device, 0, bytesOf(&p)); err != nil {
		return fmt.Errorf("set limits of ublk device %d: %w", device, err)
	}
	return nil
}

// ublkParams is struct ublk_params up to its discard part; the kernel takes a shorter struct than its own.
type ublkParams struct {
	lenBytes, types uint32

	attrs                                               uint32
	logicalShift, physicalShift, ioOptShift, ioMinShift uint8
	sectorsMax, _                                       uint32
	sectors                                             uint64
	_                                                   uint64

	discardAlignment, discardGranularity uint32
	discardSectorsMax, zeroSectorsMax    uint32
	discardSegmentsMax, _                uint16
	_                                    uint32
}

// bytesOf returns the memory of a struct that is laid out as the kernel's.
func bytesOf[T any](p *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p)) }

// remove deletes a stopped device. Its number may stay taken until the last user has closed it.
func (c *ublkControl) remove(device uint32) error {
	err := c.command(ublkDelDevAsync, device, 0, nil)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = c.command(ublkDelDev, device, 0, nil)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete ublk device %d: %w", device, err)
	}
	return nil
}

// stop removes the block device. Requests under way that no server answers fail with EIO.
func (c *ublkControl) stop(device uint32) error {
	if err := c.command(ublkStopDev, device, 0, nil); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("stop ublk device %d: %w", device, err)
	}
	return nil
}

// find returns the number of the device with a tag, noUblk if there is none. It is how a device is found
// whose maker died between making it and writing down its number.
func (c *ublkControl) find(tag uint64) (int, error) {
	nodes, err := filepath.Glob("/dev/ublkc*")
	if err != nil {
		return noUblk, fmt.Errorf("list ublk devices: %w", err)
	}
	for _, path := range nodes {
		number, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(path), "ublkc"))
		if err != nil {
			continue
		}
		info, err := c.info(uint32(number))
		if errors.Is(err, trivet.ErrNotFound) {
			continue
		}
		if err != nil {
			return noUblk, err
		}
		if info.tag == tag {
			return number, nil
		}
	}
	return noUblk, nil
}

// noUblk is the number of no device.
const noUblk = -1
