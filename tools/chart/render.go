package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"sigs.k8s.io/yaml"
)

// kubeVersion is what the chart is told of the cluster that it is rendered for.
const kubeVersion = "v1.37.2"

// apis are what it is told that the cluster has besides.
var apis = []string{"storage.k8s.io/v1", "snapshot.storage.k8s.io/v1"}

// options says how a chart is rendered.
type options struct {
	chart     string         // folder
	values    map[string]any // over those of the chart
	namespace string
	service   string // .Release.Service; "manifests" leaves out the labels by which Helm knows what is its own
}

// render returns what each template of the chart gives, by the name of its file; those that give nothing are left
// out. The values are checked against values.schema.json.
func render(o options) (map[string]string, error) {
	chart, err := loader.LoadDir(o.chart)
	if err != nil {
		return nil, fmt.Errorf("load chart %s: %w", o.chart, err)
	}
	capabilities := chartutil.DefaultCapabilities.Copy()
	version, err := chartutil.ParseKubeVersion(kubeVersion)
	if err != nil {
		return nil, err
	}
	capabilities.KubeVersion = *version
	capabilities.APIVersions = append(slices.Clone(capabilities.APIVersions), apis...)
	release := chartutil.ReleaseOptions{Name: "trivet", Namespace: o.namespace, Revision: 1, IsInstall: true}
	values, err := chartutil.ToRenderValues(chart, o.values, release, capabilities)
	if err != nil {
		return nil, fmt.Errorf("values: %w", err)
	}
	if o.service != "" {
		about, ok := values["Release"].(map[string]any)
		if !ok {
			return nil, fmt.Errorf("values: Release is %T", values["Release"])
		}
		about["Service"] = o.service
	}
	rendered, err := engine.Render(chart, values)
	if err != nil {
		return nil, fmt.Errorf("render: %w", err)
	}
	out := make(map[string]string)
	for name, text := range rendered {
		if text = tidy(text); text != "" && path.Ext(name) == ".yaml" {
			out[path.Base(name)] = text
		}
	}
	return out, nil
}

// tidy removes what templates leave behind: blank lines, blanks at the ends of lines, a document mark at the top.
func tidy(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\n")
		if line == "" || line == "---" && (len(lines) == 0 || lines[len(lines)-1] == "---") {
			continue
		}
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}

// readValues reads a file of values.
func readValues(file string) (map[string]any, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	values := map[string]any{}
	if err := yaml.UnmarshalStrict(text, &values); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return values, nil
}

// documents returns the YAML documents of a rendered file.
func documents(text string) []string {
	var out []string
	for _, doc := range strings.Split("\n"+text, "\n---\n") {
		if strings.TrimSpace(doc) != "" {
			out = append(out, doc)
		}
	}
	return out
}

// images returns the images that rendered files name, sorted.
func images(files map[string]string) []string {
	var all []string
	for _, text := range files {
		for line := range strings.Lines(text) {
			if image, ok := strings.CutPrefix(strings.TrimPrefix(strings.TrimSpace(line), "- "), "image: "); ok {
				all = append(all, image)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// inDeploy is a path below the folder deploy.
func inDeploy(deploy string, names ...string) string {
	return filepath.Join(append([]string{deploy}, names...)...)
}
