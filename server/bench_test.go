package server_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
)

// BenchmarkWriteFlush4K compares one 4 KiB write and flush on a volume with three replicas, through
// NBD and TLS, with the least that three copies on this disk can cost: a write and fsync of three
// files at once. Only the ratio of the two means anything on another machine.
func BenchmarkWriteFlush4K(b *testing.B) {
	block := pattern('b')
	b.Run("volume", func(b *testing.B) {
		c := testutil.StartCluster(b, 3, nil)
		_, err := c.Admin(0).CreateVolume(b.Context(), &api.CreateVolumeRequest{Name: "bench", SizeBytes: 256 << 20})
		require.NoError(b, err)
		ctx, cancel := context.WithCancel(b.Context())
		defer cancel()
		socket := c.Path("bench.nbd")
		stream, err := c.Admin(0).ServeVolume(ctx, &api.ServeVolumeRequest{Name: "bench", Socket: socket})
		require.NoError(b, err)
		_, err = stream.Recv()
		require.NoError(b, err)
		client, err := dialNBD(b.Context(), socket, "bench")
		require.NoError(b, err)
		defer client.close() //nolint:errcheck // the benchmark is over
		b.SetBytes(trivet.BlockSize)
		for i := 0; b.Loop(); i++ {
			require.NoError(b, client.write(block, int64(i%65536)*trivet.BlockSize))
			require.NoError(b, client.flush())
		}
	})
	b.Run("three files", func(b *testing.B) {
		dir := b.TempDir()
		var files []*os.File
		for _, name := range []string{"a", "b", "c"} {
			f, err := os.Create(filepath.Join(dir, name))
			require.NoError(b, err)
			defer f.Close()
			require.NoError(b, f.Truncate(256<<20))
			files = append(files, f)
		}
		b.SetBytes(trivet.BlockSize)
		for i := 0; b.Loop(); i++ {
			var wg sync.WaitGroup
			for _, f := range files {
				wg.Go(func() {
					if _, err := f.WriteAt(block, int64(i%65536)*trivet.BlockSize); err != nil {
						b.Error(err)
					}
					if err := f.Sync(); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
		}
	})
}
