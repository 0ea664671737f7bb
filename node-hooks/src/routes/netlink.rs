//! What is said to the kernel, and how its answers are read.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::task::AbortHandle;

use super::{Error, PROTOCOL};

/// Before every other. IPv4's default, 0, is that already; IPv6 makes 1024 of it, which routing daemons' routes outweigh.
const IPV6_METRIC: u32 = 1;

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// A netlink socket of one call: nothing to go stale, and closed whatever becomes of the call.
pub(super) struct Session {
    handle: Handle,
    connection: AbortHandle,
}

/// An address, and the interface that it is routed to or answered for on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) address: IpAddr,
    pub(super) index: u32,
}

impl Session {
    pub(super) fn open() -> Result<Self, Error> {
        // Strict, so that the kernel picks the routes to be listed; since Linux 4.20. Before, all are read and picked here.
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check()
            .or_else(|_| rtnetlink::new_connection())
            .map_err(Error::Socket)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection).abort_handle(),
        })
    }

    pub(super) async fn index_of(&self, interface: &str) -> Result<u32, Error> {
        let wrong = |source| Error::Interface {
            interface: interface.to_owned(),
            source,
        };
        let mut links = self.handle.link().get().match_name(interface).execute();
        let link = links.try_next().await.map_err(|error| wrong(io(error)))?;
        link.map(|link| link.header.index)
            .ok_or_else(|| wrong(io::ErrorKind::NotFound.into()))
    }

    /// For people.
    pub(super) async fn name_of(&self, index: u32) -> String {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links.try_next().await.ok().flatten();
        let name = link.and_then(|link| {
            link.attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                })
        });
        name.unwrap_or_else(|| format!("interface {index}"))
    }

    // === routes ===

    /// In one step, so that there is a route at every moment.
    pub(super) async fn put_route(&self, route: Entry) -> io::Result<()> {
        let mut request = self.handle.route().add(message(route)).replace();
        if route.address.is_ipv6() {
            let metric = RouteAttribute::Priority(IPV6_METRIC);
            request.message_mut().attributes.push(metric);
        }
        request.execute().await.map_err(io)
    }

    /// The kernel compares protocol, interface and table too, so that nobody else's goes in place of one that has gone.
    pub(super) async fn remove_route(&self, route: Entry) -> io::Result<()> {
        let request = self.handle.route().del(message(route));
        gone(request.execute().await)
    }

    /// Host routes of segue's.
    pub(super) async fn routes(&self) -> io::Result<Vec<Entry>> {
        let all = self.dump(RouteProtocol::Other(PROTOCOL)).await?;
        Ok(all.iter().filter_map(host_route).collect())
    }

    /// The interfaces of the main table's default routes of a family.
    pub(super) async fn default_interfaces(&self, family: AddressFamily) -> io::Result<Vec<u32>> {
        let all = self.dump(RouteProtocol::Unspec).await?;
        let defaults = all
            .iter()
            .filter(|route| route.header.address_family == family)
            .filter(|route| route.header.destination_prefix_length == 0 && is_usual(route));
        let mut interfaces: Vec<u32> = defaults.flat_map(interfaces).collect();
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }

    /// Unicast routes of the main table, of a protocol where it is not unspecified; perhaps others too.
    async fn dump(&self, protocol: RouteProtocol) -> io::Result<Vec<RouteMessage>> {
        let mut all = Vec::new();
        let requests = [
            RouteMessageBuilder::<Ipv4Addr>::new()
                .protocol(protocol)
                .build(),
            RouteMessageBuilder::<Ipv6Addr>::new()
                .protocol(protocol)
                .build(),
        ];
        for request in requests {
            let routes = self.handle.route().get(request).execute();
            match routes.try_collect::<Vec<_>>().await.map_err(io) {
                Ok(routes) => all.extend(routes),
                // A network namespace has no main table before its first route.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    // === proxy neighbours ===

    pub(super) async fn put_proxy(&self, proxy: Entry) -> io::Result<()> {
        let mut request = self
            .handle
            .neighbours()
            // Permanent, or the kernel would forget it when the interface's carrier goes for a moment.
            .add(proxy.index, proxy.address)
            .flags(NeighbourFlags::Proxy)
            .replace();
        let protocol = NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL));
        request.message_mut().attributes.push(protocol);
        request.execute().await.map_err(io)
    }

    pub(super) async fn remove_proxy(&self, proxy: Entry) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        let (family, address) = match proxy.address {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        message.header.family = family;
        message.header.ifindex = proxy.index;
        message.header.flags = NeighbourFlags::Proxy;
        message.attributes = vec![NeighbourAttribute::Destination(address)];
        gone(self.handle.neighbours().del(message).execute().await)
    }

    /// Proxy neighbours that bear segue's mark, or that are remembered and bear none.
    pub(super) async fn proxies(&self, remembered: &BTreeSet<Entry>) -> io::Result<Vec<Entry>> {
        let mut ours = Vec::new();
        for family in FAMILIES {
            let request = self
                .handle
                .neighbours()
                .get()
                .proxies()
                .set_address_family(family);
            let mut proxies = request.execute();
            while let Some(proxy) = proxies.try_next().await.map_err(io)? {
                let Some((entry, protocol)) = proxy_neighbour(&proxy) else {
                    continue;
                };
                let is_ours = match protocol {
                    Some(protocol) => protocol == RouteProtocol::Other(PROTOCOL),
                    None => remembered.contains(&entry),
                };
                if is_ours {
                    ours.push(entry);
                }
            }
        }
        Ok(ours)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The route as it is put and removed, but for its metric, which does not matter when it goes.
fn message(route: Entry) -> RouteMessage {
    let protocol = RouteProtocol::Other(PROTOCOL);
    match route.address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(route.index)
            .scope(RouteScope::Link)
            .protocol(protocol)
            .build(),
        // There are no scopes in IPv6.
        IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(address, 128)
            .output_interface(route.index)
            .protocol(protocol)
            .build(),
    }
}

/// None for what is not one of segue's.
fn host_route(message: &RouteMessage) -> Option<Entry> {
    let marked = message.header.protocol == RouteProtocol::Other(PROTOCOL);
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                Some(IpAddr::from(*address))
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                Some(IpAddr::from(*address))
            }
            _ => None,
        })?;
    let host = if address.is_ipv4() { 32 } else { 128 };
    let index = *interfaces(message).first()?;
    (marked && is_usual(message) && message.header.destination_prefix_length == host)
        .then_some(Entry { address, index })
}

/// A unicast route of the main table. The table's number in the header is that of a small table; a large one's is 252.
fn is_usual(message: &RouteMessage) -> bool {
    message.header.table == RouteHeader::RT_TABLE_MAIN && message.header.kind == RouteType::Unicast
}

fn interfaces(message: &RouteMessage) -> Vec<u32> {
    message
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => vec![*index],
            RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
            _ => Vec::new(),
        })
        .collect()
}

fn proxy_neighbour(message: &NeighbourMessage) -> Option<(Entry, Option<RouteProtocol>)> {
    if !message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let mut address = None;
    let mut protocol = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::from(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::from(*v6));
            }
            NeighbourAttribute::Protocol(number) => protocol = Some(*number),
            _ => {}
        }
    }
    let entry = Entry {
        address: address?,
        index: message.header.ifindex,
    };
    Some((entry, protocol))
}

/// What is to go and is not there is gone.
fn gone(outcome: Result<(), rtnetlink::Error>) -> io::Result<()> {
    match outcome.map_err(io) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ESRCH | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// The kernel's answer; `rtnetlink`'s own text says "netlink error message" in front of it.
fn io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        error => io::Error::other(error),
    }
}
