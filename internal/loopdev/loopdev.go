// Package loopdev gives files to loop devices of the machine, for programs that try others and their tests.
package loopdev

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loopTriesMax is how many loop devices are tried: another program may be quicker each time.
const loopTriesMax = 100

// With gives a file to a loop device while do runs, and after that for as long as it is mounted. Linux, root.
func With(file string, do func(device string) error) error {
	dev, err := Open(file)
	if err != nil {
		return err
	}
	return errors.Join(do(dev.Name()), dev.Close())
}

// Open gives a file to a loop device, which goes with its last user: whoever has it open, as the caller has by what is
// returned, or mounted. `mount -o loop`, and mkfs.ext4 on a file, would ask loop devices of the machine first, and hang
// as long as some other program's does not answer: one over a FUSE file whose server is away. The device's own number
// of a moment ago may be taken by then, or be on its way back, for which losetup gives up: it tries a hundred times.
// Linux, root.
func Open(file string) (*os.File, error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for range loopTriesMax {
		number, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("get a free loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", number)
		dev, err := os.OpenFile(device, os.O_RDWR, 0)
		if errors.Is(err, unix.ENXIO) { // another program took it, and is giving it back
			continue
		}
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(f.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR // with its last user
		if err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err == nil {
			return dev, nil
		}
		err = errors.Join(fmt.Errorf("configure %s: %w", device, err), dev.Close())
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
	return nil, errors.New("other programs were quicker to take each loop device")
}
