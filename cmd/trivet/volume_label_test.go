package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParseLabels(t *testing.T) {
	t.Parallel()
	set, remove, err := parseLabels([]string{"tier=gold", "old-", "a=", "b=c-", "team-x-"})
	require.NoError(t, err)
	assert.Equal(t, map[string]string{"tier": "gold", "a": "", "b": "c-"}, set)
	assert.Equal(t, []string{"old", "team-x"}, remove)
	for _, words := range [][]string{{"tier"}, {"=x"}, {"-"}, {"a=1", "a=2"}, {"a-", "a-"}, {"a=1", "a-"}} {
		_, _, err := parseLabels(words)
		require.ErrorAs(t, err, new(usageError), "%v", words)
	}
}
