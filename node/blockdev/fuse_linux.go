package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// fuseTransport shows a Device as a FUSE filesystem of one regular file with a loop device on top. It
// needs root (CAP_SYS_ADMIN), /dev/fuse and /dev/loop-control, and no module of the kernel.
type fuseTransport struct{}

// fuseState is what a record says of the transport.
type fuseState struct {
	Point string `json:"point"` // where the FUSE file is mounted
	Loop  int    `json:"loop"`  // number of the loop device that was, or was about to be, configured
}

// noLoop is fuseState.Loop before there is one.
const noLoop = -1

// decodeFuseState decodes a record's state and checks that its file is the one in this folder: what
// it says is unmounted and freed by root.
func decodeFuseState(rec record, point string) (fuseState, error) {
	var st fuseState
	if err := json.Unmarshal(rec.State, &st); err != nil {
		return st, fmt.Errorf("decode attachment record: %w: %w", err, trivet.ErrCorrupt)
	}
	if st.Point != point || st.Loop < noLoop {
		return st, fmt.Errorf("attachment record of %q at %q, loop %d: in the folder of %q: %w",
			rec.Name, st.Point, st.Loop, point, trivet.ErrCorrupt)
	}
	return st, nil
}

// fuseDev is a device of fuseTransport that this process serves.
type fuseDev struct {
	name    string
	point   string // of the FUSE file
	device  trivet.Device
	server  *fuseServer
	loop    loopDevice
	keeper  *keeper.Client // nil = there is none
	buffers *Buffers       // may be nil
	log     *slog.Logger

	loopOff bool // the loop device was freed; of detach alone
}

func newFuseDev(s *site) *fuseDev {
	return &fuseDev{
		name: s.name, point: s.folder.file(deviceName), device: s.device, keeper: s.keeper, buffers: s.buffers, log: s.log,
	}
}

// available looks for the two control devices.
func (fuseTransport) available() error {
	for _, path := range []string{fusePath, loopControlPath} {
		if err := unix.Access(path, unix.R_OK|unix.W_OK); err != nil {
			return fmt.Errorf("open %s: %w: %w", path, err, trivet.ErrUnavailable)
		}
	}
	return nil
}

// attach mounts the file, serves it and configures the loop device.
func (fuseTransport) attach(ctx context.Context, s *site) (kernelDev, error) {
	d := newFuseDev(s)
	if err := d.open(ctx, s); err != nil {
		return nil, err
	}
	return d, nil
}

// open mounts the file, serves it and configures the loop device. On error it has undone all
// but the folder.
func (d *fuseDev) open(ctx context.Context, s *site) (err error) {
	st := fuseState{Point: d.point, Loop: noLoop}
	if err := os.WriteFile(d.point, nil, 0o600); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := s.save(KindFUSE, st); err != nil {
		return err
	}
	if err := d.serve(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// Whatever ctx says, leave nothing behind.
			err = errors.Join(err, d.endServer(context.WithoutCancel(ctx)))
		}
	}()
	file, err := openFile(d.point)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(file) }() // nothing was written
	d.loop, err = configureLoop(ctx, file, loopTag(d.name), func(number int) error {
		st.Loop = number
		return s.save(KindFUSE, st)
	})
	if err != nil {
		return err
	}
	d.server.facts.Connection = fuseConnection(d.point)
	d.keep()
	return nil
}

// serve mounts the FUSE file and waits until the kernel has greeted the server.
func (d *fuseDev) serve(ctx context.Context) error {
	fd, err := mountFuse(d.name, d.point)
	if err != nil {
		return err
	}
	d.server, err = newFuseServer(fd, d.device, d.buffers, d.log)
	if err != nil {
		return errors.Join(err, unmountFuse(ctx, d.point))
	}
	d.server.start(context.WithoutCancel(ctx)) // lives until detach
	select {
	case <-d.server.inited: // before, a loop device would see no file, or an empty one
		return nil
	case <-d.server.ended:
		err = d.server.err()
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return errors.Join(fmt.Errorf("wait for the kernel: %w", err), d.endServer(context.WithoutCancel(ctx)))
}

func (d *fuseDev) path() string { return d.loop.path() }

func (d *fuseDev) err() error { return d.server.err() }

func (d *fuseDev) grow(context.Context) error {
	want := d.device.Size()
	file, _, err := fileSize(d.point)
	if err != nil {
		return err
	}
	got, err := growLoop(d.loop)
	if err != nil {
		return err
	}
	if got < want {
		return fmt.Errorf("device has %d bytes, file %d, loop device %d: %w", want, file, got, trivet.ErrUnavailable)
	}
	d.log.Info("grown", "device", d.path(), "size", got)
	return nil
}
