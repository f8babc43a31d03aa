package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// The names of the images that every lab has, besides that of pause.
const (
	BusyboxImage     = "docker.io/library/busybox:latest"
	ProvisionerImage = "registry.k8s.io/sig-storage/csi-provisioner:v6.4.0"
	AttacherImage    = "registry.k8s.io/sig-storage/csi-attacher:v4.13.0"
	ResizerImage     = "registry.k8s.io/sig-storage/csi-resizer:v2.3.0"
	SnapshotterImage = "registry.k8s.io/sig-storage/csi-snapshotter:v8.7.0"

	SnapshotControllerImage = "registry.k8s.io/sig-storage/snapshot-controller:v8.7.0"
)

// searchPath is the PATH of the lab's images.
const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// writeBaseImages writes the archives of the images that every lab has and returns their paths.
func (c *Cluster) writeBaseImages(ctx context.Context) ([]string, error) {
	busybox, err := busyboxImage(ctx, c.cache.deb("bin/busybox"))
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(c.dir, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder of images: %w", err)
	}
	var paths []string
	for _, img := range []Image{
		oneProgram(pauseImage, c.cache.program("pause")),
		busybox,
		oneProgram(ProvisionerImage, c.cache.program("csi-provisioner")),
		oneProgram(AttacherImage, c.cache.program("csi-attacher")),
		oneProgram(ResizerImage, c.cache.program("csi-resizer")),
		oneProgram(SnapshotterImage, c.cache.program("csi-snapshotter")),
		oneProgram(SnapshotControllerImage, c.cache.program("snapshot-controller")),
	} {
		base, _, _ := strings.Cut(filepath.Base(img.Name), ":")
		path := filepath.Join(dir, base+".tar")
		if err := WriteImage(path, img); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// oneProgram is an image of a static program and nothing else, as the upstream images of the sidecars.
func oneProgram(name, program string) Image {
	at := filepath.Base(program)
	return Image{
		Name:       name,
		Files:      []ImageFile{{Path: at, Mode: 0o755, Source: program}, tmpFolder},
		Entrypoint: []string{"/" + at},
		Env:        []string{searchPath},
	}
}

var tmpFolder = ImageFile{Path: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777}

// busyboxImage has a link for every applet of the static busybox.
func busyboxImage(ctx context.Context, program string) (Image, error) {
	out, err := output(ctx, program, "--list-full")
	if err != nil {
		return Image{}, fmt.Errorf("list applets of busybox: %w", err)
	}
	img := Image{
		Name: BusyboxImage,
		Files: []ImageFile{
			{Path: "bin/busybox", Mode: 0o755, Source: program},
			{Path: "etc/passwd", Mode: 0o644, Text: "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"},
			{Path: "etc/group", Mode: 0o644, Text: "root:x:0:\nnogroup:x:65534:\n"},
			{Path: "root", Mode: fs.ModeDir | 0o700},
			tmpFolder,
		},
		Cmd: []string{"sh"},
		Env: []string{searchPath},
	}
	for applet := range strings.FieldsSeq(out) {
		if applet != "bin/busybox" && applet != "linuxrc" {
			img.Files = append(img.Files, ImageFile{Path: applet, Link: "/bin/busybox"})
		}
	}
	if len(img.Files) < 100 {
		return Image{}, errors.New("list applets of busybox: hardly any; is it Debian's busybox-static?")
	}
	return img, nil
}
