package testutil_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What race.sh does with what `go test` prints, by a go of our own that says one thing at each call.
func TestRaceScript(t *testing.T) {
	// Not parallel: a child between fork and exec may hold the script that another writes, which then cannot be run.
	const crash = "ThreadSanitizer: CHECK failed: tsan_rtl.cpp:346\nFAIL\tmod/b\t3.1s\nok  \tmod/c\t1s\nFAIL\n"
	// The symbols of the program are those of symbols below.
	const signal = "SIGSEGV: segmentation violation\nPC=%s m=0 sigcode=1\nFAIL\tmod/b\t3.1s\nFAIL\n"
	const symbols = "         U free@GLIBC_2.2.5\n  4c98e0 T time.goFunc\n" +
		" 1290d40 t _ZN11__sanitizer14StackDepotBaseE\n 1290f00 t ZSTD_compress\n 1d64e00 b theDepot\n"
	inDetector, inLibrary := fmt.Sprintf(signal, "0x1290db0"), fmt.Sprintf(signal, "0x1290f00")
	const good = "ok  \tmod/b\t1s\n"
	for name, tt := range map[string]struct {
		says   []string // an empty end of a call is success
		calls  string
		passes bool
	}{
		"all is well":            {[]string{good}, "./...\n", true},
		"a crash, then well":     {[]string{"ok  \tmod/a\t1s\n" + crash, good}, "./...\nmod/b\n", true},
		"a crash each time":      {[]string{crash, crash, crash}, "./...\nmod/b\nmod/b\n", false},
		"a test failed":          {[]string{"--- FAIL: TestX (0.1s)\nFAIL\nFAIL\tmod/b\t1s\nFAIL\n"}, "./...\n", false},
		"a subtest failed":       {[]string{"    --- FAIL: TestX/y (0.1s)\nFAIL\tmod/b\t1s\n"}, "./...\n", false},
		"a race, then a crash":   {[]string{"WARNING: DATA RACE\n" + crash}, "./...\n", false},
		"a test, then a crash":   {[]string{"--- FAIL: TestX (0.1s)\n" + crash}, "./...\n", false},
		"another package failed": {[]string{"FAIL\tmod/a [build failed]\n" + crash}, "./...\n", false},
		"a crash, then a race":   {[]string{crash, "WARNING: DATA RACE\nFAIL\tmod/b\t1s\n"}, "./...\nmod/b\n", false},
		"a signal, then well":    {[]string{inDetector, good}, "./...\nmod/b\n", true},
		"a signal in a library":  {[]string{inLibrary}, "./...\n", false},
		"a signal elsewhere":     {[]string{fmt.Sprintf(signal, "0x7f46c9401df8")}, "./...\n", false},
		"a signal after a test":  {[]string{"--- FAIL: TestX (0.1s)\n" + inDetector}, "./...\n", false},
		"two kinds of crash":     {[]string{crash, inDetector, good}, "./...\nmod/b\nmod/b\n", true},
		"nothing that explains":  {[]string{"FAIL\n"}, "./...\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for i, said := range tt.says {
				require.NoError(t, os.WriteFile(filepath.Join(dir, "said"+string(rune('1'+i))), []byte(said), 0o600))
			}
			require.NoError(t, os.WriteFile(filepath.Join(dir, "symbols"), []byte(symbols), 0o600))
			fake := filepath.Join(dir, "go")
			require.NoError(t, os.WriteFile(fake, []byte(`#!/bin/bash
cd "$(dirname "$0")"
case "$*" in
*" -c "*) exit ;;
"tool nm"*) exec cat symbols ;;
esac
echo "${@:6}" >>calls
said=said$(wc -l <calls)
cat "$said"
! grep -q ^FAIL "$said"
`), 0o700))
			cmd := exec.CommandContext(t.Context(), "./race.sh", "./...")
			cmd.Env = append(os.Environ(), "GO="+fake)
			out, err := cmd.CombinedOutput()
			assert.Equal(t, tt.passes, err == nil, "%v\n%s", err, out)
			calls, err := os.ReadFile(filepath.Join(dir, "calls"))
			require.NoError(t, err)
			assert.Equal(t, tt.calls, string(calls), "%s", out)
		})
	}
}
