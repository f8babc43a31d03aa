package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// The table of values in docs/helm.md stands between these lines.
const (
	tableBegin = "<!-- values: made by `make manifests` from deploy/chart/values.yaml -->\n"
	tableEnd   = "<!-- end of values -->\n"
)

// whole are maps that are one value: Kubernetes defines what is in them, or the cluster's owner does.
var whole = []string{"resources", "certificateResources", "nodeSelector", "updateStrategy"}

// knob is a value with its default and what values.yaml says of it.
type knob struct{ path, def, comment string }

// knobs returns the values of a values.yaml, in its order.
func knobs(text []byte) ([]knob, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	var out []knob
	if err := walk(doc.Content[0], "", "", &out); err != nil {
		return nil, err
	}
	return out, nil
}

// walk adds the values below a map. A map's own comment is of those of its values that have none.
func walk(m *yaml.Node, prefix, inherited string, out *[]knob) error {
	for i := 0; i+1 < len(m.Content); i += 2 {
		key, value := m.Content[i], m.Content[i+1]
		comment := plain(key.HeadComment)
		if comment == "" {
			comment = inherited
		}
		path := prefix + key.Value
		if value.Kind == yaml.MappingNode && len(value.Content) > 0 && !slices.Contains(whole, key.Value) {
			if err := walk(value, path+".", comment, out); err != nil {
				return err
			}
			continue
		}
		def, err := inline(value)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		*out = append(*out, knob{path, def, comment})
	}
	return nil
}

// plain returns a comment as one line, without what is commented out.
func plain(comment string) string {
	var words []string
	for line := range strings.Lines(comment) {
		line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#"))
		if strings.HasPrefix(line, "- ") || strings.HasSuffix(line, "Classes:") || strings.HasPrefix(line, "parameters:") {
			continue
		}
		words = append(words, line)
	}
	return strings.TrimSpace(strings.Join(words, " "))
}

// inline returns a value as YAML on one line.
func inline(n *yaml.Node) (string, error) {
	n.Style = yaml.FlowStyle
	flow(n)
	b, err := yaml.Marshal(n)
	return strings.TrimSpace(string(b)), err
}

func flow(n *yaml.Node) {
	n.HeadComment, n.LineComment, n.FootComment = "", "", ""
	for _, c := range n.Content {
		if c.Kind != yaml.ScalarNode {
			c.Style = yaml.FlowStyle
		}
		flow(c)
	}
}

// withTable returns a document with the table of the values in it.
func withTable(document string, all []knob) (string, error) {
	before, rest, ok := strings.Cut(document, tableBegin)
	_, after, okEnd := strings.Cut(rest, tableEnd)
	if !ok || !okEnd {
		return "", fmt.Errorf("the document has no lines %q and %q", tableBegin, tableEnd)
	}
	var b strings.Builder
	b.WriteString("| value | default | meaning |\n| --- | --- | --- |\n")
	for _, k := range all {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", k.path, k.def, strings.ReplaceAll(k.comment, "|", "\\|"))
	}
	return before + tableBegin + b.String() + tableEnd + after, nil
}

// document returns docs/helm.md as it should be.
func document(deploy string) (string, error) {
	text, err := os.ReadFile(inDeploy(deploy, "chart", "values.yaml"))
	if err != nil {
		return "", err
	}
	all, err := knobs(text)
	if err != nil {
		return "", fmt.Errorf("values.yaml: %w", err)
	}
	old, err := os.ReadFile(inDeploy(deploy, docFile))
	if err != nil {
		return "", err
	}
	return withTable(string(old), all)
}
