// Package lint holds the rules of the code base that no ready-made linter knows, as tests: which
// package may import which, where third-party libraries may be used, that every package says what
// it is, and how long files and functions may be. It has no code of its own but the walk that its
// tests share.
package lint

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
)

// Module is the import path of the module under test.
const Module = "github.com/trivet-csi/trivet"

// File is one parsed Go source file.
type File struct {
	Path      string // relative to the module's root, with forward slashes
	Dir       string // package folder relative to the root; "." for the root
	Test      bool
	Generated bool
	Lines     int
	AST       *ast.File
	Fset      *token.FileSet
}

// Load parses every Go file of the module rooted at root. Nested modules (folders with their own
// go.mod), testdata and hidden folders are left out.
func Load(root string) ([]File, error) {
	var files []File
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return skipDir(root, path, d.Name())
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		f, err := load(path, filepath.ToSlash(rel))
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load module at %s: %w", root, err)
	}
	return files, nil
}

func skipDir(root, path, name string) error {
	if path == root {
		return nil
	}
	if name == "testdata" || name == "bin" || strings.HasPrefix(name, ".") {
		return filepath.SkipDir
	}
	if nested, err := filepath.Glob(filepath.Join(path, "go.mod")); err != nil || len(nested) > 0 {
		return filepath.SkipDir
	}
	return nil
}

func load(path, rel string) (File, error) {
	fset := token.NewFileSet()
	tree, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
	if err != nil {
		return File{}, err
	}
	return File{
		Path:      rel,
		Dir:       filepath.ToSlash(filepath.Dir(rel)),
		Test:      strings.HasSuffix(rel, "_test.go"),
		Generated: ast.IsGenerated(tree),
		Lines:     fset.File(tree.Pos()).LineCount(),
		AST:       tree,
		Fset:      fset,
	}, nil
}
