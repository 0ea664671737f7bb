//! The host's own way to a VM: host routes, and proxy neighbours that answer for the VM where its neighbours look for it.
//!
//! For VMs whose interface is no port of a switch's, and for hosts that reach VMs without the switch. What is written is
//! marked with a routing protocol number of segue's own, [`PROTOCOL`], so that `ip route show proto 115` and
//! `ip neigh show proxy` tell whose it is, and what a crash has left is found and removed ([`Routes::sweep`]).

mod netlink;
mod uplinks;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use thiserror::Error;
use tokio::sync::Mutex;

use self::netlink::{Entry, Session};
use self::uplinks::Uplinks;

/// Routing protocol number of what is segue's: an `s`, used by nobody in iproute2's `rt_protos` or the kernel's
/// `rtnetlink.h`.
pub const PROTOCOL: u8 = 115;

/// Host routes and proxy neighbours of VMs.
///
/// A VM's address is routed to its interface (`ip route replace ADDRESS/32 dev INTERFACE proto 115 scope link`), and
/// answered for on the host's uplinks (`ip neigh replace proxy ADDRESS dev UPLINK proto 115`). Uplinks are the
/// interfaces that were named, or else those that the main table's default routes of the address's family lead to.
///
/// # Guarantees
/// - An address that is routed is never without a route while it moves to another interface of this host.
/// - What others wrote is never removed.
/// - Everything is tried, whatever fails, and all failures are told.
///
/// # Caveats
/// - The routes have the best metric that there is, 0 in IPv4 and 1 in IPv6: others' routes to the same addresses stay
///   and do not count, such as those that a routing daemon has learnt from the node that the VM has left. One with that
///   very metric is replaced; the kernel can keep but one.
/// - Proxy neighbours bear a protocol since Linux 5.0. Before, they are known to this process only: those of one that
///   crashed stay.
/// - The kernel answers for others only where it forwards (`net.ipv4.conf.UPLINK.forwarding`), in IPv6 only with
///   `net.ipv6.conf.UPLINK.proxy_ndp` as well, and in IPv4 after up to `net.ipv4.neigh.UPLINK.proxy_delay` (0.8 s). An
///   uplink that will not answer is warned of; announcing the VM there ([`crate::announce`]) makes up for it.
/// - Takes `CAP_NET_ADMIN`. It is about the network namespace of the thread that calls.
#[derive(Debug)]
pub struct Routes {
    uplinks: Uplinks,
    /// What was written as a proxy neighbour, for kernels that do not keep the mark. Its lock makes calls wait for each
    /// other: else one that removes could remove what one that puts has just put.
    proxies: Mutex<BTreeSet<Entry>>,
}

/// What was done, and what was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Putting it there.
    Put,
    /// Taking it away.
    Remove,
}

/// Something was not written, removed or found out.
#[derive(Debug, Error)]
pub enum Error {
    /// Nobody is to be reached there.
    #[error("{0} is no address of a VM: a unicast address other than loopback is needed")]
    Address(IpAddr),
    /// Not allowed, most likely.
    #[error("cannot open a netlink socket")]
    Socket(#[source] io::Error),
    /// It is not there (any longer).
    #[error("there is no interface {interface}")]
    Interface {
        /// Its name.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel does not tell.
    #[error("cannot list {what}")]
    List {
        /// Of what.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A route.
    #[error(
        "cannot {action} the route to {address} on {interface}{}",
        remedy(source)
    )]
    Route {
        /// What was to be done.
        action: Action,
        /// Its destination.
        address: IpAddr,
        /// Where it leads.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A proxy neighbour.
    #[error(
        "cannot {action} the proxy neighbour {address} on {interface}{}",
        remedy(source)
    )]
    Proxy {
        /// What was to be done.
        action: Action,
        /// Whom it answers for.
        address: IpAddr,
        /// Where it answers.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// More than one of these.
    #[error("{}", list(.0))]
    Several(Vec<Error>),
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Host routes.
    pub routes: usize,
    /// Proxy neighbours.
    pub proxies: usize,
}

impl Routes {
    /// With the interfaces of the host's default routes as uplinks.
    pub fn new() -> Self {
        Self::of(Uplinks::by_default_route())
    }

    /// With these interfaces as uplinks; none of them, and nobody is answered for.
    pub fn with_uplinks(names: Vec<String>) -> Self {
        Self::of(Uplinks::named(names))
    }

    fn of(uplinks: Uplinks) -> Self {
        Self {
            uplinks,
            proxies: Mutex::new(BTreeSet::new()),
        }
    }

    /// Routes a VM's addresses to its interface, and answers for them on the uplinks. Doing it again changes nothing.
    /// Link-local IPv6 addresses, which every link has for itself, are passed over.
    ///
    /// # Errors
    /// Something is not as wanted; the rest is.
    pub async fn put(&self, vm: &[IpAddr], dev: &str) -> Result<(), Error> {
        let addresses = routable(vm)?;
        if addresses.is_empty() {
            return Ok(());
        }
        let mut remembered = self.proxies.lock().await;
        let session = Session::open()?;
        let index = session.index_of(dev).await?;
        let mut errors = Vec::new();
        for &address in &addresses {
            let route = Entry { address, index };
            let outcome = session.put_route(route).await;
            errors.extend(outcome.err().map(|source| Error::Route {
                action: Action::Put,
                address,
                interface: dev.to_owned(),
                source,
            }));
        }
        for (uplink, name, address) in self.uplinks.of(&session, &addresses, &mut errors).await {
            if uplink == index {
                continue;
            }
            let proxy = Entry {
                address,
                index: uplink,
            };
            match session.put_proxy(proxy).await {
                Ok(()) => {
                    remembered.insert(proxy);
                }
                Err(source) => errors.push(Error::Proxy {
                    action: Action::Put,
                    address,
                    interface: name,
                    source,
                }),
            }
        }
        all(errors)
    }

    /// Where the neighbours of a VM at `dev` are: each uplink, with those of the VM's addresses that are answered for
    /// there.
    ///
    /// # Errors
    /// Not all of them can be found out.
    pub async fn uplinks(
        &self,
        vm: &[IpAddr],
        dev: &str,
    ) -> Result<BTreeMap<String, Vec<IpAddr>>, Error> {
        let addresses = routable(vm)?;
        let session = Session::open()?;
        let mut errors = Vec::new();
        let mut uplinks: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for (_, name, address) in self.uplinks.of(&session, &addresses, &mut errors).await {
            if name != dev {
                uplinks.entry(name).or_default().push(address);
            }
        }
        all(errors).map(|()| uplinks)
    }

    /// Takes back what was written for a VM's addresses, by whichever segue on this host.
    ///
    /// # Errors
    /// Something may still be there.
    pub async fn remove(&self, vm: &[IpAddr]) -> Result<Removed, Error> {
        if vm.is_empty() {
            return Ok(Removed::default());
        }
        self.remove_where(|address| vm.contains(&address)).await
    }

    /// Takes back what a segue that crashed has left: proxy neighbours of addresses that have no route of segue's. The
    /// route of a guest that left went with its interface, or another segue removed it; nothing takes the uplink's proxy
    /// neighbour along, and this host goes on answering for the guest.
    ///
    /// # Errors
    /// Something may still be there. Where routes are not told, all is.
    pub async fn sweep(&self) -> Result<Removed, Error> {
        let mut remembered = self.proxies.lock().await;
        let session = Session::open()?;
        let untold = |what| move |source| Error::List { what, source };
        let routes = session.routes().await.map_err(untold("routes"))?;
        let proxies = session.proxies(&remembered).await;
        let proxies = proxies.map_err(untold("proxy neighbours"))?;
        let mut errors = Vec::new();
        let left = without_route(proxies, &routes);
        let removed = Removed {
            routes: 0,
            proxies: remove_proxies(&session, left, &mut remembered, &mut errors).await,
        };
        all(errors).map(|()| removed)
    }

    async fn remove_where(&self, which: impl Fn(IpAddr) -> bool) -> Result<Removed, Error> {
        let mut remembered = self.proxies.lock().await;
        let session = Session::open()?;
        let mut removed = Removed::default();
        let mut errors = Vec::new();
        for route in listed(session.routes().await, "routes", &mut errors) {
            if !which(route.address) {
                continue;
            }
            match session.remove_route(route).await {
                Ok(()) => removed.routes += 1,
                Err(source) => errors.push(Error::Route {
                    action: Action::Remove,
                    address: route.address,
                    interface: session.name_of(route.index).await,
                    source,
                }),
            }
        }
        let proxies = session.proxies(&remembered).await;
        let mut proxies = listed(proxies, "proxy neighbours", &mut errors);
        proxies.retain(|proxy| which(proxy.address));
        removed.proxies = remove_proxies(&session, proxies, &mut remembered, &mut errors).await;
        all(errors)?;
        // With an interface that went, the kernel has taken its own away.
        remembered.retain(|proxy| !which(proxy.address));
        Ok(removed)
    }
}

impl Default for Routes {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Put => "set",
            Self::Remove => "remove",
        })
    }
}

/// How many of them are removed.
async fn remove_proxies(
    session: &Session,
    proxies: Vec<Entry>,
    remembered: &mut BTreeSet<Entry>,
    errors: &mut Vec<Error>,
) -> usize {
    let mut removed = 0;
    for proxy in proxies {
        match session.remove_proxy(proxy).await {
            Ok(()) => {
                removed += 1;
                remembered.remove(&proxy);
            }
            Err(source) => errors.push(Error::Proxy {
                action: Action::Remove,
                address: proxy.address,
                interface: session.name_of(proxy.index).await,
                source,
            }),
        }
    }
    removed
}

/// Those whose address is routed to no interface of this host.
fn without_route(proxies: Vec<Entry>, routes: &[Entry]) -> Vec<Entry> {
    let kept: BTreeSet<IpAddr> = routes.iter().map(|route| route.address).collect();
    let left = proxies
        .into_iter()
        .filter(|proxy| !kept.contains(&proxy.address));
    left.collect()
}

/// Those that a route makes sense for.
fn routable(addresses: &[IpAddr]) -> Result<Vec<IpAddr>, Error> {
    let nobodys = |address: &IpAddr| {
        address.is_unspecified()
            || address.is_loopback()
            || address.is_multicast()
            || matches!(address, IpAddr::V4(address) if address.is_broadcast())
    };
    if let Some(address) = addresses.iter().find(|address| nobodys(address)) {
        return Err(Error::Address(*address));
    }
    let local = |address: &IpAddr| matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    let routable = addresses.iter().copied().filter(|address| !local(address));
    Ok(routable.collect())
}

fn listed<T>(outcome: io::Result<Vec<T>>, what: &'static str, errors: &mut Vec<Error>) -> Vec<T> {
    outcome.unwrap_or_else(|source| {
        errors.push(Error::List { what, source });
        Vec::new()
    })
}

fn all(mut errors: Vec<Error>) -> Result<(), Error> {
    match (errors.pop(), errors.is_empty()) {
        (None, _) => Ok(()),
        (Some(only), true) => Err(only),
        (Some(last), false) => {
            errors.push(last);
            Err(Error::Several(errors))
        }
    }
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (it takes CAP_NET_ADMIN)",
        io::ErrorKind::NetworkDown => " (the interface is down)",
        _ => "",
    }
}

/// Each with its cause, which `source` could tell of one only.
fn list(errors: &[Error]) -> String {
    let texts: Vec<String> = errors.iter().map(|error| arp_proxy::chain(error)).collect();
    texts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_no_vm_has_is_refused() {
        for wrong in [
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "ff02::1",
        ] {
            let error = routable(&addresses(&["10.0.0.1", wrong])).unwrap_err();
            assert!(error.to_string().starts_with(wrong), "{error}");
        }
        let kept = routable(&addresses(&["10.0.0.1", "fe80::1", "2001:db8::1"])).unwrap();
        assert_eq!(kept, addresses(&["10.0.0.1", "2001:db8::1"]));
    }

    #[test]
    fn proxies_without_a_route_are_left_over_whatever_the_interface() {
        let entry = |address: &str, index| Entry {
            address: address.parse().unwrap(),
            index,
        };
        let routes = [entry("10.0.0.1", 5), entry("2001:db8::1", 5)];
        let stay = [
            entry("10.0.0.1", 2),
            entry("10.0.0.1", 3),
            entry("2001:db8::1", 2),
        ];
        let go = [entry("10.0.0.2", 2), entry("2001:db8::2", 3)];
        let proxies = [&stay[..], &go].concat();
        assert_eq!(without_route(proxies.clone(), &routes), go);
        assert_eq!(without_route(proxies.clone(), &[]), proxies);
    }

    #[test]
    fn all_failures_are_told() {
        let error = |address: &str| Error::Route {
            action: Action::Put,
            address: address.parse().unwrap(),
            interface: "tap0".to_owned(),
            source: io::Error::from_raw_os_error(1),
        };
        let several = all(vec![error("10.0.0.1"), error("10.0.0.2")]).unwrap_err();
        let text = several.to_string();
        for part in [
            "cannot set the route to 10.0.0.1 on tap0 (it takes CAP_NET_ADMIN)",
            "10.0.0.2",
            "not permitted",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(matches!(
            all(vec![error("10.0.0.1")]),
            Err(Error::Route { .. })
        ));
        assert!(all(Vec::new()).is_ok());
    }
}
