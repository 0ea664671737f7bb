//! Ethernet addresses.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

/// An Ethernet address, written `0a:58:0a:80:00:0a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Made from an IPv4 address as OVN's own users do: `0a:58` and the address.
    pub fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x0a, 0x58, a, b, c, d])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, octet) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(":")?;
            }
            write!(f, "{octet:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for MacAddr {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let octets = text
            .split(':')
            .map(|octet| {
                // A sign is not a digit, although the parser takes one.
                ensure!(
                    octet.len() == 2 && octet.chars().all(|c| c.is_ascii_hexdigit()),
                    "octet {octet:?} is not two hexadecimal digits"
                );
                u8::from_str_radix(octet, 16).with_context(|| format!("octet {octet:?}"))
            })
            .collect::<Result<Vec<_>>>()
            .with_context(|| format!("Ethernet address {text:?}"))?;
        let octets = octets.try_into().map_err(|octets: Vec<u8>| {
            anyhow::anyhow!("Ethernet address {text:?} has {} octets", octets.len())
        })?;
        Ok(Self(octets))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_to_the_same() {
        let mac = MacAddr([0x0a, 0x58, 0, 0x80, 0xff, 1]);
        assert_eq!(mac.to_string(), "0a:58:00:80:ff:01");
        assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
    }

    #[test]
    fn malformed_addresses_are_refused() {
        for bad in [
            "",
            "0a:58:00:80:ff",
            "0a:58:00:80:ff:01:02",
            "0a:58:00:80:ff:+1",
            "0a:58:00:80:ff:g1",
            "a:b:c:d:e:f",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad:?} was accepted");
        }
    }
}
