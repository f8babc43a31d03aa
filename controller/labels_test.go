package controller_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

type set = map[string]string

func TestLabelSyntax(t *testing.T) {
	t.Parallel()
	require.NoError(t, controller.CheckLabels(set{"tier": "gold", "example.com/team": "", "A.b_c-1": "x_Y.z"}))
	for key, value := range map[string]string{
		"": "x", "a b": "x", "-a": "x", "a/b/c": "x", "tier": "two words", "team": strings.Repeat("x", 64),
		strings.Repeat("k", 64): "x", "umlaut": "grün",
	} {
		err := controller.CheckLabels(set{key: value})
		require.ErrorIs(t, err, trivet.ErrInvalid, key)
		require.ErrorContains(t, err, key)
	}
}

func TestSelector(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][3]bool{ // of no labels, tier=gold, tier=silver and old
		"":                            {true, true, true},
		"tier=gold":                   {false, true, false},
		"tier in (gold,silver), !old": {false, true, false},
		"tier!=gold":                  {true, false, true},
		"old":                         {false, false, true},
	} {
		matches, err := controller.ParseSelector(text)
		require.NoError(t, err, text)
		got := [3]bool{matches(nil), matches(set{"tier": "gold"}), matches(set{"tier": "silver", "old": ""})}
		assert.Equal(t, want, got, text)
	}
	for _, text := range []string{"tier=gold=old", "tier in gold", "a b", "=gold"} {
		_, err := controller.ParseSelector(text)
		require.ErrorIs(t, err, trivet.ErrInvalid, text)
		require.ErrorContains(t, err, text)
	}
}

func TestSetLabels(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v, err := b.CreateVolume(soon(t), controller.CreateRequest{
			Name: "v", RequiredBytes: 1 << 30, Labels: set{"tier": "gold", "old": "1"},
		})
		require.NoError(t, err)
		require.Equal(t, set{"tier": "gold", "old": "1"}, v.Labels)
		got, err := b.SetLabels(soon(t), v.ID, set{"tier": "silver", "example.com/team": "shop"}, []string{"old", "none"})
		require.NoError(t, err)
		want := set{"tier": "silver", "example.com/team": "shop"}
		require.Equal(t, want, got.Labels)
		again, err := b.SetLabels(soon(t), v.ID, set{"tier": "silver"}, []string{"old"})
		require.NoError(t, err)
		require.Equal(t, got, again, "no effect, not even a new revision")
		same, err := b.CreateVolume(soon(t), controller.CreateRequest{
			Name: "v", RequiredBytes: 1 << 30, Labels: set{"tier": "gold"},
		})
		require.NoError(t, err)
		require.Equal(t, want, same.Labels, "it keeps its own")

		for says, call := range map[string]func() error{
			`"a b"`:     func() error { _, err := b.SetLabels(soon(t), v.ID, set{"a b": "1"}, nil); return err },
			`"-x"`:      func() error { _, err := b.SetLabels(soon(t), v.ID, nil, []string{"-x"}); return err },
			`"a"`:       func() error { _, err := b.SetLabels(soon(t), v.ID, set{"a": "1"}, []string{"a"}); return err },
			"no labels": func() error { _, err := b.SetLabels(soon(t), v.ID, nil, nil); return err },
			`"c d"`: func() error {
				_, err := b.CreateVolume(soon(t), controller.CreateRequest{
					Name: "w", RequiredBytes: 1 << 30, Labels: set{"c d": "1"},
				})
				return err
			},
		} {
			err := call()
			require.ErrorIs(t, err, trivet.ErrInvalid, says)
			require.ErrorContains(t, err, says)
		}
		_, err = b.SetLabels(soon(t), trivet.NewVolumeID(), set{"a": "1"}, nil)
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}

// TestSetLabelsAgainstOthers: two at once both have their way.
func TestSetLabelsAgainstOthers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "v", nil)
		proposed := 0
		b.store.before = func(c meta.Command) bool {
			if c.SetLabels == nil {
				return true
			}
			if proposed++; proposed == 1 {
				_, err := b.SetLabels(soon(t), v.ID, set{"b": "2"}, nil)
				require.NoError(t, err)
			}
			return true
		}
		got, err := b.SetLabels(soon(t), v.ID, set{"a": "1"}, nil)
		require.NoError(t, err)
		require.Equal(t, 3, proposed, "the first is refused, and decided anew on what the other said")
		assert.Equal(t, set{"a": "1", "b": "2"}, got.Labels)
	})
}
