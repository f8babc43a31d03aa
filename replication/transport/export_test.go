package transport

// What a rogue peer in external tests needs to speak the protocol badly.
const FrameHeaderBytes = frameHeaderBytes

// EncodeRequest returns a request as a frame.
func EncodeRequest(id uint64, m Message) []byte {
	b := make([]byte, encodedBytes(m))
	encodeMessage(b, frame{typ: frameRequest, id: id, msg: m})
	return b
}

// EncodePing returns a ping as a frame.
func EncodePing() []byte {
	b := make([]byte, frameHeaderBytes)
	encodeMessage(b, frame{typ: framePing})
	return b
}

// EncodePreface returns a preface of the current version.
func EncodePreface() []byte {
	return encodePreface(preface{oldest: versionOldest, newest: versionNewest, incarnation: 1})
}

// PrefaceBytes is the size of a preface.
const PrefaceBytes = prefaceBytes
