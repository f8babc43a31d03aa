package controller

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The parameters of a StorageClass. Keys are compared without regard to case; these spellings are
// the canonical ones, which meta.Volume.Params holds.
const (
	ParamReplicas      = "replicas"                  // 1, 3 or 5; default 3
	ParamReclaimPolicy = "reclaimPolicy"             // delete (default), retain or recycle
	ParamFSType        = "csi.storage.k8s.io/fstype" // ext4 or xfs; absent = the node's default
	ParamSpread        = "spread"                    // node (default), rack or zone
	ParamReads         = "readConsistency"           // strong (default), session or eventual
	ParamCacheMode     = "cacheMode"                 // writeThrough (default), writeBack or writeAround
	ParamCacheSize     = "cacheSize"                 // bytes, a quantity; default by the mode
	ParamReadAhead     = "readAhead"                 // bytes, a quantity, at most 1Mi (default)
	ParamEviction      = "eviction"                  // lru (default), lfu, fifo or random
	ParamAdaptive      = "adaptive"                  // off (default) or on
	ParamReclaimWipe   = meta.ParamReclaimWipe       // none (default) or zero: wiped before it is deleted
	ParamDataLocality  = "dataLocality"              // none (default) or preferred: a replica follows the attachment
)

// Spread says what two replicas of a volume must not share.
type Spread string

// The spreads. Under each, replicas are on different nodes, in as many zones and then in as many racks as possible.
const (
	SpreadNode Spread = "node" // a node
	SpreadZone Spread = "zone" // a zone; refused when there are fewer zones than replicas
	SpreadRack Spread = "rack" // a rack of a zone; refused when there are fewer racks than replicas
)

// Params are the parsed parameters of a volume.
type Params struct {
	Replicas int
	Reclaim  meta.ReclaimPolicy
	QoS
	FSType    string
	Spread    Spread
	Reads     trivet.ReadConsistency
	CacheMode string // "" = writeThrough
	CacheSize int64  // bytes; sizeByDefault = the node decides by the mode
	ReadAhead int64  // bytes; sizeByDefault = as much as there is
	Eviction  string // "" = lru
	Adaptive  bool   // write-back and read-ahead follow what is measured
	Wipe      string // "" = none
	Locality  string // "" = none
}

const (
	paramOn   = "on"
	paramNone = "none"

	// LocalityPreferred is the value of ParamDataLocality by which a replica follows the attachment.
	LocalityPreferred = "preferred"
)

// sizeByDefault stands for a size that was not given: zero is one that may be asked for.
const sizeByDefault = -1

// The bounds of cache sizes, in bytes. Those of package cache are the same; node checks by them.
const (
	cacheSizeMin = 512 << 10
	cacheSizeMax = 1 << 40
	readAheadMax = 1 << 20
)

// DefaultParams returns what a StorageClass without parameters gets.
func DefaultParams() Params {
	return Params{
		Replicas: 3, Reclaim: meta.ReclaimDelete, Spread: SpreadNode, Reads: trivet.ReadStrong, QoS: DefaultQoS(),
		CacheSize: sizeByDefault, ReadAhead: sizeByDefault,
	}
}

// ignoredParams are added by the provisioner's --extra-create-metadata. They name the claim, so they
// would differ where the request is the same: they are tolerated and forgotten.
var ignoredParams = []string{
	"csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace", "csi.storage.k8s.io/pv/name",
}

// ParseParams reads parameters as they stand in a StorageClass. An empty value is the default.
// It returns ErrInvalid, naming the key, for one that is unknown, given twice or malformed.
func ParseParams(raw map[string]string) (Params, error) {
	p := DefaultParams()
	seen := map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(raw)) { // sorted: the same error each time
		lower := strings.ToLower(key)
		if slices.Contains(ignoredParams, lower) {
			continue
		}
		if other, twice := seen[lower]; twice {
			return Params{}, fmt.Errorf("parameters %q and %q are the same: %w", other, key, trivet.ErrInvalid)
		}
		seen[lower] = key
		if err := p.set(lower, raw[key]); err != nil {
			return Params{}, fmt.Errorf("parameter %q: %w", key, err)
		}
	}
	if err := p.check(); err != nil {
		return Params{}, err
	}
	return p, nil
}

func (p *Params) set(lower, value string) error {
	var err error
	switch lower {
	case ParamReplicas:
		err = oneOf(value, func(v string) { p.Replicas = int(v[0] - '0') }, "1", "3", "5")
	case strings.ToLower(ParamReclaimPolicy):
		err = oneOf(value, func(v string) { p.Reclaim = meta.ReclaimPolicy(v) },
			string(meta.ReclaimDelete), string(meta.ReclaimRetain), string(meta.ReclaimRecycle))
	case ParamFSType:
		err = oneOf(value, func(v string) { p.FSType = v }, "ext4", "xfs")
	case strings.ToLower(ParamReads):
		err = oneOf(value, func(v string) { p.Reads = trivet.ReadConsistency(v) },
			string(trivet.ReadStrong), string(trivet.ReadSession), string(trivet.ReadEventual))
	case strings.ToLower(ParamReclaimWipe):
		err = oneOf(value, func(v string) { p.Wipe = v }, paramNone, "zero")
		if p.Wipe == paramNone {
			p.Wipe = ""
		}
	case strings.ToLower(ParamDataLocality):
		err = oneOf(value, func(v string) { p.Locality = v }, paramNone, LocalityPreferred)
		if p.Locality == paramNone {
			p.Locality = ""
		}
	case ParamSpread:
		err = oneOf(value, func(v string) { p.Spread = Spread(v) }, string(SpreadNode), string(SpreadZone),
			string(SpreadRack))
	default:
		known := false
		if known, err = p.QoS.set(lower, value); !known {
			return p.setCache(lower, value)
		}
	}
	return err
}

func (p *Params) setCache(lower, value string) error {
	var err error
	switch lower {
	case strings.ToLower(ParamCacheMode):
		err = oneOf(value, func(v string) { p.CacheMode = v }, "writeThrough", "writeBack", "writeAround")
		if p.CacheMode == "writeThrough" {
			p.CacheMode = ""
		}
	case ParamEviction:
		err = oneOf(value, func(v string) { p.Eviction = v }, "lru", "lfu", "fifo", "random")
		if p.Eviction == "lru" {
			p.Eviction = ""
		}
	case ParamAdaptive:
		err = oneOf(value, func(v string) { p.Adaptive = v == paramOn }, paramOn, "off")
	case strings.ToLower(ParamCacheSize):
		err = parseSize(value, &p.CacheSize, cacheSizeMin, cacheSizeMax)
	case strings.ToLower(ParamReadAhead):
		err = parseSize(value, &p.ReadAhead, trivet.BlockSize, readAheadMax)
	default:
		return fmt.Errorf("unknown: %w", trivet.ErrInvalid)
	}
	return err
}

// parseSize reads a size that is zero or from least to most bytes.
func parseSize(value string, to *int64, least, most int64) error {
	if value == "" {
		return nil
	}
	n, err := parseQuantity(value)
	if err == nil && n != 0 && (n < least || n > most) {
		err = fmt.Errorf("value %q: want 0, or %d to %d bytes: %w", value, least, most, trivet.ErrInvalid)
	}
	if err == nil {
		*to = n
	}
	return err
}

// oneOf calls set with value, in the spelling of words, when it is one of them.
func oneOf(value string, set func(string), words ...string) error {
	if value == "" {
		return nil
	}
	for _, w := range words {
		if strings.EqualFold(w, value) {
			set(w)
			return nil
		}
	}
	return fmt.Errorf("value %q: want one of %s: %w", value, strings.Join(words, ", "), trivet.ErrInvalid)
}

// units are the suffixes of Kubernetes quantities that a limit may have.
var units = []struct {
	suffix string
	factor int64
}{
	{"Ki", 1 << 10},
	{"Mi", 1 << 20},
	{"Gi", 1 << 30},
	{"Ti", 1 << 40},
	{"k", 1e3},
	{"M", 1e6},
	{"G", 1e9},
	{"T", 1e12},
}

// parseQuantity reads a whole number with an optional suffix, such as 500, 10k or 10Mi.
func parseQuantity(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	digits, factor := s, int64(1)
	for _, u := range units {
		if d, ok := strings.CutSuffix(s, u.suffix); ok {
			digits, factor = d, u.factor
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63) // no sign, no space
	if err != nil || int64(n) > math.MaxInt64/factor {
		return 0, fmt.Errorf("value %q: want a whole number, with Ki, Mi, Gi, Ti, k, M, G or T if wanted: %w",
			s, trivet.ErrInvalid)
	}
	return int64(n) * factor, nil
}

// Map returns the canonical parameters: what was defaulted is spelled out, what is unlimited or
// unset is left out, and so are strong reads.
func (p Params) Map() map[string]string {
	m := map[string]string{
		ParamReplicas:      strconv.Itoa(p.Replicas),
		ParamReclaimPolicy: string(p.Reclaim),
		ParamSpread:        string(p.Spread),
	}
	p.put(m)
	if p.FSType != "" {
		m[ParamFSType] = p.FSType
	}
	if p.Reads != "" && p.Reads != trivet.ReadStrong {
		m[ParamReads] = string(p.Reads)
	}
	if p.CacheMode != "" {
		m[ParamCacheMode] = p.CacheMode
	}
	if p.CacheSize >= 0 {
		m[ParamCacheSize] = strconv.FormatInt(p.CacheSize, 10)
	}
	if p.ReadAhead >= 0 {
		m[ParamReadAhead] = strconv.FormatInt(p.ReadAhead, 10)
	}
	if p.Adaptive {
		m[ParamAdaptive] = paramOn
	}
	if p.Wipe != "" {
		m[ParamReclaimWipe] = p.Wipe
	}
	if p.Eviction != "" {
		m[ParamEviction] = p.Eviction
	}
	if p.Locality != "" {
		m[ParamDataLocality] = p.Locality
	}
	return m
}

// Fingerprint identifies the request: equal for equal canonical parameters. The size is not part of
// it (a volume of a size within the wanted range will do), nor is the topology (a volume can be used
// from every node, and the scheduler may choose another one between two tries).
func (p Params) Fingerprint() string {
	m := p.Map()
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(h, "%d %s %d %s\n", len(k), k, len(m[k]), m[k])
	}
	return hex.EncodeToString(h.Sum(nil))
}
