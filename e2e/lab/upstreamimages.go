package lab

import (
	"context"
	"os"
	"path/filepath"
)

// The images of Kubernetes v1.37's own tests that specs of storage use, by the names that they ask for.
const (
	upstreamRegistry = "registry.k8s.io/e2e-test-images/"

	upstreamAgnhost = upstreamRegistry + "agnhost:2.66.1"
	upstreamBusybox = upstreamRegistry + "busybox:1.37.0-2"
	upstreamNginx   = upstreamRegistry + "nginx:1.27.0-2"
	upstreamGlibc   = upstreamRegistry + "glibc-dns-testing:2.1.1"
	upstreamHello   = "registry.k8s.io/sig-storage/hello-populator:v1.0.1"
	upstreamPause   = "registry.k8s.io/pause:3.10.2"
)

// coreutils are the programs of an image with glibc and without busybox, whose dd has no oflag=nocache.
var coreutils = []string{
	"sh", "bash", "base64", "blockdev", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "du", "echo", "env", "false", "grep", "head",
	"id", "ln", "ls", "md5sum", "mkdir", "mktemp", "mv", "printf", "pwd", "readlink", "rm", "sed", "sha256sum", "sleep",
	"sort", "stat", "sync", "tail", "tee", "test", "touch", "tr", "true", "uname", "wc",
}

// hostTools are what pods that enter a node's namespaces need of util-linux itself: those of busybox lack options.
var hostTools = []string{"nsenter", "losetup", "blockdev", "blkid", "mount", "umount", "dd"}

// LoadUpstreamImages gives every node images of the names that Kubernetes' own tests of storage want. They are made
// here, from busybox, from programs of this machine, from agnhost, which is in the folder of [FindUpstream], and from the
// program of [FindPopulator]; so they hold what specs of storage use, and not all that the real ones hold: no nginx serves anything.
func (c *Cluster) LoadUpstreamImages(ctx context.Context, programs, populator string) error {
	busybox := c.cache.deb("bin/busybox")
	var images []Image
	for _, name := range []string{upstreamBusybox, upstreamNginx} {
		img, err := busyboxImage(ctx, busybox)
		if err != nil {
			return err
		}
		img.Name = name
		images = append(images, img)
	}
	agnhost, err := c.programsImage(ctx, upstreamAgnhost, hostTools)
	if err != nil {
		return err
	}
	agnhost.Files = append(agnhost.Files,
		ImageFile{Path: "agnhost", Mode: 0o755, Source: filepath.Join(programs, "agnhost")},
		ImageFile{Path: "agnhost-2", Link: "agnhost"},
	)
	agnhost.Entrypoint, agnhost.Cmd = []string{"/agnhost"}, []string{"pause"}
	files, err := hostFiles(ctx, coreutils)
	if err != nil {
		return err
	}
	glibc := Image{
		Name:  upstreamGlibc,
		Files: append(files, tmpFolder, ImageFile{Path: "usr/bin", Link: "../bin"}),
		Cmd:   []string{"sh"},
		Env:   []string{searchPath},
	}
	images = append(images, agnhost, glibc, oneProgram(upstreamPause, c.cache.program("pause")),
		oneProgram(upstreamHello, populator))
	for _, img := range images {
		archive := filepath.Join(c.dir, "images", "upstream.tar")
		if err := WriteImage(archive, img); err != nil {
			return err
		}
		if err := c.LoadImage(ctx, archive); err != nil {
			return err
		}
		if err := os.Remove(archive); err != nil {
			return err
		}
	}
	return nil
}
