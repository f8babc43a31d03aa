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

// With gives a file to a loop device while do runs, and after that for as long as it is mounted. `mount -o loop`, and
// mkfs.ext4 on a file, would ask loop devices of the machine first, and hang as long as some other program's does not
// answer: one over a FUSE file whose server is away. The device's own number of a moment ago may be taken by then: it
// tries a hundred times. Linux, root.
func With(file string, do func(device string) error) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer ctl.Close()
	for range loopTriesMax {
		number, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("get a free loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", number)
		dev, err := os.OpenFile(device, os.O_RDWR, 0)
		if errors.Is(err, unix.ENXIO) { // another program took it, and is giving it back
			continue
		}
		if err != nil {
			return err
		}
		cfg := unix.LoopConfig{Fd: uint32(f.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR // with its last user
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			err = do(device)
		} else {
			err = fmt.Errorf("configure %s: %w", device, err)
		}
		if err = errors.Join(err, dev.Close()); !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return errors.New("other programs were quicker to take each loop device")
}
