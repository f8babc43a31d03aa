// Package mount runs csi-sanity with volumes that are formatted and mounted.
package mount

import (
	"testing"

	"github.com/trivet-csi/trivet/sanity"
)

func TestMount(t *testing.T) { sanity.Run(t, sanity.Mount) }
