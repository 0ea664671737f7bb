//! Where a host answers for its VMs.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use netlink_packet_route::AddressFamily;

use super::netlink::Session;
use super::{Error, listed};

/// The interfaces behind which a VM's neighbours are.
#[derive(Debug)]
pub(super) struct Uplinks {
    /// None: where the default routes lead.
    named: Option<Vec<String>>,
    /// Uplinks that will not answer, of which it has been said.
    mute: Mutex<BTreeSet<String>>,
}

impl Uplinks {
    pub(super) fn by_default_route() -> Self {
        Self {
            named: None,
            mute: Mutex::default(),
        }
    }

    pub(super) fn named(names: Vec<String>) -> Self {
        Self {
            named: Some(names),
            mute: Mutex::default(),
        }
    }

    /// Each address with each uplink of its family, by index and name.
    pub(super) async fn of(
        &self,
        session: &Session,
        addresses: &[IpAddr],
        errors: &mut Vec<Error>,
    ) -> Vec<(u32, String, IpAddr)> {
        let mut pairs = Vec::new();
        for is_ipv6 in [false, true] {
            let of_family: Vec<IpAddr> = addresses
                .iter()
                .copied()
                .filter(|address| address.is_ipv6() == is_ipv6)
                .collect();
            if of_family.is_empty() {
                continue;
            }
            for (index, name) in self.of_family(session, is_ipv6, errors).await {
                self.note_mute(&name, is_ipv6);
                pairs.extend(
                    of_family
                        .iter()
                        .map(|address| (index, name.clone(), *address)),
                );
            }
        }
        pairs
    }

    async fn of_family(
        &self,
        session: &Session,
        is_ipv6: bool,
        errors: &mut Vec<Error>,
    ) -> Vec<(u32, String)> {
        let mut uplinks = Vec::new();
        if let Some(names) = &self.named {
            for name in names {
                match session.index_of(name).await {
                    Ok(index) => uplinks.push((index, name.clone())),
                    Err(error) => errors.push(error),
                }
            }
            return uplinks;
        }
        let family = if is_ipv6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        let interfaces = session.default_interfaces(family).await;
        for index in listed(interfaces, "routes", errors) {
            uplinks.push((index, session.name_of(index).await));
        }
        uplinks
    }

    fn note_mute(&self, name: &str, is_ipv6: bool) {
        let Some(setting) = mute(name, is_ipv6, read) else {
            return;
        };
        let mut told = self.mute.lock().unwrap_or_else(PoisonError::into_inner);
        if told.insert(setting.clone()) {
            tracing::warn!(
                uplink = name,
                "the host will not answer for VMs there: set {setting} to 1"
            );
        }
    }
}

/// The setting that keeps the kernel from answering for others (Linux, Documentation/networking/ip-sysctl.rst).
fn mute(name: &str, is_ipv6: bool, read: impl Fn(&str) -> Option<bool>) -> Option<String> {
    let off = |setting: &str| read(setting) == Some(false);
    let family = if is_ipv6 { "ipv6" } else { "ipv4" };
    let forwarding = format!("net/{family}/conf/{name}/forwarding");
    if off(&forwarding) {
        return Some(forwarding);
    }
    let proxy = format!("net/ipv6/conf/{name}/proxy_ndp");
    (is_ipv6 && off(&proxy) && off("net/ipv6/conf/all/proxy_ndp")).then_some(proxy)
}

/// Whether a setting is on; none if it cannot be read.
fn read(setting: &str) -> Option<bool> {
    let value = fs::read_to_string(format!("/proc/sys/{setting}")).ok()?;
    Some(value.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uplink_that_will_not_answer_is_found_out() {
        let with = |on: &'static [&str]| {
            move |setting: &str| Some(on.iter().any(|on| setting.ends_with(on)))
        };
        assert_eq!(
            mute("eth0", false, with(&[])).as_deref(),
            Some("net/ipv4/conf/eth0/forwarding")
        );
        assert_eq!(mute("eth0", false, with(&["forwarding"])), None);
        assert_eq!(
            mute("eth0", true, with(&["forwarding"])).as_deref(),
            Some("net/ipv6/conf/eth0/proxy_ndp")
        );
        assert_eq!(
            mute("eth0", true, with(&["forwarding", "all/proxy_ndp"])),
            None
        );
        // Where nothing can be read nothing is claimed.
        assert_eq!(mute("eth0", true, |_| None), None);
    }
}
