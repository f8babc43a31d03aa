// Package block runs csi-sanity with raw block volumes.
package block

import (
	"testing"

	"github.com/trivet-csi/trivet/sanity"
)

func TestBlock(t *testing.T) { sanity.Run(t, sanity.Block) }
