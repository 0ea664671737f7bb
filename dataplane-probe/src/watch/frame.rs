//! Telling frames apart.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(super) const ARP: u16 = 0x0806;
pub(super) const RARP: u16 = 0x8035;
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no MAC address: six pairs of hexadecimal digits are needed, as in 0a:58:0a:80:01:0a"
)]
pub struct MacError(String);

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A RARP request, with which hypervisors announce a machine.
    Rarp,
    /// ARP in which sender and target address are the same (RFC 5227, section 3).
    GratuitousArp,
    /// Any other ARP.
    Arp,
    /// A neighbour advertisement without the solicited flag (RFC 4861, section 7.2.6).
    UnsolicitedNa,
    /// Any other IPv6.
    Ipv6,
    /// IPv4.
    Ipv4,
    /// Anything else.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) source: Mac,
    pub(super) destination: Mac,
    pub(super) ethertype: u16,
    pub(super) kind: Kind,
    /// Of IPv4, and of the header behind IPv6's.
    pub(super) protocol: Option<u8>,
}

impl Kind {
    /// It tells others where the machine is.
    pub fn is_announcement(self) -> bool {
        matches!(self, Self::Rarp | Self::GratuitousArp | Self::UnsolicitedNa)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Rarp => "RARP",
            Self::GratuitousArp => "gratuitous ARP",
            Self::Arp => "ARP",
            Self::UnsolicitedNa => "unsolicited neighbour advertisement",
            Self::Ipv6 => "IPv6",
            Self::Ipv4 => "IPv4",
            Self::Other => "other",
        })
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let colon = if index > 0 { ":" } else { "" };
            write!(out, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(wrong)?;
            // from_str_radix would take a sign.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            Err(wrong())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// None if it is shorter than an Ethernet header.
pub(super) fn parse(bytes: &[u8]) -> Option<Frame> {
    let (&destination, rest) = bytes.split_first_chunk()?;
    let (&source, rest) = rest.split_first_chunk()?;
    let (&ethertype, payload) = rest.split_first_chunk()?;
    let ethertype = u16::from_be_bytes(ethertype);
    Some(Frame {
        source: Mac(source),
        destination: Mac(destination),
        ethertype,
        kind: kind(ethertype, payload),
        protocol: protocol(ethertype, payload),
    })
}

/// Protocol at 9 (RFC 791), next header at 6 (RFC 8200).
fn protocol(ethertype: u16, payload: &[u8]) -> Option<u8> {
    let at = match ethertype {
        IPV4 => 9,
        IPV6 => 6,
        _ => return None,
    };
    payload.get(at).copied()
}

fn kind(ethertype: u16, payload: &[u8]) -> Kind {
    match ethertype {
        RARP => Kind::Rarp,
        // Sender address at 14, target address at 24, for Ethernet and IPv4 (RFC 826).
        ARP => match (payload.get(14..18), payload.get(24..28)) {
            (Some(sender), Some(target)) if sender == target => Kind::GratuitousArp,
            _ => Kind::Arp,
        },
        // Next header at 6; the message follows the 40 bytes of header, its flags at 4 (RFC 4861, section 4.4).
        IPV6 => match (payload.get(6), payload.get(40), payload.get(44)) {
            (Some(58), Some(136), Some(flags)) if flags & 0x40 == 0 => Kind::UnsolicitedNa,
            _ => Kind::Ipv6,
        },
        IPV4 => Kind::Ipv4,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
        [
            &[0xff; 6][..],
            &[0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a],
            &ethertype.to_be_bytes(),
            payload,
        ]
        .concat()
    }

    fn arp(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let head = [0, 1, 8, 0, 6, 4, 0, 1];
        frame(
            ARP,
            &[
                &head[..],
                &[0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a],
                &sender,
                &[0; 6],
                &target,
            ]
            .concat(),
        )
    }

    fn advertisement(flags: u8) -> Vec<u8> {
        let mut payload = [0; 72];
        payload[0] = 0x60;
        payload[6] = 58;
        payload[40] = 136;
        payload[44] = flags;
        frame(IPV6, &payload)
    }

    fn kind_of(bytes: &[u8]) -> Kind {
        parse(bytes).expect("a whole header").kind
    }

    #[test]
    fn tells_announcements_from_the_rest() {
        assert_eq!(kind_of(&frame(RARP, &[0; 46])), Kind::Rarp);
        assert_eq!(
            kind_of(&arp([10, 0, 0, 1], [10, 0, 0, 1])),
            Kind::GratuitousArp
        );
        assert_eq!(kind_of(&arp([10, 0, 0, 1], [10, 0, 0, 2])), Kind::Arp);
        assert_eq!(kind_of(&advertisement(0x20)), Kind::UnsolicitedNa);
        assert_eq!(kind_of(&advertisement(0x60)), Kind::Ipv6);
        assert_eq!(kind_of(&frame(IPV4, &[0x45; 20])), Kind::Ipv4);
        assert_eq!(kind_of(&frame(0x88cc, &[])), Kind::Other);
    }

    #[test]
    fn addresses() {
        let mac = Mac([0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a]);
        assert_eq!("0a:58:0A:80:01:0a".parse(), Ok(mac));
        assert_eq!(mac.to_string(), "0a:58:0a:80:01:0a");
        for wrong in [
            "",
            "0a:58:0a:80:01",
            "0a:58:0a:80:01:0a:00",
            "0a:58:0a:80:01:+a",
            "0a580a80010a",
            "zz:58:0a:80:01:0a",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..128), ethertype in prop::sample::select(vec![ARP, RARP, IPV6, IPV4])) {
            let _ = parse(&bytes);
            let _ = parse(&frame(ethertype, &bytes));
        }
    }
}
