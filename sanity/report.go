package sanity

import (
	"regexp"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
)

// passedMin is the number of specs of csi-test v5.6.0, of 103, that try what this version can do.
const passedMin = 101

// later matches the reason for which a spec may be skipped: an attach limit, which no server sets by default (see
// README.md).
var later = regexp.MustCompile(`^(testnodevolumeattachlimit not enabled|No MaxVolumesPerNode)$`)

// checkReport fails the suite when a spec was skipped that should not have been: a capability that
// is no longer advertised would otherwise turn failures into skips.
func checkReport(r ginkgo.Report) {
	if len(r.SuiteConfig.FocusStrings)+len(r.SuiteConfig.SkipStrings) > 0 {
		return // a part was asked for
	}
	specs := r.SpecReports.WithLeafNodeType(types.NodeTypeIt)
	for _, s := range specs.WithState(types.SpecStateSkipped) {
		gomega.Expect(s.Failure.Message).To(gomega.MatchRegexp(later.String()), "skipped: "+s.FullText())
	}
	gomega.Expect(specs.CountWithState(types.SpecStatePassed)).To(gomega.BeNumerically(">=", passedMin))
}
