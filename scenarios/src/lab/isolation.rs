//! Isolation of guests: a port group with ACLs, as network policies become in OVN.

use std::{fmt, net::IpAddr};

use anyhow::{Result, ensure};

use super::Lab;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Who may begin to talk to the isolated ports, and about what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// The peer's address.
    pub peer: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port at the guest.
    pub port: u16,
}

/// Ports to which only what is allowed gets. What they begin themselves is free, replies included.
#[derive(Clone, Debug)]
pub struct Isolation<'a> {
    lab: &'a Lab,
    name: String,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl Allowed {
    fn as_match(&self) -> String {
        let Self {
            peer,
            protocol,
            port,
        } = self;
        let family = if peer.is_ipv4() { "ip4" } else { "ip6" };
        format!("{family}.src == {peer} && {protocol}.dst == {port}")
    }
}

impl<'a> Isolation<'a> {
    /// Isolates ports. Returns once every node follows.
    ///
    /// # Errors
    /// When the name is not one that an ACL can refer to, or there is no such port.
    pub async fn create(
        lab: &'a Lab,
        name: &str,
        lsps: &[&str],
        allowed: &[Allowed],
    ) -> Result<Self> {
        let fits = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        ensure!(
            fits,
            "port group name {name:?}: use a letter, then letters, digits and underscores"
        );
        let isolation = Self {
            lab,
            name: name.to_owned(),
        };
        lab.nbctl(isolation.arguments(lsps, allowed)).await?;
        Ok(isolation)
    }

    /// Undoes it. Returns once every node follows.
    pub async fn remove(self) -> Result<()> {
        self.lab
            .nbctl(["--wait=hv", "pg-del", &self.name])
            .await
            .map(drop)
    }

    fn arguments(&self, lsps: &[&str], allowed: &[Allowed]) -> Vec<String> {
        let name = self.name.as_str();
        let mut args: Vec<String> = ["--wait=hv", "pg-add", name].map(Into::into).into();
        args.extend(lsps.iter().map(|lsp| (*lsp).to_owned()));
        let allowed = allowed.iter().map(|allowed| {
            (
                "1002",
                format!(" && {}", allowed.as_match()),
                "allow-related",
            )
        });
        // What finds neighbours is never dropped: OVN lets it through before any ACL.
        let rest = ("1000", " && ip".to_owned(), "drop");
        for (priority, condition, verdict) in allowed.chain([rest]) {
            args.extend(
                [
                    "--",
                    "--type=port-group",
                    "acl-add",
                    name,
                    "to-lport",
                    priority,
                ]
                .map(Into::into),
            );
            args.push(format!("outport == @{name}{condition}"));
            args.push(verdict.to_owned());
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_names_family_peer_and_port() {
        let rule = |peer: &str, protocol| {
            let allowed = Allowed {
                peer: peer.parse().unwrap(),
                protocol,
                port: 7000,
            };
            allowed.as_match()
        };
        assert_eq!(
            rule("10.20.3.5", Protocol::Tcp),
            "ip4.src == 10.20.3.5 && tcp.dst == 7000"
        );
        assert_eq!(
            rule("fd00::5", Protocol::Udp),
            "ip6.src == fd00::5 && udp.dst == 7000"
        );
    }
}
