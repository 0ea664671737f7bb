use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// Where a server listens, in the notation of ovsdb(7), "Connection Methods".
///
/// ```
/// use ovsdb_rs::Endpoint;
///
/// let endpoint: Endpoint = "tcp:[::1]:6641".parse()?;
/// assert_eq!(endpoint, Endpoint::Tcp("[::1]:6641".into()));
/// # Ok::<(), ovsdb_rs::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:HOST:PORT`; an IPv6 address in brackets. The host is resolved at every connection.
    Tcp(String),
}

/// Servers of one database, tried in turn: `unix:/run/a.sock`, or `tcp:10.0.0.1:6641,tcp:10.0.0.2:6641`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoints(Vec<Endpoint>);

impl Endpoints {
    /// The endpoints in the order in which they are tried; never empty.
    pub fn iter(&self) -> std::slice::Iter<'_, Endpoint> {
        self.0.iter()
    }

    /// The endpoint for the `attempt`th connection attempt, round and round.
    pub(crate) fn at(&self, attempt: usize) -> &Endpoint {
        &self.0[attempt % self.0.len()]
    }
}

impl<'a> IntoIterator for &'a Endpoints {
    type Item = &'a Endpoint;
    type IntoIter = std::slice::Iter<'a, Endpoint>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Endpoint> for Endpoints {
    fn from(endpoint: Endpoint) -> Self {
        Self(vec![endpoint])
    }
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |reason| Error::Endpoint {
            text: text.to_owned(),
            reason,
        };
        let (method, rest) = text
            .split_once(':')
            .ok_or_else(|| invalid("expected METHOD:ADDRESS"))?;
        match method {
            "unix" if rest.is_empty() => Err(invalid("the path of the socket is missing")),
            "unix" => Ok(Self::Unix(rest.into())),
            "tcp" => {
                let (host, port) = rest
                    .rsplit_once(':')
                    .ok_or_else(|| invalid("the port is missing"))?;
                if port.parse::<u16>().is_err() {
                    return Err(invalid("the port is not a number from 0 to 65535"));
                }
                let bracketed = host.starts_with('[') && host.ends_with(']');
                if host.contains(':') && !bracketed {
                    return Err(invalid("an IPv6 address needs brackets: tcp:[::1]:6641"));
                }
                if host.is_empty() || host == "[]" {
                    return Err(invalid("the host is missing"));
                }
                Ok(Self::Tcp(rest.to_owned()))
            }
            "ssl" => Err(invalid("TLS is not supported yet; use unix: or tcp:")),
            _ => Err(invalid("the method must be unix: or tcp:")),
        }
    }
}

impl FromStr for Endpoints {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        text.split(',')
            .map(|endpoint| endpoint.trim().parse())
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
            Self::Tcp(address) => write!(formatter, "tcp:{address}"),
        }
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, endpoint) in self.0.iter().enumerate() {
            if position > 0 {
                formatter.write_str(",")?;
            }
            endpoint.fmt(formatter)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("unix:/run/ovn/ovnnb_db.sock")]
    #[case("tcp:127.0.0.1:6641")]
    #[case("tcp:[fe80::1]:6641")]
    #[case("tcp:nb.example:6641,tcp:[::1]:6642,unix:relative.sock")]
    fn endpoints_are_written_as_they_are_read(#[case] text: &str) {
        assert_eq!(text.parse::<Endpoints>().unwrap().to_string(), text);
    }

    #[rstest]
    #[case("", "METHOD:ADDRESS")]
    #[case("/run/db.sock", "METHOD:ADDRESS")]
    #[case("unix:", "path")]
    #[case("tcp:127.0.0.1", "port")]
    #[case("tcp:127.0.0.1:http", "port")]
    #[case("tcp::6641", "host")]
    #[case("tcp:::1:6641", "brackets")]
    #[case("ssl:127.0.0.1:6641", "TLS")]
    #[case("tcp:127.0.0.1:6641,", "METHOD:ADDRESS")]
    fn what_is_wrong_with_an_endpoint_is_said(#[case] text: &str, #[case] reason: &str) {
        let error = text.parse::<Endpoints>().unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
