package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Annotations of the entry in index.json. containerd names the image by the first and takes it as it is, so it must be
// the full reference, as the kubelet writes it; podman prefers it too. skopeo finds an image by the second.
const (
	annotationContainerdName = "io.containerd.image.name"
	annotationRefName        = "org.opencontainers.image.ref.name"
	annotationCreated        = "org.opencontainers.image.created"
)

// image is an image with its name, ready to be written.
type image struct {
	name     string // the full reference, such as docker.io/library/trivet:latest
	tag      string
	manifest v1.Image
	platform v1.Platform
}

// fullName completes a reference as container engines do: trivet is docker.io/library/trivet:latest. A digest is
// refused, since the digest of an image is known only once it is made.
func fullName(ref string) (full, tag string, err error) {
	t, err := name.NewTag(ref)
	if err != nil {
		return "", "", fmt.Errorf("%w: -ref %q: %v", errUsage, ref, err)
	}
	registry := t.RegistryStr()
	if registry == name.DefaultRegistry { // the library's name of it is not the one that engines use
		registry = "docker.io"
	}
	return registry + "/" + t.RepositoryStr() + ":" + t.TagStr(), t.TagStr(), nil
}

// build makes the image of a spec in memory, its compressed layers included.
func build(spec imageSpec) (image, error) {
	full, tag, err := fullName(spec.ref)
	if err != nil {
		return image{}, err
	}
	labels := maps.Clone(spec.labels)
	labels[annotationCreated] = spec.created.Format(time.RFC3339)
	config := &v1.ConfigFile{
		Architecture: spec.arch,
		OS:           "linux",
		Created:      v1.Time{Time: spec.created},
		Config: v1.Config{
			Entrypoint: spec.entrypoint, Env: spec.env, User: spec.user, WorkingDir: "/", Labels: labels,
		},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{}},
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return image{}, fmt.Errorf("configuration of %s: %w", full, err)
	}
	for _, dir := range spec.layers {
		layer, err := newLayer(dir)
		if err != nil {
			return image{}, err
		}
		history := v1.History{Created: config.Created, CreatedBy: "layer " + filepath.Base(dir)}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: history}); err != nil {
			return image{}, fmt.Errorf("append layer %s: %w", dir, err)
		}
	}
	annotated, ok := mutate.Annotations(img, labels).(v1.Image)
	if !ok {
		return image{}, errors.New("annotate: the library returned something else than an image")
	}
	return image{
		name: full, tag: tag, manifest: annotated, platform: v1.Platform{OS: "linux", Architecture: spec.arch},
	}, nil
}

// index returns the image layout's index.json, with the image as its one entry.
func (i image) index() ([]byte, error) {
	digest, err := i.manifest.Digest()
	if err != nil {
		return nil, err
	}
	sizeBytes, err := i.manifest.Size()
	if err != nil {
		return nil, err
	}
	return json.Marshal(v1.IndexManifest{
		SchemaVersion: 2,
		MediaType:     types.OCIImageIndex,
		Manifests: []v1.Descriptor{{
			MediaType:   types.OCIManifestSchema1,
			Size:        sizeBytes,
			Digest:      digest,
			Annotations: map[string]string{annotationContainerdName: i.name, annotationRefName: i.tag},
			Platform:    &i.platform,
		}},
	})
}

// writeFile writes the archive to path. A path that exists is replaced when the new one is complete, not before.
func writeFile(path string, img image) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already when all went well
	err = errors.Join(writeArchive(f, img), f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// writeArchive writes the tar of the image layout:
//
//	oci-layout                  the version of the layout
//	index.json                  the names, and the digest of the manifest
//	blobs/sha256/DIGEST         the manifest, the configuration, the layers
func writeArchive(w io.Writer, img image) error {
	a := archive{tar: tar.NewWriter(w), written: map[string]bool{}}
	a.add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), nil)
	raw, err := img.index()
	a.add("index.json", raw, err)
	digest, err := img.manifest.Digest()
	a.join(err)
	raw, err = img.manifest.RawManifest()
	a.add(blobName(digest), raw, err)
	digest, err = img.manifest.ConfigName()
	a.join(err)
	raw, err = img.manifest.RawConfigFile()
	a.add(blobName(digest), raw, err)
	layers, err := img.manifest.Layers()
	a.join(err)
	for _, layer := range layers {
		a.addLayer(layer)
	}
	if a.err != nil {
		return a.err
	}
	return a.tar.Close()
}

func blobName(h v1.Hash) string { return "blobs/" + strings.Replace(h.String(), ":", "/", 1) }

// archive appends to a tar until the first error, which it keeps in err.
type archive struct {
	tar     *tar.Writer
	written map[string]bool // two equal layers are one blob
	err     error
}

func (a *archive) join(err error) {
	if a.err == nil {
		a.err = err
	}
}

// add appends a file with the contents that were got, or notes the error that was got instead.
func (a *archive) add(name string, contents []byte, err error) {
	a.join(err)
	a.copy(name, int64(len(contents)), bytes.NewReader(contents))
}

func (a *archive) addLayer(layer v1.Layer) {
	digest, err := layer.Digest()
	a.join(err)
	size, err := layer.Size()
	a.join(err)
	if a.err != nil || a.written[blobName(digest)] {
		return
	}
	r, err := layer.Compressed()
	if err != nil {
		a.join(fmt.Errorf("layer %s: %w", digest, err))
		return
	}
	defer r.Close()
	a.copy(blobName(digest), size, r)
}

func (a *archive) copy(name string, sizeBytes int64, r io.Reader) {
	if a.err != nil {
		return
	}
	a.written[name] = true
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: sizeBytes, Mode: 0o644, ModTime: longAgo}
	a.join(a.tar.WriteHeader(header))
	_, err := io.Copy(a.tar, r)
	a.join(err)
}
