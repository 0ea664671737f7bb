//! Lines of something that may send anything.

use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::Decoder;

/// A line without its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    Whole(Bytes),
    /// It was longer than the limit, and is thrown away.
    TooLong,
}

/// Splits into lines of a bounded length. What comes after the last line's end and then ends itself is no line.
#[derive(Debug)]
pub(super) struct Lines {
    limit: usize,
    /// Up to here there is no end of a line.
    looked: usize,
    /// In a line that is too long.
    discarding: bool,
}

impl Lines {
    /// Of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            looked: 0,
            discarding: false,
        }
    }
}

impl Decoder for Lines {
    type Item = Line;
    type Error = std::io::Error;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Line>, Self::Error> {
        let unseen = source.get(self.looked..).unwrap_or_default();
        let Some(end) = unseen.iter().position(|&byte| byte == b'\n') else {
            if source.len() > self.limit {
                self.discarding = true;
                source.clear();
            }
            self.looked = source.len();
            return Ok(None);
        };
        let end = self.looked + end;
        self.looked = 0;
        let line = source.split_to(end);
        source.advance(1);
        if std::mem::take(&mut self.discarding) || line.len() > self.limit {
            return Ok(Some(Line::TooLong));
        }
        let mut line = line.freeze();
        if line.ends_with(b"\r") {
            line.truncate(line.len() - 1);
        }
        Ok(Some(Line::Whole(line)))
    }

    fn decode_eof(&mut self, source: &mut BytesMut) -> Result<Option<Line>, Self::Error> {
        let line = self.decode(source)?;
        if line.is_none() {
            source.clear();
        }
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 16;

    /// Everything that comes out when the bytes arrive in these pieces.
    fn lines<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Line> {
        let (mut decoder, mut buffer, mut lines) = (Lines::new(LIMIT), BytesMut::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            while let Some(line) = decoder.decode(&mut buffer).unwrap() {
                lines.push(line);
            }
            assert!(buffer.len() <= LIMIT, "{} bytes are kept", buffer.len());
        }
        while let Some(line) = decoder.decode_eof(&mut buffer).unwrap() {
            lines.push(line);
        }
        assert!(buffer.is_empty(), "the codec would call it an error");
        lines
    }

    #[test]
    fn what_is_not_ended_is_no_line() {
        let whole = |text: &'static str| Line::Whole(Bytes::from_static(text.as_bytes()));
        assert_eq!(lines([&b"a\r\n\nb"[..]]), [whole("a"), whole("")]);
    }

    proptest! {
        /// However the bytes are cut into pieces, the lines are the same; and none is longer than the limit.
        #[test]
        fn pieces_do_not_matter(
            text in prop::collection::vec(prop_oneof![4 => 97_u8..100, 1 => Just(b'\n')], 0..200),
            cuts in prop::collection::vec(1_usize..20, 1..20),
        ) {
            let expected: Vec<Line> = text
                .split_inclusive(|&byte| byte == b'\n')
                .filter_map(|line| line.strip_suffix(b"\n"))
                .map(|line| {
                    if line.len() > LIMIT {
                        Line::TooLong
                    } else {
                        Line::Whole(Bytes::copy_from_slice(line))
                    }
                })
                .collect();
            let mut rest = &text[..];
            let mut pieces = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, left) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece);
                rest = left;
            }
            prop_assert_eq!(lines(pieces), expected);
        }
    }
}
