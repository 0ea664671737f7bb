//! What a switch says when it will not do something (`OFPT_ERROR`).

use std::fmt;

use super::message::Message;
use super::version::Version;

/// In messages of 1.0 and 1.1 that carry a Nicira error (`NXET_VENDOR`, Open vSwitch's lib/ofp-errors.c).
const NICIRA_ERROR: u16 = 0xb0c2;
/// In messages of 1.2 and later that carry an experimenter's error.
const EXPERIMENTER_ERROR: u16 = 0xffff;
const HELLO_FAILED: u16 = 0;
/// A switch may write anything.
const LONGEST_TEXT: usize = 200;

/// An error message of the switch's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `OFPET_*`.
    pub kind: u16,
    /// `OFP*FC_*` and the like; their numbers mean something else for each kind.
    pub code: u16,
    /// Whose kinds and codes they are, where they are not the standard's.
    pub experimenter: Option<u32>,
    /// The type of the message that it answers, where the switch sent its header back.
    pub request: Option<u8>,
    /// What else it says: only a failed hello comes with text.
    pub text: Option<String>,
    version: u8,
}

impl Refusal {
    /// Reads an error message; one that is cut short says as much as is there.
    pub(super) fn read(message: &Message) -> Self {
        let mut rest = &*message.body;
        let mut kind = half(&mut rest).unwrap_or(u16::MAX);
        let mut code = half(&mut rest).unwrap_or(u16::MAX);
        let mut experimenter = None;
        match kind {
            EXPERIMENTER_ERROR => experimenter = word(&mut rest),
            NICIRA_ERROR if message.version <= Version::V11.number() => {
                experimenter = word(&mut rest);
                kind = half(&mut rest).unwrap_or(u16::MAX);
                code = half(&mut rest).unwrap_or(u16::MAX);
            }
            _ => {}
        }
        let text = kind == HELLO_FAILED && experimenter.is_none();
        Self {
            kind,
            code,
            experimenter,
            // A failed hello has text in place of the request.
            request: rest.get(1).filter(|_| !text).copied(),
            text: text
                .then(|| printable(rest))
                .filter(|text| !text.is_empty()),
            version: message.version,
        }
    }

    /// The specification's name for it, and what it means; from Open vSwitch's ofp-errors.h, which has them for all
    /// versions.
    fn meaning(&self) -> Option<(&'static str, &'static str)> {
        if self.experimenter.is_some() {
            // Open vSwitch's stand-in where old versions have no code for it.
            return match (self.kind, self.code) {
                (1, 514) => Some(("OFPBRC_BAD_PORT", "there is no such port")),
                _ => None,
            };
        }
        Some(match (self.kind, self.code) {
            (0, 0) => ("OFPHFC_INCOMPATIBLE", "it speaks none of our versions"),
            (0, 1) => ("OFPHFC_EPERM", "it does not want us"),
            (1, 0) => ("OFPBRC_BAD_VERSION", "it does not speak this version"),
            (1, 1) => ("OFPBRC_BAD_TYPE", "it does not know such a message"),
            (1, 3) => ("OFPBRC_BAD_VENDOR", "it does not know the extension"),
            (1, 4) => ("OFPBRC_BAD_SUBTYPE", "it does not know the extension"),
            (1, 5) => ("OFPBRC_EPERM", "it does not allow that"),
            (1, 6) => ("OFPBRC_BAD_LEN", "the message has a wrong length"),
            (1, 10) if self.version >= Version::V12.number() => (
                "OFPBRC_IS_SECONDARY",
                "this connection has been made a secondary one",
            ),
            (1, 11) if self.version >= Version::V12.number() => {
                ("OFPBRC_BAD_PORT", "there is no such port")
            }
            (1, 12) if self.version >= Version::V12.number() => {
                ("OFPBRC_BAD_PACKET", "it does not take the frame")
            }
            (2, 0) => ("OFPBAC_BAD_TYPE", "it does not know the action"),
            (2, 1) => ("OFPBAC_BAD_LEN", "the action has a wrong length"),
            (2, 2) => (
                "OFPBAC_BAD_VENDOR",
                "it does not know the action's vendor: it is no Open vSwitch",
            ),
            (2, 3) => ("OFPBAC_BAD_VENDOR_TYPE", "it does not know the action"),
            (2, 4) => ("OFPBAC_BAD_OUT_PORT", "there is no such port"),
            (2, 5) => ("OFPBAC_BAD_ARGUMENT", "the action's argument is wrong"),
            (2, 6) => ("OFPBAC_EPERM", "it does not allow the action"),
            _ => return None,
        })
    }

    fn about(&self) -> &'static str {
        match self.kind {
            _ if self.experimenter.is_some() => "an extension's error",
            0 => "hello failed",
            1 => "bad request",
            2 => "bad action",
            _ => "error",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, meaning)) = self.meaning() {
            write!(out, "{meaning} ({name})")?;
        } else {
            let (kind, code) = (self.kind, self.code);
            write!(out, "{}, type {kind} code {code}", self.about())?;
            if let Some(experimenter) = self.experimenter {
                write!(out, " of experimenter {experimenter:#x}")?;
            }
        }
        if let Some(text) = &self.text {
            write!(out, ": {text:?}")?;
        }
        Ok(())
    }
}

fn half(rest: &mut &[u8]) -> Option<u16> {
    let (value, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(u16::from_be_bytes(*value))
}

fn word(rest: &mut &[u8]) -> Option<u32> {
    let (value, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(u32::from_be_bytes(*value))
}

fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .chars()
        .filter(|character| !character.is_control())
        .take(LONGEST_TEXT)
        .collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn refusal(version: Version, body: &[u8]) -> Refusal {
        Refusal::read(&Message {
            version: version.number(),
            kind: 1,
            xid: 7,
            body: Bytes::copy_from_slice(body),
        })
    }

    #[test]
    fn a_port_that_is_not_there_in_every_version() {
        let newer = refusal(Version::V13, &[0, 1, 0, 11, 4, 13, 0, 100, 0, 0, 0, 7]);
        assert_eq!((newer.kind, newer.code, newer.request), (1, 11, Some(13)));
        assert_eq!(newer.to_string(), "there is no such port (OFPBRC_BAD_PORT)");
        let nicira = [0xb0, 0xc2, 0, 0, 0, 0, 0x23, 0x20, 0, 1, 2, 2, 1, 13];
        let older = refusal(Version::V10, &nicira);
        assert_eq!((older.kind, older.code, older.request), (1, 514, Some(13)));
        assert_eq!(older.experimenter, Some(0x2320));
        assert_eq!(older.to_string(), newer.to_string());
    }

    #[test]
    fn codes_mean_what_their_version_says() {
        let body = [0, 1, 0, 11];
        assert_eq!(
            refusal(Version::V11, &body).to_string(),
            "bad request, type 1 code 11"
        );
    }

    #[test]
    fn a_failed_hello_comes_with_text() {
        let refusal = refusal(Version::V10, b"\0\0\0\0We support version 0x01,\nyou 0x06.");
        assert_eq!(refusal.request, None);
        assert_eq!(
            refusal.to_string(),
            "it speaks none of our versions (OFPHFC_INCOMPATIBLE): \"We support version 0x01,you 0x06.\""
        );
    }

    #[test]
    fn what_is_not_known_is_given_in_numbers() {
        let unknown = refusal(Version::V13, &[0, 9, 0, 3]);
        assert_eq!(unknown.to_string(), "error, type 9 code 3");
        let extension = refusal(Version::V13, &[0xff, 0xff, 0, 2, 0, 0, 0x23, 0x20]);
        assert_eq!(
            extension.to_string(),
            "an extension's error, type 65535 code 2 of experimenter 0x2320"
        );
        // Cut short.
        assert_eq!(refusal(Version::V13, &[]).request, None);
        assert_eq!(refusal(Version::V10, &[0xb0, 0xc2, 0]).experimenter, None);
    }
}
