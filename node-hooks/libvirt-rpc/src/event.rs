//! What a daemon says unasked.

use crate::Error;
use crate::connection::{LIFECYCLE, MONITOR, Procedure};
use crate::xdr::Decoder;

/// A domain's name is limited by nothing but its file's.
const LONGEST_NAME: usize = 255;

/// Something that happened to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The domain's name.
    pub domain: String,
    /// What.
    pub what: Happening,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A change of the domain's state as libvirt sees it, which it tells without a time.
    Lifecycle {
        /// `virDomainEventType`.
        event: u32,
        /// The type of detail that belongs to it.
        detail: u32,
    },
    /// An event of QEMU's monitor (QMP), with QEMU's own time in Unix time.
    Monitor {
        /// Its name there: `STOP`, `RESUME`, `MIGRATION`…
        name: String,
        /// The time's seconds.
        seconds: u64,
        /// And its microseconds.
        micros: u32,
        /// Its data, JSON, if it has any.
        data: Option<String>,
    },
}

impl Event {
    /// Reads a message; none if it is no event of these.
    pub(crate) fn read(procedure: Procedure, body: &[u8]) -> Result<Option<Self>, Error> {
        if procedure != LIFECYCLE && procedure != MONITOR {
            return Ok(None);
        }
        let mut body = Decoder::new(body);
        let _callback = body.word()?;
        let domain = body.string()?;
        if domain.len() > LONGEST_NAME {
            return Err(Error::Malformed("a domain's name is too long"));
        }
        let _uuid = body.bytes(16)?;
        let _id = body.word()?;
        let what = if procedure == LIFECYCLE {
            Happening::Lifecycle {
                event: body.word()?,
                detail: body.word()?,
            }
        } else {
            Happening::Monitor {
                name: body.string()?,
                seconds: body.long()?,
                micros: body.word()?,
                data: body.optional()?,
            }
        };
        Ok(Some(Self { domain, what }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Callback 1, domain vm1 with its UUID and number 7.
    const DOMAIN: &str = "00000001 00000003 766d3100 11111111222233334444555555555555 00000007";

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        let pairs = digits.as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        pairs.map(byte).collect()
    }

    #[test]
    fn a_monitor_event_has_qemus_own_time() {
        let body = hex(&format!(
            "{DOMAIN} 00000009 4d4947524154494f 4e000000 00000000 00000064 000186a0 \
             00000001 00000013 7b22737461747573223a226163 74697665227d 00"
        ));
        let event = Event::read(MONITOR, &body).unwrap().unwrap();
        let what = Happening::Monitor {
            name: "MIGRATION".to_owned(),
            seconds: 100,
            micros: 100_000,
            data: Some(r#"{"status":"active"}"#.to_owned()),
        };
        assert_eq!((event.domain.as_str(), event.what), ("vm1", what));
    }

    #[test]
    fn a_lifecycle_event_is_two_numbers() {
        let body = hex(&format!("{DOMAIN} 00000004 00000001"));
        let heard = Event::read(LIFECYCLE, &body).unwrap().unwrap();
        let (event, detail) = (4, 1);
        assert_eq!(heard.what, Happening::Lifecycle { event, detail });
    }

    #[test]
    fn truncated_events_are_errors_and_others_are_none() {
        assert!(Event::read(LIFECYCLE, &hex(DOMAIN)).is_err());
        let long = [&hex("00000001 00000100")[..], &[b'a'; 256 + 28]].concat();
        assert!(Event::read(LIFECYCLE, &long).is_err());
        assert_eq!(Event::read((LIFECYCLE.0, 1), &[]).unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), monitor: bool) {
            let procedure = if monitor { MONITOR } else { LIFECYCLE };
            let _ = Event::read(procedure, &bytes);
        }
    }
}
