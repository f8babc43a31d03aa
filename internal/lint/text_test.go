package lint_test

import (
	"go/ast"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

const (
	fileLinesMax     = 500
	testFileLinesMax = 1000
	funcLinesMax     = 100
	columnsMax       = 120
)

func TestEveryPackageHasAComment(t *testing.T) {
	said := map[string]string{}
	for _, f := range load(t) {
		if f.Test {
			continue
		}
		if _, seen := said[f.Dir]; !seen {
			said[f.Dir] = ""
		}
		if f.AST.Doc != nil && len(f.AST.Doc.Text()) > len(said[f.Dir]) {
			said[f.Dir] = f.AST.Doc.Text()
		}
	}
	for dir, text := range said {
		if len(strings.Fields(text)) < 10 {
			t.Errorf("package %s: its comment must say what it is and guarantees; it says %q", dir, text)
		}
	}
}

func TestColumns(t *testing.T) {
	for _, f := range load(t) {
		if f.Generated {
			continue
		}
		text, err := os.ReadFile(filepath.Join("../..", f.Path))
		require.NoError(t, err)
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			if columns := utf8.RuneCountInString(strings.TrimRight(line, "\n")); columns > columnsMax {
				t.Errorf("%s:%d has %d columns, at most %d", f.Path, n, columns, columnsMax)
			}
		}
	}
}

func TestSizes(t *testing.T) {
	for _, f := range load(t) {
		if f.Generated {
			continue
		}
		limit := fileLinesMax
		if f.Test {
			limit = testFileLinesMax
		}
		if f.Lines > limit+1 { // LineCount counts the empty line after the last newline
			t.Errorf("%s has %d lines, at most %d: divide it", f.Path, f.Lines, limit)
		}
		ast.Inspect(f.AST, func(n ast.Node) bool {
			fn, ok := n.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				return true
			}
			lines := f.Fset.Position(fn.End()).Line - f.Fset.Position(fn.Pos()).Line + 1
			if lines > funcLinesMax {
				t.Errorf("%s: function %s has %d lines, at most %d", f.Path, fn.Name.Name, lines, funcLinesMax)
			}
			return true
		})
	}
}
