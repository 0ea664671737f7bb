//! Bodies: XDR (RFC 4506), in words of four bytes.

use crate::Error;

/// Puts a body together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoder(Vec<u8>);

/// Takes a body apart.
pub(crate) struct Decoder<'a>(&'a [u8]);

const SHORT: Error = Error::Malformed("a message is too short");

impl Encoder {
    pub(crate) fn word(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// A string that may be absent.
    pub(crate) fn optional(self, value: Option<&str>) -> Self {
        let Some(text) = value else {
            return self.word(0);
        };
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        let mut with = self.word(1).word(length);
        with.0.extend_from_slice(text.as_bytes());
        with.0.resize(with.0.len().next_multiple_of(4), 0);
        with
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0
    }
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn word(&mut self) -> Result<u32, Error> {
        let (word, rest) = self.0.split_first_chunk().ok_or(SHORT)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*word))
    }

    pub(crate) fn long(&mut self) -> Result<u64, Error> {
        Ok(u64::from(self.word()?) << 32 | u64::from(self.word()?))
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Error> {
        // XDR fills up to four bytes.
        let padded = length.checked_next_multiple_of(4).ok_or(SHORT)?;
        let (bytes, rest) = self.0.split_at_checked(padded).ok_or(SHORT)?;
        self.0 = rest;
        bytes.get(..length).ok_or(SHORT)
    }

    pub(crate) fn string(&mut self) -> Result<String, Error> {
        let length = usize::try_from(self.word()?).map_err(|_| SHORT)?;
        let text = String::from_utf8(self.bytes(length)?.to_vec());
        text.map_err(|_| Error::Malformed("a string is not UTF-8"))
    }

    pub(crate) fn optional(&mut self) -> Result<Option<String>, Error> {
        match self.word()? {
            0 => Ok(None),
            _ => self.string().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_padded_and_read_back() {
        let body = Encoder::default().optional(Some("abcde")).optional(None);
        let body = body.word(9).bytes();
        assert_eq!(body.len(), 4 + 4 + 8 + 4 + 4);
        let mut decoder = Decoder::new(&body);
        assert_eq!(decoder.optional().unwrap().as_deref(), Some("abcde"));
        assert_eq!(decoder.optional().unwrap(), None);
        assert_eq!(decoder.word().unwrap(), 9);
        assert!(decoder.word().is_err());
        assert!(Decoder::new(&[0xff; 8]).string().is_err());
    }
}
