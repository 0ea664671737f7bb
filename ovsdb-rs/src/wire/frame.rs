use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::Decoder;

/// Cuts a stream of JSON objects, with nothing or white space between them, into one frame each.
///
/// JSON-RPC over a stream has no length prefix: an object ends where its braces balance. The scanner
/// keeps its state between reads and so looks at every byte exactly once, however the stream is cut
/// into reads; parsing a partial object again with every read would be quadratic, and the first
/// contents of a large database come as one object in thousands of reads.
///
/// # Guarantees
/// - Any way of cutting the stream into reads gives the same frames.
/// - [`scanned`](Self::scanned) never exceeds the number of bytes received.
///
/// # Caveats
/// - Only structure is looked at: a frame is a balanced object, not yet valid JSON.
#[derive(Debug)]
pub struct FrameDecoder {
    max_frame: usize,
    /// How much of the buffer the scanner has seen.
    position: usize,
    depth: usize,
    state: State,
    scanned: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before an object.
    Between,
    /// In an object, outside of strings.
    Structure,
    String,
    /// In a string, after a backslash.
    Escape,
}

/// What makes a stream unusable: after it, there is no telling where the next object begins.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The object is larger than allowed.
    #[error(
        "a message exceeds the limit of {0} bytes; raise `ClientOptions::max_frame` if the database is this large"
    )]
    TooLarge(usize),
    /// Something else than an object begins.
    #[error("byte {0:#04x} where a JSON object should begin; is this an OVSDB server?")]
    NotAnObject(u8),
    /// Braces and brackets do not match.
    #[error("a message closes more brackets than it opens")]
    Unbalanced,
    /// The stream ended inside of an object.
    #[error("the stream ended inside of a message, after {0} bytes of it")]
    Truncated(usize),
    /// The stream failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl FrameDecoder {
    /// A decoder for the beginning of a stream, whose frames may have up to `max_frame` bytes.
    pub fn new(max_frame: usize) -> Self {
        Self {
            max_frame,
            position: 0,
            depth: 0,
            state: State::Between,
            scanned: 0,
        }
    }

    /// How many bytes the scanner has looked at since the beginning.
    pub fn scanned(&self) -> u64 {
        self.scanned
    }

    /// Goes on scanning `unseen`; the number of bytes up to the object's end, if it is there.
    fn scan(&mut self, unseen: &[u8]) -> Result<Option<usize>, FrameError> {
        for (offset, &byte) in unseen.iter().enumerate() {
            match (self.state, byte) {
                (State::Structure, b'"') | (State::Escape, _) => self.state = State::String,
                (State::Structure, b'{' | b'[') => self.depth += 1,
                (State::Structure, b'}' | b']') => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        self.state = State::Between;
                        return if byte == b'}' {
                            Ok(Some(offset + 1))
                        } else {
                            Err(FrameError::Unbalanced)
                        };
                    }
                }
                (State::String, b'"') => self.state = State::Structure,
                (State::String, b'\\') => self.state = State::Escape,
                (State::Structure | State::String, _) => {}
                (State::Between, b'{') => {
                    self.depth = 1;
                    self.state = State::Structure;
                }
                (State::Between, other) => return Err(FrameError::NotAnObject(other)),
            }
        }
        Ok(None)
    }
}

impl Decoder for FrameDecoder {
    type Item = Bytes;
    type Error = FrameError;

    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
        if self.state == State::Between {
            let blank = buffer
                .iter()
                .take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'))
                .count();
            buffer.advance(blank);
            self.scanned += blank as u64;
        }
        let unseen = buffer.get(self.position..).unwrap_or_default();
        let end = self.scan(unseen)?;
        let seen = end.unwrap_or(unseen.len());
        self.scanned += seen as u64;
        self.position += seen;
        if self.position > self.max_frame {
            return Err(FrameError::TooLarge(self.max_frame));
        }
        Ok(end.map(|_| buffer.split_to(std::mem::take(&mut self.position)).freeze()))
    }

    fn decode_eof(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
        match self.decode(buffer)? {
            Some(frame) => Ok(Some(frame)),
            None if buffer.is_empty() => Ok(None),
            None => Err(FrameError::Truncated(buffer.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An object's text, with everything in it that could mislead the scanner.
    fn object() -> impl Strategy<Value = String> {
        let text = prop_oneof![
            any::<String>(),
            r#"[{}\[\]"\\:, ]{0,12}"#.prop_map(String::from),
        ];
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<i64>().prop_map(Into::into),
            text.clone().prop_map(Into::into),
        ];
        let value = leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                proptest::collection::btree_map(text.clone(), inner, 0..4)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        });
        proptest::collection::btree_map("[a-z\\\\\"{}]{0,4}", value, 0..4)
            .prop_map(|map| serde_json::to_string(&map).unwrap())
    }

    /// Objects with what separates them, and where the stream is cut into reads.
    fn stream() -> impl Strategy<Value = (Vec<String>, String, Vec<usize>)> {
        let separated = (object(), "[ \t\r\n]{0,3}");
        proptest::collection::vec(separated, 0..12)
            .prop_map(|parts| {
                let text = parts
                    .iter()
                    .map(|(object, blank)| format!("{object}{blank}"));
                let text: String = text.collect();
                let objects = parts.into_iter().map(|(object, _)| object);
                (objects.collect::<Vec<_>>(), text)
            })
            .prop_flat_map(|(objects, text)| {
                let cuts = proptest::collection::vec(0..=text.len(), 0..40);
                (Just(objects), Just(text), cuts)
            })
    }

    proptest! {
        #[test]
        fn any_cut_of_a_stream_gives_the_same_frames_and_scans_each_byte_once(
            (objects, text, mut cuts) in stream()
        ) {
            cuts.sort_unstable();
            cuts.push(text.len());
            let mut decoder = FrameDecoder::new(usize::MAX);
            let mut buffer = BytesMut::new();
            let mut frames = Vec::new();
            let mut fed = 0;
            for cut in cuts {
                buffer.extend_from_slice(&text.as_bytes()[fed..cut]);
                fed = cut;
                while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
                    frames.push(String::from_utf8(frame.to_vec()).unwrap());
                }
                prop_assert_eq!(decoder.scanned(), fed as u64);
            }
            prop_assert_eq!(frames, objects);
            prop_assert!(decoder.decode_eof(&mut buffer).unwrap().is_none());
        }

        #[test]
        fn no_input_breaks_the_scanner(input: Vec<u8>, cut: prop::sample::Index) {
            let mut decoder = FrameDecoder::new(64);
            let mut buffer = BytesMut::new();
            let (first, second) = input.split_at(cut.index(input.len() + 1).min(input.len()));
            for part in [first, second] {
                buffer.extend_from_slice(part);
                while let Ok(Some(frame)) = decoder.decode(&mut buffer) {
                    prop_assert!(frame.len() <= 64);
                }
            }
        }
    }

    #[test]
    fn a_frame_may_be_as_large_as_the_limit_and_no_larger() {
        let text = br#"{"a":"bc"}"#;
        let mut decoder = FrameDecoder::new(text.len());
        let frame = decoder.decode(&mut BytesMut::from(&text[..])).unwrap();
        assert_eq!(frame.unwrap(), &text[..]);

        let mut decoder = FrameDecoder::new(text.len() - 1);
        let mut buffer = BytesMut::from(&text[..]);
        assert!(matches!(
            decoder.decode(&mut buffer),
            Err(FrameError::TooLarge(9))
        ));
        // Before its end has come, too.
        let mut decoder = FrameDecoder::new(4);
        let mut buffer = BytesMut::from(&text[..5]);
        assert!(matches!(
            decoder.decode(&mut buffer),
            Err(FrameError::TooLarge(4))
        ));
    }

    #[test]
    fn the_end_of_the_stream_inside_of_a_frame_is_an_error() {
        let mut decoder = FrameDecoder::new(100);
        let mut buffer = BytesMut::from(&b"{\"a\":1} {\"b\""[..]);
        assert!(decoder.decode_eof(&mut buffer).unwrap().is_some());
        assert!(matches!(
            decoder.decode_eof(&mut buffer),
            Err(FrameError::Truncated(4))
        ));
    }
}
