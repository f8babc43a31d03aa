package engine

// WithImageRange sets how many bytes of blocks an image has between two digests.
func WithImageRange(c Config, bytes int) Config {
	c.imageRangeBytes = bytes
	return c
}
