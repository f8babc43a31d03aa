// Command chart makes the plain manifests in deploy from the Helm chart there, by the engine of Helm as a library.
//
//	chart -deploy DIR          write them: *.yaml, full/trivet.yaml, images.txt, chart.sum, the table in ../docs/helm.md
//	chart -deploy DIR -check   fail if they are not what the chart gives
//	chart -deploy DIR -lint    fail if Helm's linter finds anything
//
// It is a module of its own, because Helm brings more dependencies than Trivet has.
package main

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
)

// Namespace is that of the plain manifests.
const manifestsNamespace = "trivet-system"

// header stands on top of each generated file.
const header = "# Made by `make manifests` from chart/ and values/: change those.\n"

// sumFile holds a digest of each file that goes in or comes out, so that a test without Helm can tell that they
// still belong together (deploy/deploy_test.go).
const sumFile = "chart.sum"

// docFile is the document with the table of values, seen from deploy.
const docFile = "../docs/helm.md"

func main() {
	deploy := flag.String("deploy", "deploy", "folder with chart/ and values/")
	check := flag.Bool("check", false, "change nothing, fail if a file would change")
	lints := flag.Bool("lint", false, "run Helm's linter instead")
	flag.Parse()
	if err := run(*deploy, *check, *lints); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(deploy string, check, lints bool) error {
	if lints {
		return lintAll(deploy)
	}
	files, err := generate(deploy)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path := inDeploy(deploy, name)
		if check {
			errs = append(errs, compare(path, files[name]))
			continue
		}
		if err := os.WriteFile(path, []byte(files[name]), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

func compare(path, want string) error {
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if string(got) != want {
		return fmt.Errorf("%s is not what the chart gives: run `make manifests`", path)
	}
	return nil
}

// generate returns every generated file, by its path below deploy.
func generate(deploy string) (map[string]string, error) {
	out := map[string]string{}
	base, err := manifests(deploy, "manifests.yaml")
	if err != nil {
		return nil, err
	}
	for name, text := range base {
		out[name] = header + text
	}
	full, err := manifests(deploy, "full.yaml")
	if err != nil {
		return nil, err
	}
	out[filepath.Join("full", "trivet.yaml")] = header + join(full)
	everything, err := manifests(deploy, "everything.yaml")
	if err != nil {
		return nil, err
	}
	out["images.txt"] = strings.Join(images(everything), "\n") + "\n"
	sums, err := sum(deploy, out)
	if err != nil {
		return nil, err
	}
	out[sumFile] = sums
	out[docFile], err = document(deploy) // not in the sums: most of it is written by hand
	return out, err
}

// manifests renders the chart with a file of values/.
func manifests(deploy, values string) (map[string]string, error) {
	v, err := readValues(inDeploy(deploy, "values", values))
	if err != nil {
		return nil, err
	}
	files, err := render(options{
		chart: inDeploy(deploy, "chart"), values: v, namespace: manifestsNamespace, service: "manifests",
	})
	if err != nil {
		return nil, fmt.Errorf("with %s: %w", values, err)
	}
	return files, nil
}

// join puts files into one, the namespace first, which the others need.
func join(files map[string]string) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if name == "namespace.yaml" {
			all = append([]string{files[name]}, all...)
		} else {
			all = append(all, files[name])
		}
	}
	return strings.Join(all, "---\n")
}

// sum returns the digests of what goes in and what comes out, as sha256sum prints them.
func sum(deploy string, made map[string]string) (string, error) {
	digests := map[string]string{}
	for name, text := range made {
		digests[filepath.ToSlash(name)] = fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
	}
	for _, folder := range []string{"chart", "values"} {
		err := filepath.WalkDir(inDeploy(deploy, folder), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			name, err := filepath.Rel(deploy, path)
			digests[filepath.ToSlash(name)] = fmt.Sprintf("%x", sha256.Sum256(text))
			return err
		})
		if err != nil {
			return "", err
		}
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(digests)) {
		fmt.Fprintf(&b, "%s  %s\n", digests[name], name)
	}
	return b.String(), nil
}

// lintAll runs Helm's linter on the chart with its own values and with each file of values/.
func lintAll(deploy string) error {
	files, err := filepath.Glob(inDeploy(deploy, "values", "*.yaml"))
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range append([]string{""}, files...) {
		values := map[string]any{}
		if file != "" {
			if values, err = readValues(file); err != nil {
				return err
			}
		}
		for _, m := range lint.All(inDeploy(deploy, "chart"), values, manifestsNamespace, true).Messages {
			if m.Severity > support.InfoSev {
				errs = append(errs, fmt.Errorf("lint with values %q: %s", filepath.Base(file), m))
			}
		}
	}
	return errors.Join(errs...)
}
