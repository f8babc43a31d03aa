package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"github.com/trivet-csi/trivet"
)

// yardBytes is the size of a yardstick's file, and of the volume: small enough to be there quickly, large
// enough that random blocks do not meet.
const yardBytes = 512 << 20

// serveWriter writes 4 KiB and syncs, one after the other, to a file written beforehand: what a copy of a
// block costs where there is no replication.
func serveWriter(o *options, in io.Reader, out io.Writer) error {
	f, err := os.OpenFile(filepath.Join(o.dir, o.name+".data"), os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // written data is synced
	if err := prewrite(f); err != nil {
		return err
	}
	return serve(in, out, func(a ask) (answer, error) {
		block := aligned(trivet.BlockSize)
		fillRandom(block)
		r, err := drive(a.Load, func(_ int, rnd *rand.Rand) error {
			if _, err := f.WriteAt(block, rnd.Int64N(yardBytes/trivet.BlockSize)*trivet.BlockSize); err != nil {
				return err
			}
			return syscall.Fdatasync(int(f.Fd()))
		})
		return answer{Result: r}, err
	})
}

func prewrite(f *os.File) error {
	chunk := aligned(1 << 20)
	fillRandom(chunk)
	for at := int64(0); at < yardBytes; at += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk, at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// aligned returns n bytes that begin at a page, as O_DIRECT demands.
func aligned(n int) []byte {
	b := make([]byte, n+trivet.BlockSize)
	past := int(uintptr(unsafe.Pointer(&b[0])) % trivet.BlockSize) //nolint:gosec // alignment
	skip := (trivet.BlockSize - past) % trivet.BlockSize
	return b[skip : skip+n]
}

func fillRandom(b []byte) {
	rnd := rand.New(rand.NewPCG(7, 7)) //nolint:gosec // content
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
}

// raw3 returns the blocks per second of one of three files that fio writes at the same time, at random,
// 32 blocks outstanding each, around the page cache.
func raw3(ctx context.Context, dir string, seconds int) (float64, error) {
	cmd := exec.CommandContext(ctx, "fio", "--name=raw3", "--directory="+dir, "--numjobs=3", "--size=512m",
		"--rw=randwrite", "--bs=4k", "--iodepth=32", "--ioengine=libaio", "--direct=1", "--time_based",
		"--runtime="+strconv.Itoa(seconds), "--group_reporting", "--output-format=json")
	b, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return 0, fmt.Errorf("fio: %w: %s", err, exit.Stderr)
		}
		return 0, fmt.Errorf("fio (is it installed?): %w", err)
	}
	var report struct {
		Jobs []struct {
			Write struct {
				IOPS float64 `json:"iops"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(b, &report); err != nil {
		return 0, fmt.Errorf("fio's report: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Write.IOPS == 0 {
		return 0, fmt.Errorf("fio's report has %d jobs, want one with writes", len(report.Jobs))
	}
	return report.Jobs[0].Write.IOPS / 3, nil
}

// copyFile copies a file around the page cache, in pieces of 1 MiB, and returns the MiB per second.
func copyFile(ctx context.Context, dir string, mib int) (float64, error) {
	from, to := filepath.Join(dir, "copy-from"), filepath.Join(dir, "copy-to")
	dd := func(args ...string) error {
		args = append(args, "bs=1M", "count="+strconv.Itoa(mib), "conv=fsync", "status=none")
		b, err := exec.CommandContext(ctx, "dd", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("dd: %w: %s", err, b)
		}
		return nil
	}
	if err := dd("if=/dev/urandom", "of="+from); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := dd("if="+from, "of="+to, "iflag=direct", "oflag=direct"); err != nil {
		return 0, err
	}
	return float64(mib) / time.Since(began).Seconds(), errors.Join(os.Remove(from), os.Remove(to))
}
