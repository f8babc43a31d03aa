// Command image writes a container image as an OCI archive: a tar of an OCI image layout (image-spec 1.1), which
// `ctr images import`, `podman load` and `skopeo copy oci-archive:FILE` read. It needs no container engine and no root.
//
//	image -o FILE -ref REF -arch ARCH -layer DIR … [-entrypoint ARG …] [-env K=V …]
//		[-user U] [-label K=V …] [-created SECONDS]
//
// Each -layer is a folder that becomes one layer, the first at the bottom. The same folders and flags give the same
// bytes: entries are sorted, owned by 0:0 and as old as Unix time itself, and only permission and sticky bits are kept.
// Setuid and setgid bits are dropped, because the owner they speak of is. Before it writes, it refuses layers in which
// a program lacks its loader, its interpreter or a library, or is for another machine than -arch.
//
// It exits with 0 only when FILE is there and complete, with 1 on an error and with 2 on wrong usage.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// errUsage is returned for arguments that cannot be meant; what is wrong has been said in the error around it.
var errUsage = errors.New("wrong usage")

func main() {
	if err := run(os.Args[1:], os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintf(os.Stderr, "image: %v\n", err)
		}
		if errors.Is(err, errUsage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// run is the whole program: it parses args, checks the layers and writes the archive. It says on out what it wrote.
func run(args []string, out io.Writer) error {
	spec, path, err := parse(args, out)
	if err != nil {
		return err
	}
	if err := checkPrograms(spec.layers, spec.arch); err != nil {
		return err
	}
	img, err := build(spec)
	if err != nil {
		return err
	}
	if err := writeFile(path, img); err != nil {
		return err
	}
	digest, err := img.manifest.Digest()
	if err != nil {
		return fmt.Errorf("digest of the image: %w", err)
	}
	fmt.Fprintf(out, "image: wrote %s: %s %s\n", path, img.name, digest)
	return nil
}

// imageSpec is what an image is made of.
type imageSpec struct {
	ref        string            // as given
	arch       string            // as Go and OCI name it, such as amd64
	layers     []string          // folders, the lowest first
	entrypoint []string          // may be empty
	env        []string          // K=V
	user       string            // empty is root
	labels     map[string]string // on the configuration and the manifest
	created    time.Time         // UTC
}

// parse reads the flags into a spec and the path of the archive. Errors of usage wrap errUsage.
func parse(args []string, out io.Writer) (imageSpec, string, error) {
	spec := imageSpec{labels: map[string]string{}}
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(out)
	path := flags.String("o", "", "the `file` to write")
	created := flags.Int64("created", 0, "when the image was made, in Unix `seconds`; 0 is 1970")
	flags.StringVar(&spec.ref, "ref", "", "the `name` of the image, such as trivet:latest")
	flags.StringVar(&spec.arch, "arch", "", "the `architecture`, as Go names it, such as amd64")
	flags.StringVar(&spec.user, "user", "", "the `user` that runs the entrypoint; empty is root")
	flags.Func("layer", "a `folder`, one layer of the image (repeat; the lowest first)", appendTo(&spec.layers))
	flags.Func("entrypoint", "one `argument` of the entrypoint (repeat)", appendTo(&spec.entrypoint))
	flags.Func("env", "`K=V` in the environment (repeat)", func(s string) error {
		spec.env = append(spec.env, s)
		return checkPair(s)
	})
	flags.Func("label", "`K=V` as label and annotation (repeat)", func(s string) error {
		key, value, _ := strings.Cut(s, "=")
		spec.labels[key] = value
		return checkPair(s)
	})
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return spec, "", err
		}
		return spec, "", fmt.Errorf("%w: %v", errUsage, err)
	}
	spec.created = time.Unix(*created, 0).UTC()
	switch {
	case flags.NArg() > 0:
		return spec, "", fmt.Errorf("%w: %q is not a flag", errUsage, flags.Arg(0))
	case *path == "":
		return spec, "", fmt.Errorf("%w: -o is missing: the file to write", errUsage)
	case *created < 0:
		return spec, "", fmt.Errorf("%w: -created %d is negative", errUsage, *created)
	case len(spec.layers) == 0:
		return spec, "", fmt.Errorf("%w: -layer is missing: the folders of the image", errUsage)
	}
	return spec, *path, nil
}

func appendTo(list *[]string) func(string) error {
	return func(s string) error {
		*list = append(*list, s)
		return nil
	}
}

func checkPair(s string) error {
	if i := strings.Index(s, "="); i < 1 {
		return errors.New("not of the form K=V")
	}
	return nil
}
